"""The convolutional network of a well-known PyTorch tutorial, rebuilt in JAX and Flax."""

__version__ = "0.1.0"

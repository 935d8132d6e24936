"""The convolutional network of a well-known PyTorch tutorial, rebuilt in JAX and Flax.

`cnn_jax.load()` returns a trained network and `cnn_jax.train()` trains one; `docs/python.md` shows both.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cnn_jax.cli.interface import load, train

__version__ = "0.1.0"
__all__ = ["load", "train"]


def __getattr__(name: str) -> Any:
    # JAX and Flax are imported when they are needed: this module's import takes milliseconds.
    if name in __all__:
        from cnn_jax.cli import interface

        return getattr(interface, name)
    raise AttributeError(f"module 'cnn_jax' has no attribute {name!r}")

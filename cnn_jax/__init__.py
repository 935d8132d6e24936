"""The convolutional network of a well-known PyTorch tutorial, rebuilt in JAX and Flax.

`cnn_jax.load()` returns a trained network and `cnn_jax.train()` trains one; `docs/python.md` shows both.
"""

import resource
import sys
from typing import TYPE_CHECKING, Any

# Python 3.11 keeps a module's bytecode that a limit of the size of files has cut off, and fails with it ever after.
if 0 <= resource.getrlimit(resource.RLIMIT_FSIZE)[0] < 2**24:
    sys.dont_write_bytecode = True

if TYPE_CHECKING:
    from cnn_jax.cli.interface import CnnJaxError, load, train

__version__ = "0.2.0.dev0"
__all__ = ["CnnJaxError", "load", "train"]


def __getattr__(name: str) -> Any:
    # JAX and Flax are imported when they are needed: this module's import takes milliseconds.
    if name in __all__:
        from cnn_jax.cli import interface

        return getattr(interface, name)
    raise AttributeError(f"module 'cnn_jax' has no attribute {name!r}")

"""What holds for every test: strict types and ranks in our own code, and no network."""

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def strict_dtype_promotion(request):
    """No silent conversion between dtypes; a test whose path runs through Optax opts out with `optax_promotes`."""
    mode = "standard" if request.node.get_closest_marker("optax_promotes") else "strict"
    with jax.numpy_dtype_promotion(mode):
        yield

"""A checkpoint gives back what was saved, bit for bit, and only the newest three are kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.checkpoint import open_checkpoints
from cnn_jax.errors import NoCheckpointError
from cnn_jax.model import CNN
from cnn_jax.training import create_train_state, make_keys, train_step

pytestmark = pytest.mark.optax_promotes


@pytest.fixture(scope="module")
def trained():
    state = create_train_state(make_keys(5)[0], CNN(), (28, 28, 1), 0.001)
    images = np.random.default_rng(0).integers(0, 256, (10, 28, 28, 1), np.uint8)
    with jax.numpy_dtype_promotion("standard"):
        return train_step(state, images, np.arange(10, dtype=np.int32))[0]


def test_what_was_saved_comes_back_with_the_same_bits(trained, tmp_path):
    losses = jnp.array([0.1, jnp.pi, 0], jnp.float32)
    with open_checkpoints(tmp_path / "steps", create=True) as checkpoints:
        checkpoints.save(1, trained, losses)
    blank = create_train_state(make_keys(6)[0], CNN(), (28, 28, 1), 0.001)
    with open_checkpoints(tmp_path / "steps", create=False) as checkpoints:
        restored = checkpoints.restore_latest(blank, jnp.zeros(3, jnp.float32))
    leaves = jax.tree.leaves(restored), jax.tree.leaves((trained, losses))
    # Six weights, the step, Adam's count and two moments of each weight, and the losses.
    assert len(leaves[0]) == 6 + 1 + 1 + 12 + 1
    for one, other in zip(*leaves, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_the_newest_three_are_kept(trained, tmp_path):
    with open_checkpoints(tmp_path, create=True) as checkpoints:
        assert checkpoints.latest_step() is None
        for step in (3, 6, 9, 12):
            checkpoints.save(step, trained, jnp.zeros(3, jnp.float32))
        assert checkpoints.latest_step() == 12
    assert sorted(int(folder.name) for folder in tmp_path.iterdir()) == [6, 9, 12]


def test_a_missing_or_empty_folder_has_no_checkpoint(trained, tmp_path):
    with pytest.raises(NoCheckpointError, match="nowhere holds no checkpoint; train the run first"):
        open_checkpoints(tmp_path / "nowhere", create=False).__enter__()
    with (
        open_checkpoints(tmp_path, create=True) as checkpoints,
        pytest.raises(NoCheckpointError, match="no checkpoint"),
    ):
        checkpoints.restore_latest(trained, jnp.zeros(3, jnp.float32))


def test_a_checkpoint_of_another_network_is_refused(trained, tmp_path):
    other = create_train_state(make_keys(5)[0], CNN(num_classes=7), (28, 28, 1), 0.001)
    with open_checkpoints(tmp_path, create=True) as checkpoints:
        checkpoints.save(1, trained, jnp.zeros(3, jnp.float32))
        complaint = r"the checkpoint of step 1 in .* cannot be read \(it holds other arrays: .*state\.params\.fc\.bias"
        with pytest.raises(NoCheckpointError, match=complaint):
            checkpoints.restore_latest(other, jnp.zeros(3, jnp.float32))

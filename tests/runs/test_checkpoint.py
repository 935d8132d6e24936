"""A checkpoint gives back what was saved, bit for bit, or is moved aside; only the newest three are kept."""

import errno
import os
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.core.model import CNN
from cnn_jax.core.recipes import tutorial
from cnn_jax.core.training import create_train_state, make_keys, train_step
from cnn_jax.runs.checkpoint import open_checkpoints
from cnn_jax.runtime.errors import NoCheckpointError, StorageError
from tests.helpers import assert_same_bits, damage_newest

pytestmark = [
    pytest.mark.optax_promotes,
    # Orbax, where it fails, leaves coroutines behind that it never waited for.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

LOSSES = jnp.array([0.1, jnp.pi, 0], jnp.float32)


@pytest.fixture(scope="module")
def trained():
    model, recipe = CNN(), tutorial(0.001)
    state = create_train_state(make_keys(5).init_key, model, (28, 28, 1), recipe)
    images = np.random.default_rng(0).integers(0, 256, (10, 28, 28, 1), np.uint8)
    with jax.numpy_dtype_promotion("standard"):
        return train_step(state, images, np.arange(10, dtype=np.int32), model=model, recipe=recipe)[0]


@pytest.fixture
def steps(tmp_path):
    return tmp_path / "steps"


def save(folder, state, *numbers):
    with open_checkpoints(folder, writing=True, warn=pytest.fail) as checkpoints:
        for number in numbers:
            checkpoints.save(number, state, LOSSES * number, {"note": number})


def restore(folder, state, *, writing=True):
    """The number of the step that is restored, or None, and what the user is told."""
    told = []
    with open_checkpoints(folder, writing=writing, warn=told.append) as checkpoints:
        restored = checkpoints.restore_latest(lambda meta: state)
    return restored and restored.meta["step"], told


def test_what_was_saved_comes_back_with_the_same_bits(trained, steps):
    save(steps, trained, 1)
    blank = create_train_state(make_keys(6)[0], CNN(), (28, 28, 1), tutorial(0.001))
    with open_checkpoints(steps, writing=False, warn=pytest.fail) as checkpoints:
        restored = checkpoints.restore_latest(lambda meta: blank)
    # Six weights, the step, Adam's count and two moments of each weight.
    assert len(jax.tree.leaves(restored.state)) == 6 + 1 + 1 + 12
    assert_same_bits((restored.state, restored.losses), (trained, LOSSES))
    assert restored.meta == {"schema": 4, "step": 1, "note": 1}


def test_the_newest_three_are_kept(trained, steps):
    save(steps, trained, 3, 6, 9, 12)
    with open_checkpoints(steps, writing=False, warn=pytest.fail) as checkpoints:
        assert checkpoints.latest_step() == 12
    assert sorted(int(folder.name) for folder in steps.iterdir()) == [6, 9, 12]


def test_an_empty_folder_has_nothing_to_restore_and_a_missing_one_is_refused(trained, tmp_path):
    assert restore(tmp_path, trained) == (None, [])
    with pytest.raises(NoCheckpointError, match="nowhere holds no checkpoint; train the run first"):
        restore(tmp_path / "nowhere", trained, writing=False)


def test_a_damaged_checkpoint_is_moved_aside_and_the_one_before_is_used(trained, steps, tmp_path):
    save(steps, trained, 1, 2)
    damage_newest(steps)
    step, told = restore(steps, trained)
    assert step == 1
    (line,) = told
    assert line.startswith("the checkpoint of step 2 is damaged (")
    assert line.endswith(f"; it is now {tmp_path / 'quarantine' / '2'}")
    assert (tmp_path / "quarantine" / "2" / "state").is_dir()
    # It is trained and saved again, and damaged again: both are kept.
    save(steps, trained, 2)
    damage_newest(steps)
    assert restore(steps, trained)[0] == 1
    assert sorted(path.name for path in (tmp_path / "quarantine").iterdir()) == ["2", "2-1"]


def test_what_a_kill_left_half_written_is_gone_as_soon_as_the_checkpoints_are_open_to_write(trained, steps):
    save(steps, trained, 1)
    begun = shutil.copytree(steps / "1", steps / "2.orbax-checkpoint-tmp")
    assert restore(steps, trained, writing=False) == (1, [])
    assert begun.is_dir()
    with open_checkpoints(steps, writing=True, warn=pytest.fail):
        assert not begun.exists()


def test_who_only_reads_moves_nothing(trained, steps, tmp_path):
    save(steps, trained, 1, 2)
    damage_newest(steps)
    step, (line,) = restore(steps, trained, writing=False)
    assert step == 1
    assert line.endswith("; it is left out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["steps"]
    assert sorted(path.name for path in steps.iterdir()) == ["1", "2"]


def test_who_reads_while_another_saves_gets_the_newest_and_takes_none_for_damaged(trained, steps):
    save(steps, trained, 1)
    with open_checkpoints(steps, writing=False, warn=pytest.fail) as checkpoints:
        save(steps, trained, 2, 3, 4, 5)  # which deletes the first
        assert checkpoints.restore_latest(lambda meta: trained).meta["step"] == 5

        def structure(meta):
            if meta["step"] == 5:  # all that were there are deleted while the newest is read
                save(steps, trained, 6, 7, 8)
            return trained

        assert checkpoints.restore_latest(structure).meta["step"] == 8


def test_what_a_full_disk_or_a_kill_leaves_half_written_is_removed(trained, steps, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save(steps, trained, 1)
    with monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.JsonCheckpointHandler.async_save", fail)
        with pytest.raises(StorageError, match="make room there"):
            save(steps, trained, 2)
    assert [path.name for path in steps.iterdir()] == ["1"]
    (steps / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    left = sorted(path.name for path in steps.iterdir())
    assert restore(steps, trained, writing=False) == (1, [])  # who only reads leaves it
    assert sorted(path.name for path in steps.iterdir()) == left
    save(steps, trained, 3)
    assert sorted(path.name for path in steps.iterdir()) == ["1", "3"]


def test_a_limit_of_the_size_of_files_is_named_as_the_cause(trained, steps):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(
            StorageError, match=r"\); allow larger files \(ulimit -f\), then run the same command again"
        ):
            save(steps, trained, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_without_a_sound_checkpoint_the_run_ends_with_3(trained, steps):
    save(steps, trained, 1)
    damage_newest(steps)
    for _ in range(2):  # now, and when the same command runs again
        with pytest.raises(
            NoCheckpointError, match=r"no checkpoint of .* is sound; .*quarantine; give another --run-name"
        ):
            restore(steps, trained)


def test_so_it_is_told_where_nothing_is_moved_away(trained, steps):
    save(steps, trained, 1)
    damage_newest(steps)
    with pytest.raises(NoCheckpointError, match=r"no checkpoint of .*steps is sound; give another --run-name"):
        restore(steps, trained, writing=False)
    assert [path.name for path in steps.iterdir()] == ["1"]
    assert [path.name for path in steps.parent.iterdir()] == [steps.name]


def test_a_stray_folder_named_like_a_step_does_no_harm(trained, steps, tmp_path):
    save(steps, trained, 1)
    (steps / "99").mkdir()
    (steps / "notes").mkdir()
    step, (line,) = restore(steps, trained)
    assert step == 1
    assert "the checkpoint of step 99 is damaged" in line
    save(steps, trained, 2)
    assert restore(steps, trained) == (2, [])


@pytest.mark.parametrize("made", [os.mkfifo, Path.touch, lambda path: path.symlink_to(path)])
def test_what_stands_where_a_step_is_saved_is_moved_aside_unopened(made, trained, steps):
    save(steps, trained, 1)
    made(steps / "2")
    told = []
    with open_checkpoints(steps, writing=True, warn=told.append) as checkpoints:
        checkpoints.save(2, trained, LOSSES, {"note": 2})
    (line,) = told
    assert "the checkpoint of step 2 is damaged (it is no folder); it is now " in line
    assert restore(steps, trained) == (2, [])
    assert os.path.lexists(steps.with_name("quarantine") / "2")


def test_a_checkpoint_copied_to_another_step_is_not_believed(trained, steps):
    save(steps, trained, 1)
    (steps / "1").rename(steps / "5")
    with pytest.raises(NoCheckpointError):
        restore(steps, trained)


def test_a_checkpoint_comes_back_in_its_own_shapes_and_another_networks_is_not_taken_for_damage(trained, steps):
    save(steps, trained, 1)
    other = create_train_state(make_keys(5)[0], CNN(num_classes=7), (28, 28, 1), tutorial(0.001))
    with open_checkpoints(steps, writing=True, warn=pytest.fail) as checkpoints:
        restored = checkpoints.restore_latest(lambda meta: other)
    assert_same_bits(restored.state, trained)


def test_a_checkpoint_without_the_arrays_that_it_says_it_has_is_damaged(trained, steps):
    save(steps, trained, 1)
    told = []
    with (
        open_checkpoints(steps, writing=True, warn=told.append) as checkpoints,
        pytest.raises(NoCheckpointError),
    ):
        checkpoints.restore_latest(lambda meta: trained._replace(ema_params=trained.params))
    assert "it holds other arrays: state.ema_params.fc.bias" in told[0]


def test_a_checkpoint_that_does_not_say_which_arrays_it_has_is_damaged(trained, steps):
    save(steps, trained, 1)
    (steps / "1" / "state" / "_METADATA").unlink()
    told = []
    with (
        open_checkpoints(steps, writing=True, warn=told.append) as checkpoints,
        pytest.raises(NoCheckpointError),
    ):
        checkpoints.restore_latest(lambda meta: trained)
    assert "is damaged (it does not say which arrays it holds)" in told[0]


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (RuntimeError("can't start new thread"), RuntimeError),
        (MemoryError(), MemoryError),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), StorageError),
        (ValueError("PERMISSION_DENIED: Error opening local file: Permission denied"), StorageError),
    ],
    ids=repr,
)
def test_what_the_machine_refuses_to_read_is_not_damaged(failure, expected, trained, steps):
    def fail(meta):
        raise failure

    save(steps, trained, 1, 2)
    with (
        open_checkpoints(steps, writing=True, warn=pytest.fail) as checkpoints,
        pytest.raises(expected, match=r"thread|^$|cannot read the checkpoint of step 2 .*limits"),
    ):
        checkpoints.restore_latest(fail)
    assert restore(steps, trained) == (2, [])


@pytest.mark.parametrize("then", ["moved", "removed", "replaced"])
def test_nothing_is_saved_where_the_folder_is_gone_or_another(then, steps, trained):
    with open_checkpoints(steps, writing=True, warn=pytest.fail) as checkpoints:
        checkpoints.save(1, trained, LOSSES, {})
        if then == "removed":
            shutil.rmtree(steps)
        else:
            steps.rename(steps.with_name("moved"))
        if then == "replaced":
            steps.mkdir()
        with pytest.raises(StorageError, match=r"steps is gone or another: .* moved, removed or replaced"):
            checkpoints.save(2, trained, LOSSES, {})
    assert [path.name for path in steps.parent.rglob("2")] == []

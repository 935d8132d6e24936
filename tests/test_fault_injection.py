"""A sample of `python -m tests.fault_injection`: what is killed, damaged or stopped ends in the same bits."""

import gc
import random
import shutil

import pytest

from tests.fault_injection import trials
from tests.fault_injection.runs import Trainer, run_fingerprint

# Orbax, where it fails, leaves coroutines behind that it never waited for.
orbax_leaves_coroutines = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
needs_a_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="builds a library that strikes a process")


@pytest.fixture(scope="module", autouse=True)
def other_tests_garbage():
    """The program collects garbage where a checkpoint is damaged: with all that other tests left, for a second each."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, small_mnist):
    data = tmp_path_factory.mktemp("fault-injection") / "data"
    data.symlink_to(small_mnist)
    return Trainer(data)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, trainer):
    folder = tmp_path_factory.mktemp("reference")
    assert trainer.finish(folder)[0] == 0
    return run_fingerprint(folder)


@pytest.fixture
def choose():
    return random.Random(0)


def test_runs_killed_at_any_time_end_in_the_same_bits(trainer, reference, choose):
    assert trials.random_kills(trainer, reference, kills=4, choose=choose, say=print).failures == []


def test_runs_stopped_by_signals_at_any_time_end_in_the_same_bits(trainer, reference, choose):
    assert trials.random_signals(trainer, reference, count=2, choose=choose, say=print).failures == []


def test_of_two_trainings_of_one_run_one_is_sent_away(trainer, reference):
    assert trials.two_writers(trainer, reference, count=1, say=print).failures == []


@needs_a_compiler
def test_a_save_may_be_killed_at_any_change_of_its_files():
    tally = trials.killed_saves(every=40, say=print)
    assert tally.failures == []
    assert tally.trials >= 3


@needs_a_compiler
def test_a_save_may_find_the_disk_full_at_any_change_of_its_files():
    tally = trials.full_disk(every=40, say=print)
    assert tally.failures == []
    assert tally.trials >= 3


@orbax_leaves_coroutines
def test_no_damaged_file_of_a_checkpoint_is_ever_used(choose):
    tally = trials.damaged_checkpoints(flips=2, choose=choose, say=print)
    assert tally.failures == []
    assert tally.trials > 80


@orbax_leaves_coroutines
def test_without_the_digest_damage_passes(choose, monkeypatch):
    monkeypatch.setattr("cnn_jax.runs.checkpoint.digest", lambda tree, meta: "")
    tally = trials.damaged_checkpoints(flips=4, choose=choose, say=print)
    assert tally.counts["silent changes"] > 0

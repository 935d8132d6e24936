"""A sample of `python -m tests.fault_injection`: a run that is killed, damaged or stopped ends in the same bits."""

import dataclasses
import random
import shutil

import pytest

from tests.fault_injection import trials
from tests.fault_injection.runs import Trainer, run_fingerprint
from tests.helpers import TRAIN

pytestmark = pytest.mark.slow

# When Orbax fails, it leaves coroutines behind that it never awaited.
orbax_leaves_coroutines = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
needs_a_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="builds a library that injects faults")


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, small_mnist):
    data = tmp_path_factory.mktemp("fault-injection") / "data"
    data.symlink_to(small_mnist)
    # Shorter, without its report and with a smaller network: together that is most of a run.
    return Trainer(data, epochs=2, program=(*TRAIN, "--features", "4", "8"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory, trainer):
    folder = tmp_path_factory.mktemp("reference")
    assert trainer.finish(folder)[0] == 0
    return run_fingerprint(folder)


FIRST_AT_A_SAVE = 1  # the seed of kills of which the first is aimed at a save, however fast the machine


@pytest.fixture
def rng():
    return random.Random(0)


def test_runs_killed_at_any_time_end_in_the_same_bits(trainer, reference):
    tally = trials.random_kills(trainer, reference, kills=2, rng=random.Random(FIRST_AT_A_SAVE))
    assert tally.failures == []
    assert tally.counts["after a checkpoint"] >= 1


@pytest.mark.parametrize("several", [{"seeds": 3}, {"processes": 2}], ids=["seeds", "processes"])
def test_so_do_those_of_several_seeds_and_of_several_processes(several, trainer, tmp_path):
    trainer = dataclasses.replace(trainer, **several)
    assert trainer.finish(tmp_path)[0] == 0
    tally = trials.random_kills(trainer, run_fingerprint(tmp_path), kills=1, rng=random.Random(FIRST_AT_A_SAVE))
    assert tally.failures == []
    assert tally.counts["runs compared"] >= 1
    assert tally.counts["after a checkpoint"] == 1


def test_runs_stopped_by_signals_at_any_time_end_in_the_same_bits(trainer, reference, rng):
    assert trials.random_signals(trainer, reference, count=2, rng=rng).failures == []


def test_of_two_trainings_of_one_run_one_is_sent_away(trainer, reference):
    assert trials.two_writers(trainer, reference, count=1).failures == []


@needs_a_compiler
def test_a_save_may_be_killed_at_any_change_of_its_files():
    tally = trials.killed_saves(every=40)
    assert tally.failures == []
    assert tally.trials >= 3


@needs_a_compiler
def test_a_save_may_find_the_disk_full_at_any_change_of_its_files():
    tally = trials.full_disk(every=40)
    assert tally.failures == []
    assert tally.trials >= 3


@orbax_leaves_coroutines
def test_no_damaged_file_of_a_checkpoint_is_ever_used(rng):
    tally = trials.damaged_checkpoints(flips=2, rng=rng)
    assert tally.failures == []
    assert tally.trials > 80


@orbax_leaves_coroutines
def test_without_the_digest_damage_passes(rng, monkeypatch):
    monkeypatch.setattr("cnn_jax.runs.checkpoint.digest", lambda tree, meta: "")
    tally = trials.damaged_checkpoints(flips=4, rng=rng)
    assert tally.counts["silent changes"] > 0

"""Every kind of trial with its arguments, and the trials of programs with one thing broken, which must fail."""

import argparse
import functools
import random
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from cnn_jax.runs import checkpoint
from tests.fault_injection import trials
from tests.fault_injection.mutants import MUTANTS, digest_off
from tests.fault_injection.runs import Trainer

# Enough that some of them kill a run which has a checkpoint. Any other run starts anew, whether the program is broken
# or not.
CONTROL_KILLS = 12

Trial = Callable[[], trials.Tally]


def all_trials(arguments: argparse.Namespace, references: dict[Trainer, str]) -> list[Trial]:
    """Return every kind of trial, the longest ones first.

    Args:
      arguments: The command line's.
      references: The fingerprint of an uninterrupted run of each kind of training, the plain one first.
    """

    def rng(kind: str) -> random.Random:
        # One generator per kind, so that what is drawn does not depend on what else runs.
        return random.Random(f"{arguments.seed} {kind}")

    a, partial = arguments, functools.partial
    plain, *others = ({"trainer": trainer, "reference": reference} for trainer, reference in references.items())
    # Each other kind of training gets a fifth of the kills.
    kills = [(plain, a.kills - len(others) * (a.kills // 5)), *((other, a.kills // 5) for other in others)]
    on_runs = plain
    return [
        *(
            partial(trials.random_kills, **of, kills=count, rng=rng(f"kills {i}" if i else "kills"))
            for i, (of, count) in enumerate(kills)
        ),
        partial(trials.random_signals, **on_runs, count=a.signals, rng=rng("signals")),
        partial(trials.damaged_data, flips=a.flips, rng=rng("data")),
        partial(trials.killed_saves, every=a.every),
        partial(trials.full_disk, every=a.every),
        partial(trials.full_disk_runs, **on_runs, count=a.full_disks, rng=rng("full disk of a training")),
        partial(trials.two_writers, **on_runs, count=a.races),
        partial(trials.killed_preparations, count=a.preparations, rng=rng("preparations")),
        partial(trials.damaged_checkpoints, flips=a.flips, rng=rng("checkpoints")),
        partial(trials.fuzz, examples=a.examples),
    ]


def negative_controls(arguments: argparse.Namespace, data: Path, reference: str) -> list[Trial]:
    """Return a trial of each program with one thing broken; the arguments are those of `all_trials`."""
    return [
        functools.partial(_try_mutant, name, data, reference, random.Random(f"{arguments.seed} {name}"))
        for name in MUTANTS
    ]


def _try_mutant(name: str, data: Path, reference: str, rng: random.Random) -> trials.Tally:
    if MUTANTS[name] is digest_off:
        with mock.patch.object(checkpoint, "digest"):  # puts it back
            digest_off()
            tally = trials.damaged_checkpoints(flips=20, rng=rng)
    else:
        tally = trials.random_kills(Trainer(data, name), reference, kills=CONTROL_KILLS, rng=rng)
    tally.name = f"{name}: {tally.name}"
    return tally

"""Every kind of trial by its name, and the programs with one thing broken, which must fail."""

import argparse
import dataclasses
import random
from pathlib import Path
from unittest import mock

from cnn_jax.runs import checkpoint
from cnn_jax.runtime.display import Display
from tests.fault_injection import trials
from tests.fault_injection.mutants import digest_off
from tests.fault_injection.runs import Trainer

# So many that some of them meet a run with a checkpoint: one killed before its first one starts anew, broken or not.
CONTROL_KILLS = 12


@dataclasses.dataclass(frozen=True)
class FaultInjection:
    """What every kind of trial needs.

    Attributes:
      arguments: Of the command line.
      data: A folder of four IDX files.
      reference: The fingerprint of the run that nothing interrupted.
    """

    arguments: argparse.Namespace
    data: Path
    reference: str

    def run(self, kind: str) -> trials.Tally:
        """Do one kind of trial."""
        # Each kind draws from numbers of its own: what is chosen does not depend on what else runs.
        choose = random.Random(f"{self.arguments.seed} {kind}")
        return KINDS[kind](self.arguments, Trainer(self.data), self.reference, choose, Display().say)

    def run_broken(self, name: str) -> trials.Tally:
        """Inject faults into the program with one thing broken: this must fail."""
        choose, say = random.Random(f"{self.arguments.seed} {name}"), Display().say
        if name == "digest off":
            with mock.patch.object(checkpoint, "digest"):  # puts it back
                digest_off()
                tally = trials.damaged_checkpoints(flips=20, choose=choose, say=say)
        else:
            tally = trials.random_kills(
                Trainer(self.data, name), self.reference, kills=CONTROL_KILLS, choose=choose, say=say
            )
        tally.name = f"{name}: {tally.name}"
        return tally


# The longest ones first.
KINDS = {
    "kills": lambda a, trainer, reference, choose, say: trials.random_kills(
        trainer, reference, kills=a.kills, choose=choose, say=say
    ),
    "signals": lambda a, trainer, reference, choose, say: trials.random_signals(
        trainer, reference, count=a.signals, choose=choose, say=say
    ),
    "data": lambda a, trainer, reference, choose, say: trials.damaged_data(flips=a.flips, choose=choose, say=say),
    "saves killed": lambda a, trainer, reference, choose, say: trials.killed_saves(every=a.every, say=say),
    "full disk": lambda a, trainer, reference, choose, say: trials.full_disk(every=a.every, say=say),
    "full disk of a training": lambda a, trainer, reference, choose, say: trials.full_disk_runs(
        trainer, reference, count=a.full_disks, choose=choose, say=say
    ),
    "races": lambda a, trainer, reference, choose, say: trials.two_writers(trainer, reference, count=a.races, say=say),
    "preparations": lambda a, trainer, reference, choose, say: trials.killed_preparations(
        count=a.preparations, choose=choose, say=say
    ),
    "checkpoints": lambda a, trainer, reference, choose, say: trials.damaged_checkpoints(
        flips=a.flips, choose=choose, say=say
    ),
    "fuzz": lambda a, trainer, reference, choose, say: trials.fuzz(examples=a.examples, say=say),
}

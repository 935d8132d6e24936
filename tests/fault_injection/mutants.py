"""The program with one thing broken on purpose: `python -m tests.fault_injection.mutants NAME COMMAND ...`.

Fault injection proves nothing if one of these passes it.
"""

import sys

import jax

from cnn_jax.cli.commands import main
from cnn_jax.runs import checkpoint, program
from cnn_jax.runtime.signals import end_on_signals


def digest_off() -> None:
    """Accept every checkpoint unchecked."""
    checkpoint.digest = lambda tree, meta: ""


def optimizer_left_out() -> None:
    """Reset Adam's moments and count whenever a run continues."""
    read = checkpoint.Checkpoints._read

    def read_without_optimizer(self, step, structure):
        restored = read(self, step, structure)
        blank = jax.tree.map(lambda leaf: leaf * 0, restored.state.opt_state)
        return restored._replace(state=restored.state._replace(opt_state=blank))

    checkpoint.Checkpoints._read = read_without_optimizer


def epoch_left_out() -> None:
    """Give every epoch the same batches."""
    seeds_epoch = program.seeds_epoch
    program.seeds_epoch = lambda seeds, epoch, **sizes: seeds_epoch(seeds, 0, **sizes)


MUTANTS = {"digest off": digest_off, "optimizer left out": optimizer_left_out, "epoch left out": epoch_left_out}

if __name__ == "__main__":
    MUTANTS[sys.argv[1]]()
    end_on_signals()
    main(sys.argv[2:])

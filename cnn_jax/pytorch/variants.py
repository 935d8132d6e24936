"""A training step in every form that is compared, and the process that runs steps of one form when it is told to."""

import contextlib
import json
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from cnn_jax.data.dataset import Dataset, load_dataset

BATCH_SIZE = 100

# What makes torch forms; `cnn_jax.pytorch.tutorial.make_step` describes each.
TORCH_FORMS = {
    "PyTorch, eager": "eager",
    "PyTorch, channels_last": "channels_last",
    "PyTorch, channels_last, memory kept": "channels_last",
    "PyTorch, bfloat16 autocast": "bfloat16",
    "PyTorch, torch.compile": "compiled",
    "PyTorch, CUDA graph": "cuda_graph",
}
LOOP_AS_WRITTEN = "the tutorial's loop as written"
PLAIN_FLAX = "plain Flax model"
# The operands' dtype, and how many seeds are trained in one program.
OUR_FORMS = {
    "cnn-jax, float32": ("float32", 1),
    "cnn-jax, bfloat16": ("bfloat16", 1),
    "cnn-jax, one of 8 seeds": ("float32", 8),
}
FORMS = (LOOP_AS_WRITTEN, *TORCH_FORMS, PLAIN_FLAX, *OUR_FORMS)

# glibc gives the memory of large arrays back to the system at every step and faults it in again at the next. Told to
# keep it, as PyTorch's tuning guide advises by way of another allocator, channels_last takes 20 ms a step, not 25.
ENVIRONMENT = {
    "PyTorch, channels_last, memory kept": {
        "MALLOC_TRIM_THRESHOLD_": str(2**32),
        "MALLOC_MMAP_THRESHOLD_": str(2**25),
    }
}

Run = Callable[[int], None]


def is_torch(form: str) -> bool:
    """Whether a form is PyTorch's."""
    return form == LOOP_AS_WRITTEN or form in TORCH_FORMS


def make_form(form: str, dataset: Dataset) -> Run:
    """Return a function that runs a number of a form's steps to their end, going on in the data where it stopped.

    Args:
      form: One of `FORMS`.
      dataset: MNIST.

    Raises:
      Exception: of whatever kind, where this machine lacks what the form needs: a compiler, a GPU.
    """
    # Imported here: a process that measures one framework has not loaded the other.
    if is_torch(form):
        from cnn_jax.pytorch.tutorial import make_loop, make_loop_as_written

        if form == LOOP_AS_WRITTEN:
            return make_loop_as_written(dataset, BATCH_SIZE)
        return make_loop(dataset, TORCH_FORMS[form], BATCH_SIZE)
    from cnn_jax.pytorch.jax_loops import make_compiled_loop, make_plain_loop

    if form == PLAIN_FLAX:
        return make_plain_loop(dataset, BATCH_SIZE)
    dtype, seeds = OUR_FORMS[form]
    return make_compiled_loop(dataset, dtype, BATCH_SIZE, seeds)


def serve(form: str, data_dir: str | None) -> None:
    """Run a form's steps: what a process that `benchmark` starts does.

    Prints, each as a line of JSON, how it started (`import_seconds`, `load_seconds`, `first_step_seconds`), or the
    `error` that kept it from starting; then, for each number read from stdin, the `milliseconds` a step of so many
    steps and the process's `peak_bytes` until then.
    """
    # A terminal's Ctrl-C reaches every process: the one that asks ends, and with it the pipe that this one reads.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the answers
        begin = time.perf_counter()
        __import__("torch" if is_torch(form) else "cnn_jax.runs.train")
        imported = time.perf_counter()
        dataset = load_dataset("mnist", None, data_dir and Path(data_dir))
        loaded = time.perf_counter()
        try:
            run = make_form(form, dataset)
            run(1)
        except Exception as error:  # torch.compile needs a C++ compiler, a CUDA graph its driver: others still count
            failure = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        else:
            failure = None
        stepped = time.perf_counter()
    if failure is not None:
        _answer(error=failure)
        return
    _answer(import_seconds=imported - begin, load_seconds=loaded - imported, first_step_seconds=stepped - loaded)
    for line in sys.stdin:
        steps = int(line)
        run(8)  # wakes the threads up and fills the caches
        start = time.perf_counter()
        run(steps)
        _answer(milliseconds=1e3 * (time.perf_counter() - start) / steps, peak_bytes=_peak_bytes())


def _answer(**values):
    print(json.dumps(values), flush=True)


def _peak_bytes():
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: on Linux its peak includes that of the process which started this one.
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS

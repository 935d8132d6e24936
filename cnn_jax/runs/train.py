"""A run: load, compile, restore, then train epoch by epoch, test and save; read it downwards."""

import contextlib
import dataclasses
import itertools
import logging
import signal
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from cnn_jax import __version__
from cnn_jax.core.evaluation import Evaluation
from cnn_jax.core.input_pipeline import Chunk, Feed, resident, streamed
from cnn_jax.core.sharding import SEEDS, make_mesh, shard, to_host
from cnn_jax.core.training import loop_steps
from cnn_jax.data.dataset import Dataset, hold_out
from cnn_jax.runs.checkpoint import Checkpoints, Restored, open_checkpoints
from cnn_jax.runs.folder import EpochMetrics, RunFolder, deciding_settings
from cnn_jax.runs.program import (
    Program,
    Progress,
    Sizes,
    TestSet,
    check_resources,
    compile_program,
    compile_soon,
    evaluate_seeds,
    make_program,
    shard_test_set,
    start_states,
    takes_any_arguments,
)
from cnn_jax.runs.restore import (
    TrainedRun,
    describe_run,
    differing_settings,
    evaluate_as_tutorial,
    evaluate_trained,
    load_run_data,
    recorded_metrics,
    restore_latest,
    streams,
    usable_states,
)
from cnn_jax.runs.settings import TrainSettings
from cnn_jax.runs.summary import Result, epoch_metrics, introduce, show_epoch, show_segment
from cnn_jax.runtime.devices import describe_devices, device_bytes, start_devices
from cnn_jax.runtime.display import Display, Stopwatch
from cnn_jax.runtime.distributed import all_gather, is_process_0, joined, may_wait, on_process_0, require_agreement
from cnn_jax.runtime.errors import NonFiniteLossError, StopSignalError, UsageError, text_of
from cnn_jax.runtime.signals import StopRequest, listen_for_stop

# The steps of a segment take about this long. After each, the bar moves and a signal is answered.
SEGMENT_SECONDS = 0.7
FIRST_SEGMENT_STEPS = 5

# The settings that may differ from process to process.
PER_PROCESS = (
    "coordinator", "process_id", "dataset_dir", "data_dir", "checkpoint_dir", "platform", "log_level", "profile",
)  # fmt: skip

log = logging.getLogger(__name__)


class Run(NamedTuple):
    """A run's folder, held by this process, and what a person sees of the run.

    Attributes:
      folder: Its files.
      display: What is shown; nothing in any process but the first.
      clock: Where the time goes.
      warn: Tells of what is damaged or changed, also where no progress is shown.
    """

    folder: RunFolder
    display: Display
    clock: Stopwatch
    warn: Callable[[str], None]


@contextlib.contextmanager
def open_run(settings: TrainSettings, *, alone: bool = True) -> Iterator[Run]:
    """Start the devices and hold a run's folder until the block ends; a dry run holds nothing and writes nothing.

    Args:
      settings: The run's.
      alone: Whether this process trains nothing else: it joins the run's other processes then, and shows the progress.

    Raises:
      UsageError: there are no such devices.
      RunLockedError: another process is writing the run.
    """
    clock, folder = Stopwatch(), RunFolder(settings.run_folder)
    with contextlib.ExitStack() as held:
        with clock.part("loading"):
            if alone:
                held.enter_context(joined(settings.coordinator, settings.num_processes, settings.process_id))
            start_devices(settings.platform, keep_compiled=not settings.dry_run)
        decided = {**vars(settings), **deciding_settings(settings)}
        require_agreement({name: value for name, value in decided.items() if name not in PER_PROCESS}, "settings")
        display = Display(shown=alone and is_process_0())
        if not settings.dry_run:
            on_process_0(_take_over, folder, settings.fresh, held, display)
        yield Run(folder, display, clock, warn=display.say if alone else Display().say)


def _take_over(folder: RunFolder, fresh: bool, held: contextlib.ExitStack, display: Display) -> None:
    """Lock the run's folder until `held` ends; move an earlier run in it aside if this one is to be fresh."""
    held.enter_context(folder.locked())
    if fresh and (aside := folder.move_aside()):
        display.say(f"the earlier run is now {aside}")
        held.enter_context(folder.locked())


class Segment(NamedTuple):
    """A few steps that were run at once.

    Attributes:
      progress: How far the run has come with them.
      seconds: How long they took, with the wait for their images.
    """

    progress: Progress
    seconds: float


def train_run(settings: TrainSettings, run: Run) -> Result | None:
    """Train a run, or continue it, to its last step, and test it there; return None for a dry run.

    Raises:
      CnnJaxError: the data, a checkpoint or the disk cannot be used, or the loss is not finite.
      StopSignalError: the run was asked to stop, and was saved.
    """
    display, clock, save_every = run.display, run.clock, settings.checkpoint_every_steps
    with clock.part("loading"):
        dataset = load_run_data(settings)
    sizes = Sizes.of(dataset, settings)
    program = fitting_program(settings, sizes, dataset)
    require_agreement(program.streams, "room for the images (give all of them --feed stream or --feed resident)")
    with contextlib.ExitStack() as held:
        checkpoints = held.enter_context(open_run_checkpoints(settings, run))
        with clock.part("loading"):
            meta = describe_run(settings, dataset)
            require_agreement(meta["data"], "data")
            meta = on_process_0(dict, meta)  # a folder's path may differ from host to host
            saved = restore_saved(settings, run, sizes, program, checkpoints, meta)
        display.say(f"cnn-jax {__version__}, jax {jax.__version__} on {describe_devices()}")
        introduce(settings, dataset, program, display)
        if settings.dry_run:
            display.say("dry run: nothing was trained or written")
            return None
        assert checkpoints is not None, "only a dry run may have none"
        on_process_0(run.folder.write_settings, settings)
        with clock.part("loading"):
            feed, epoch_test_set = place_data(settings, dataset, program)
        progress, metrics = restore_progress(settings, run, program, saved, meta)
        first_step = progress.step
        if first_step < program.last_step:
            stop = held.enter_context(listen_for_stop(may_wait))
            held.enter_context(display.progress(total_steps=program.last_step, steps_done=first_step))
            write_scalars = held.enter_context(scalars(settings, run.folder, after_step=first_step))
            with clock.part("compiling"):
                program, chunk = first_chunk(program, feed)
                states, memory = progress.states, device_bytes()
                program = compile_program(program, settings, sizes, states, chunk, epoch_test_set, memory)
            calls = itertools.count(1)
            if settings.profile is not None:
                program = program._replace(run_steps=profiled(program.run_steps, calls, settings.profile, display))
            while progress.step < program.last_step:
                begin, end, seconds = progress.step, program.end_of_epoch(progress.step), 0.0
                for segment in train_epoch(program, feed, progress, stop, save_every):
                    progress, seconds = segment.progress, seconds + segment.seconds
                    require_finite(settings, program, progress)
                    show_segment(display, settings, program, progress, begin, seconds)
                    if save_every is not None and progress.step % save_every == 0 and progress.step < end:
                        save(checkpoints, progress, metrics, meta, clock)
                if progress.step < end:
                    stop_run(stop, program, checkpoints, progress, metrics, meta, clock)
                clock.seconds["training"] += seconds
                with clock.part("testing"):
                    tests = evaluate_seeds(program, progress.states, epoch_test_set)
                    require_finite(settings, program, progress, tests)
                compile_seconds = clock.seconds["compiling"] if begin == first_step else 0.0
                metrics.append(epoch_metrics(settings, program, progress, tests, begin, seconds, compile_seconds))
                with clock.part("saving"):
                    on_process_0(run.folder.write_metrics, metrics)
                save(checkpoints, progress, metrics, meta, clock)
                write_scalars(metrics[-1])
                show_epoch(display, program, metrics[-1])
            if settings.profile is not None and next(calls) == 2:
                display.say("no trace was written: the training was over with its first segment of steps")
    trained = TrainedRun(settings, program, to_host(progress.states), dataset, metrics, meta)
    with clock.part("testing"):
        # Without a validation set, the last epoch's test was this one.
        tested = settings.validation is None and metrics
        accuracies = metrics[-1].accuracy if tested else [test.accuracy for test in evaluate_trained(trained)]
        unscaled = evaluate_as_tutorial(trained)
    return Result(trained, accuracies, unscaled, trained_here=first_step < program.last_step)


def fitting_program(settings: TrainSettings, sizes: Sizes, dataset: Dataset) -> Program:
    """Return a run's program for the devices that are here; raises UsageError where it does not fit them."""
    mesh, memory = make_mesh(settings.seeds, jax.devices()), device_bytes()
    check_resources(settings, sizes, mesh, memory)
    return make_program(settings, sizes, mesh, streams=streams(settings, dataset.train_images.nbytes, memory))


def first_chunk(program: Program, feed: Feed) -> tuple[Program, Chunk]:
    """Return a program with its `epoch` compiled, and its first chunk, for whose shapes the rest is compiled."""
    program = program._replace(epoch=compile_soon(program, program.epoch, np.int32(0)))
    return program, next(feed(program.epoch(np.int32(0)), 0))


@dataclasses.dataclass(eq=False)
class Member:
    """One of several runs that train together.

    Attributes:
      settings: Its own.
      run: Its folder.
      program: What trains it alone.
      checkpoints: Its own.
      meta: What they record.
      progress: How far it has come, its states on the host.
      metrics: Those of the epochs behind it.
      trains: Whether it is to train further.
      failure: Why it cannot.
    """

    settings: TrainSettings
    run: Run
    program: Program
    checkpoints: Checkpoints
    meta: dict
    progress: Progress
    metrics: list[EpochMetrics]
    trains: bool = True
    failure: NonFiniteLossError | None = None


def train_together(
    every: Sequence[TrainSettings],
    dataset: Dataset,
    judge: Callable[[dict[int, list[EpochMetrics]]], Collection[int]],
) -> list[list[EpochMetrics] | NonFiniteLossError]:
    """Train runs that differ in their recipe's arguments alone, by epochs: at once on an accelerator, else in turn.

    Each keeps its own folder, as if it were trained alone, and continues from there. In turn, each has the program, and
    so the bits, that it has alone. So it is, too, where the recipe asks for an argument before the program runs.

    Args:
      every: Their settings.
      dataset: Their data.
      judge: Takes the epochs so far of each run that has some to come, by its index, whenever all of them have ended
        one more; returns the indices of those that are to train further.

    Returns:
      Of each run its epochs, or why its loss is not finite.

    Raises:
      CnnJaxError: as `train_run` does.
      StopSignalError: they were asked to stop, and were saved.
    """
    sizes, clock, meta = Sizes.of(dataset, every[0]), Stopwatch(), describe_run(every[0], dataset)
    with contextlib.ExitStack() as held:
        members = [held.enter_context(_open_member(settings, sizes, dataset, meta)) for settings in every]
        at_once = len(members) if trains_at_once(members[0], sizes) else 1
        steps = members[0].program.last_step
        stop = held.enter_context(listen_for_stop(may_wait))
        group: list[Member] = []
        programs: dict[tuple[int, ...], Program] = {}
        data_on: dict[Mesh, tuple[Feed, TestSet]] = {}
        while going := [member for member in members if member.trains and member.progress.step < steps]:
            step = min(member.progress.step for member in going)
            wanted = [member for member in going if member.progress.step == step][:at_once]
            # Those that have ended keep their places in a compiled program until they fill half of it.
            if any(member not in group for member in wanted) or 2 * len(wanted) <= len(group):
                group = wanted
            indices = tuple(map(members.index, group))
            if indices not in programs:
                with clock.part("compiling"):
                    programs[indices] = _compile_group(group, sizes, dataset, data_on)
            program = programs[indices]
            _train_members(group, wanted, program, *data_on[program.mesh], stop, clock)
            left = {i: member for i, member in enumerate(members) if member in going and member.trains}
            end = program.end_of_epoch(step)
            if end < steps and all(member.progress.step == end for member in left.values()):
                stay = judge({i: member.metrics for i, member in left.items()})
                for i, member in left.items():
                    member.trains = i in stay
        if stop.signal_number is not None:  # it came after the last segment
            first = members[0]
            stop_run(stop, first.program, first.checkpoints, first.progress, first.metrics, first.meta, clock)
    return [member.failure or member.metrics for member in members]


def trains_at_once(member: Member, sizes: Sizes) -> bool:
    """Whether runs like this one train at once: on accelerators, where the recipe can be made of traced arguments."""
    return member.program.platform != "cpu" and takes_any_arguments(member.settings, member.program, sizes)


@contextlib.contextmanager
def _open_member(settings: TrainSettings, sizes: Sizes, dataset: Dataset, meta: dict) -> Iterator[Member]:
    """Hold a run's folder and checkpoints until the block ends, and restore what is there.

    `meta` describes a run that differs in its recipe's arguments alone.
    """
    with open_run(settings, alone=False) as run, open_run_checkpoints(settings, run) as checkpoints:
        assert checkpoints is not None, "no such run is a dry run"
        program, meta = fitting_program(settings, sizes, dataset), meta | {"settings": deciding_settings(settings)}
        saved = restore_saved(settings, run, sizes, program, checkpoints, meta)
        run.folder.write_settings(settings)
        progress, metrics = restore_progress(settings, run, program, saved, meta)
        progress = progress._replace(states=to_host(progress.states))
        yield Member(settings, run, program, checkpoints, meta, progress, metrics)


def _join(group: Sequence[Member], mesh: Mesh) -> Progress:
    """Return the progress of the members together, on the devices; those that have ended are behind."""
    states = jax.tree.map(lambda *leaves: np.concatenate(leaves), *(member.progress.states for member in group))
    losses = np.concatenate([member.progress.losses for member in group])
    return Progress(max(member.progress.step for member in group), shard(states, mesh, P(SEEDS)), losses)


def _compile_group(
    group: Sequence[Member], sizes: Sizes, dataset: Dataset, data_on: dict[Mesh, tuple[Feed, TestSet]]
) -> Program:
    """Return what trains the members at once, compiled, and place the data for it if they are not there."""
    first, arguments = group[0], None
    program, settings = first.program, first.settings
    if len(group) > 1:
        mesh = make_mesh(len(group) * settings.seeds, jax.devices())
        check_resources(settings, sizes, mesh, device_bytes(), together=len(group))
        arguments = tuple(member.settings.recipe_arguments for member in group)
        program = make_program(settings, sizes, mesh, streams=program.streams, arguments=arguments)
    if program.mesh not in data_on:
        data_on[program.mesh] = place_data(settings, dataset, program)
    feed, test_set = data_on[program.mesh]
    program, chunk = first_chunk(program, feed)
    states = _join(group, program.mesh).states
    return compile_program(program, settings, sizes, states, chunk, test_set, device_bytes(), arguments)


def _train_members(
    group: Sequence[Member],
    wanted: Sequence[Member],
    program: Program,
    feed: Feed,
    test_set: TestSet,
    stop: StopRequest,
    clock: Stopwatch,
) -> None:
    """Train a group to the end of the epoch in progress, and write down and save what the wanted of them came to.

    Raises:
      StopSignalError: they were asked to stop, and were saved.
    """
    progress, seconds, count = _join(group, program.mesh), 0.0, group[0].settings.seeds
    begin = progress.step
    for segment in train_epoch(program, feed, progress, stop, None):
        progress, seconds = segment.progress, seconds + segment.seconds
    is_done = progress.step == program.end_of_epoch(begin)
    tests = evaluate_seeds(program, progress.states, test_set) if is_done else []
    states, compile_seconds = to_host(progress.states), clock.seconds.pop("compiling", 0.0)
    for i, member in enumerate(group):
        if member not in wanted:
            continue
        rows = slice(i * count, (i + 1) * count)
        its_states = jax.tree.map(lambda leaf, rows=rows: leaf[rows], states)
        its_own = Progress(progress.step, its_states, progress.losses[rows])
        try:
            require_finite(member.settings, program, its_own, tests[rows])
        except NonFiniteLossError as error:
            member.trains, member.failure = False, error
            continue
        member.progress = its_own
        if is_done:
            measured = begin, seconds, compile_seconds
            member.metrics.append(epoch_metrics(member.settings, program, its_own, tests[rows], *measured))
            member.run.folder.write_metrics(member.metrics)
        if its_own.step > begin:
            save(member.checkpoints, its_own, member.metrics, member.meta, clock)
    if not is_done:
        first = wanted[0]
        stop_run(stop, program, first.checkpoints, first.progress, first.metrics, first.meta, clock)


def train_epoch(
    program: Program, feed: Feed, progress: Progress, stop: StopRequest, save_every: int | None
) -> Iterator[Segment]:
    """Train to the end of the epoch in progress, or until a process was asked to stop.

    Args:
      program: The run's.
      feed: Its images.
      progress: Where it is; its buffers are reused.
      stop: Whether this process was asked to stop, then whether any was.
      save_every: A segment ends at each multiple of so many steps; None for none.

    Yields:
      Each segment of steps, when it is done.
    """
    epoch, first = divmod(progress.step, program.steps_per_epoch)
    end = program.end_of_epoch(progress.step) - epoch * program.steps_per_epoch
    step, states, losses = progress
    if first == 0:
        losses = np.zeros_like(losses)
    length, begin = FIRST_SEGMENT_STEPS, time.perf_counter()
    for chunk in feed(program.epoch(np.int32(epoch)), first):
        while first < min(chunk.stop, end):
            limit = min(chunk.stop, end) - first
            if save_every is not None:
                limit = min(limit, save_every - step % save_every)
            if program.platform != "cpu":
                length = loop_steps(chunk.epoch.batches.shape[1])
            length = agree_on_length(min(length, limit), stop)
            if length == 0:
                return
            rows = slice(first - chunk.first, first - chunk.first + length)
            states, all_losses = program.run_steps(states, *chunk[:3], np.int32(rows.start), np.int32(rows.stop))
            losses[:, first : first + length] = to_host(all_losses)[:, rows]
            seconds = time.perf_counter() - begin
            first, step = first + length, step + length
            yield Segment(Progress(step, states, losses), seconds)
            begin = time.perf_counter()
            length = max(1, round(length * SEGMENT_SECONDS / seconds))
        if first == end:
            return


def agree_on_length(length: int, stop: StopRequest) -> int:
    """Return how many steps to take next, the same in every process; 0 where any was asked to stop."""
    signals, lengths = all_gather(stop.signal_number or 0, length).T
    if signals.any():
        stop.signal_number = int(signals.max())
        return 0
    return int(lengths[0])


def require_finite(
    settings: TrainSettings, program: Program, progress: Progress, tests: Sequence[Evaluation] = ()
) -> None:
    """Refuse to go on with, test, write down or save weights that the last steps have spoiled.

    Args:
      settings: The run's.
      program: The run's.
      progress: Where it is.
      tests: What its seeds' networks come to there, where they have been tested.

    Raises:
      NonFiniteLossError: naming the step of the epoch in progress whose loss is not finite, or the tests.
    """
    epoch, last = divmod(progress.step - 1, program.steps_per_epoch)
    losses = progress.losses[:, : last + 1]
    remedy = "the newest checkpoint is from before; lower --learning-rate"
    if not np.isfinite(losses).all():
        i, seed = np.argwhere(~np.isfinite(losses.T))[0]
        of_seed = f" of seed {settings.seed + seed}" if len(losses) > 1 else ""
        step = epoch * program.steps_per_epoch + i + 1
        raise NonFiniteLossError(f"the loss of step {step:,}{of_seed} is {losses[seed, i]}; {remedy}")
    if not np.isfinite([test.loss for test in tests]).all():
        raise NonFiniteLossError(f"the loss of the tested images is not finite after step {progress.step:,}; {remedy}")


def place_data(settings: TrainSettings, dataset: Dataset, program: Program) -> tuple[Feed, TestSet]:
    """Return the images to train on and the set to test on after each epoch: the validation set, if there is one."""
    train_set, images, labels = dataset, dataset.test_images, dataset.test_labels
    if settings.validation is not None:
        train_set, images, labels = hold_out(dataset, settings.validation)
    place = streamed if program.streams else resident
    log.info("mesh %s, images %s", dict(program.mesh.shape), place.__name__)
    return place(train_set, program.mesh), shard_test_set(images, labels, program.mesh)


def open_run_checkpoints(settings: TrainSettings, run: Run) -> contextlib.AbstractContextManager[Checkpoints | None]:
    """Open a run's checkpoints, to write them too; for a dry run only where there are any, to read."""
    if settings.dry_run and (settings.fresh or not on_process_0(run.folder.checkpoints.is_dir)):
        return contextlib.nullcontext()
    return open_checkpoints(run.folder.checkpoints, writing=not settings.dry_run, warn=run.warn)


def restore_saved(
    settings: TrainSettings,
    run: Run,
    sizes: Sizes,
    program: Program,
    checkpoints: Checkpoints | None,
    meta: dict,
) -> Restored | None:
    """Return a run's newest checkpoint, with states that go on with these settings, or None to begin.

    Args:
      settings: The run's.
      run: Its folder.
      sizes: The sizes of its data.
      program: Its functions.
      checkpoints: Its checkpoints; None where there are none.
      meta: What its checkpoints record from now on.

    Raises:
      UsageError: with these settings the run would have had other results, naming each difference.
      InputFileError: the data have changed since.
      NoCheckpointError: there are checkpoints, and none is sound.
    """
    folder, remedy = run.folder.path, f"give them as they were, or {run.folder.anew}"
    try:
        saved = None if checkpoints is None else restore_latest(checkpoints, settings, sizes, program)
    except UsageError as error:
        changed = on_process_0(run.folder.describe_change, settings)
        raise UsageError(f"the run {folder} has other settings: {error}{changed}; {remedy}") from error
    if saved is None:
        return None
    recorded = saved.meta
    if "epochs" not in recorded and recorded["step"] > 0:  # an earlier program's
        recorded = recorded | {"epochs": on_process_0(run.folder.read_settings).epochs}
    if differing := differing_settings(recorded, meta):
        raise UsageError(f"the run {folder} has other settings: {'; '.join(differing)}; {remedy}")
    return saved._replace(state=usable_states(run.folder, saved, settings, program, meta))


def restore_progress(
    settings: TrainSettings, run: Run, program: Program, saved: Restored | None, meta: dict
) -> tuple[Progress, list[EpochMetrics]]:
    """Return how far a run has come by its newest checkpoint, and its epochs up to there, which are shown again."""
    if saved is None:
        with run.clock.part("compiling"):
            losses = np.zeros((settings.seeds, program.steps_per_epoch), np.float32)
            progress, metrics = Progress(0, start_states(program), losses), []
    else:
        for name in ("device", "versions", "XLA_FLAGS"):
            before, now = saved.meta.get(name, ""), meta[name]  # earlier programs recorded no flags
            if before != now:
                saved_with = f"the run was saved with {name} {before or 'none'}"
                run.warn(f"{saved_with} and continues with {now or 'none'}: bits may differ")
        step = saved.meta["step"]
        losses = np.array(saved.losses) if step > 0 else np.zeros((settings.seeds, program.steps_per_epoch), np.float32)
        progress = Progress(step, shard(saved.state, program.mesh, P(SEEDS)), losses)
        metrics = on_process_0(recorded_metrics, run.folder, saved.meta, run.warn)
        if step == program.last_step:
            longer = "a larger --epochs continues it, " if settings.recipe == "tutorial" else ""
            run.display.say(f"this run is finished: {longer}--fresh starts anew")
        elif step == 0:
            run.display.say("training on from the imported weights")
        else:
            run.display.say(f"continuing after step {step:,} of {program.last_step:,}")
    # An epoch's metrics are written before its checkpoint: after a kill between the two, the epoch comes again. So
    # does one that was the last and ended before its time.
    done = [
        epoch
        for epoch in metrics
        if epoch.step <= progress.step
        and (epoch.step % program.steps_per_epoch == 0 or progress.step == program.last_step)
    ]
    on_process_0(run.folder.write_metrics, done)
    for epoch in done:
        run.display.epoch_cost(epoch.epoch, statistics.fmean(epoch.cost))
    return progress, done


@contextlib.contextmanager
def scalars(settings: TrainSettings, folder: RunFolder, *, after_step: int) -> Iterator[Callable[[EpochMetrics], None]]:
    """Return what writes an epoch's numbers for TensorBoard, where that is wanted."""
    if not settings.tensorboard or not is_process_0():
        yield lambda metrics: None
        return
    with folder.open_scalars(after_step=after_step) as write:
        yield write


def profiled(run_steps: Callable, calls: Iterator[int], folder: Path, display: Display) -> Callable:
    """Return a function that runs steps and writes a trace of its second call: the first one warms the device up."""

    def run(*arguments):
        if next(calls) != 2:
            return run_steps(*arguments)
        result = None
        try:
            with jax.profiler.trace(folder):
                result = jax.block_until_ready(run_steps(*arguments))
        except Exception as error:
            if result is None:
                raise
            reason = text_of(error).partition("\n")[0]
            display.say(f"the trace in {folder} could not be written ({reason}); the training goes on")
            return result
        *_, first, stop = arguments
        display.say(f"a trace of {stop - first} steps is in {folder}")
        return result

    return run


def save(
    checkpoints: Checkpoints, progress: Progress, metrics: list[EpochMetrics], meta: dict, clock: Stopwatch
) -> None:
    """Save a run where it is, with the metrics of the epochs that are done."""
    with clock.part("saving"):
        meta = meta | {"metrics": [epoch.to_record() for epoch in metrics]}
        checkpoints.save(progress.step, to_host(progress.states), progress.losses, meta)


def stop_run(
    stop: StopRequest,
    program: Program,
    checkpoints: Checkpoints,
    progress: Progress,
    metrics: list[EpochMetrics],
    meta: dict,
    clock: Stopwatch,
) -> NoReturn:
    """Save a run that was asked to stop, unless it is saved already, and end it."""
    assert stop.signal_number is not None, "a run is stopped by a signal"
    if progress.step > 0 and checkpoints.latest_step() != progress.step:
        save(checkpoints, progress, metrics, meta, clock)
    saved = "which is saved; run the same command again to continue"
    raise StopSignalError(
        f"stopped by {signal.Signals(stop.signal_number).name} after step {progress.step:,} of {program.last_step:,}, "
        + (saved if progress.step > 0 else "before there was anything to save; run the same command again to start"),
        stop.signal_number,
    )

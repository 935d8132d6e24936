"""A run from its settings to its report: load, compile, train epoch by epoch, test, save."""

import collections
import contextlib
import logging
import signal
import statistics
import time
from collections.abc import Iterator
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from cnn_jax import __version__
from cnn_jax.core.evaluation import Evaluation
from cnn_jax.core.input_pipeline import Piece, ResidentFeed, StreamFeed
from cnn_jax.core.sharding import (
    SEEDS,
    choose_group,
    epoch_orders,
    evaluate_seeds,
    make_mesh,
    of_seed,
    place,
    place_test_set,
    run_steps_of_seeds,
    seed_keys,
    sums_of_seeds,
)
from cnn_jax.core.statistics import mean_interval
from cnn_jax.data.dataset import Dataset, hold_out
from cnn_jax.runs.checkpoint import Checkpoints, open_checkpoints
from cnn_jax.runs.folder import EpochMetrics, RunFolder
from cnn_jax.runs.restore import (
    count_steps,
    describe_run,
    initial_states,
    load_run_data,
    resident_bytes,
    seeds_of,
    templates,
)
from cnn_jax.runs.settings import TrainSettings
from cnn_jax.runtime.devices import describe_devices, describe_machine, device_bytes, start_devices
from cnn_jax.runtime.display import Display, describe_seconds, describe_values
from cnn_jax.runtime.distributed import all_gather, is_process_0, on_process_0, report_lost_hosts, to_host
from cnn_jax.runtime.errors import (
    InputFileError,
    NonFiniteLossError,
    StopSignalError,
    TargetAccuracyError,
)
from cnn_jax.runtime.signals import StopRequest, listen_for_stop

# A segment is as many steps as take this long: the bar moves and a signal is answered after each.
SEGMENT_SECONDS = 0.7
FIRST_SEGMENT_STEPS = 5
PROFILED_STEPS = 10

log = logging.getLogger(__name__)


class Stopwatch:
    """Where the time goes.

    Attributes:
      seconds: Of each named part, in the order in which the parts began.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = collections.defaultdict(float)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time that the block takes to a part."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start


def train_run(settings: TrainSettings) -> None:
    """Train a run, or continue it, and report it.

    Raises:
      CnnJaxError: each failure as the class that names it.
    """
    with trained(settings) as training:
        if training is None:
            return
        accuracy = training.report()
    if settings.target_accuracy is not None and accuracy < settings.target_accuracy:
        raise TargetAccuracyError(
            f"test accuracy {accuracy:.4f} is below --target-accuracy {settings.target_accuracy}; "
            "train longer or with other settings"
        )


@contextlib.contextmanager
def trained(settings: TrainSettings, *, shown: bool = True) -> Iterator["Training | None"]:
    """Train a run, or continue it, and hold it until the block ends.

    Args:
      settings: Of the run.
      shown: Whether a person is to see how it goes.

    Returns:
      The run at its end; None after a dry run.

    Raises:
      CnnJaxError: each failure as the class that names it.
    """
    stopwatch, folder = Stopwatch(), RunFolder(settings.run_folder)
    with contextlib.ExitStack() as held:
        with stopwatch.part("loading"):
            start_devices(settings.platform, settings.coordinator, settings.num_processes, settings.process_id)
        held.enter_context(report_lost_hosts())
        display = Display(shown=shown and is_process_0())
        if not settings.dry_run:
            on_process_0(lambda: _take_over(folder, settings, held, display))
        if not settings.fresh:
            on_process_0(lambda: folder.check_settings(settings))
        display.say(f"cnn-jax {__version__}, jax {jax.__version__} on {describe_devices()}")
        with stopwatch.part("loading"):
            dataset = load_run_data(settings)
        _introduce(display, settings, dataset)
        if settings.dry_run:
            display.say("dry run: nothing was trained or written")
            yield None
            return
        on_process_0(lambda: folder.write_settings(settings))
        checkpoints = None
        if is_process_0():
            checkpoints = held.enter_context(open_checkpoints(folder.checkpoints, writing=True, warn=display.say))
        training = Training(settings, dataset, folder, checkpoints, display, stopwatch)
        training.restore()
        if not training.finished:
            training.train()
        yield training


def _take_over(folder, settings, held, display):
    """Lock the run's folder until `held` ends, and move what is in it aside if the run is to be fresh."""
    held.enter_context(folder.locked())
    if settings.fresh and (aside := folder.move_aside()):
        display.say(f"the earlier run is now {aside}")
        held.enter_context(folder.locked())


def _introduce(display: Display, settings: TrainSettings, dataset: Dataset) -> None:
    train_examples = len(dataset.train_labels) - (settings.validation or 0)
    shapes, _ = templates(settings, dataset, train_examples)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes.params)) // settings.seeds
    size = "x".join(map(str, dataset.train_images.shape[1:]))
    display.say(
        f"{dataset.name}: {len(dataset.train_labels):,} training and {len(dataset.test_labels):,} test images, "
        f"{size}, {dataset.num_classes} classes; network of {parameters:,} parameters"
    )
    how = "Adam at" if settings.recipe == "tutorial" else f"recipe {settings.recipe}, peak"
    last_seed = settings.seed + settings.seeds - 1
    seeds = f"seeds {settings.seed} to {last_seed}" if settings.seeds > 1 else f"seed {settings.seed}"
    held_out = f"; {settings.validation:,} training images held out" if settings.validation else ""
    display.say(
        f"{settings.run_folder}: {settings.epochs:g} epochs of {train_examples // settings.batch_size:,} steps, "
        f"batch {settings.batch_size}, {how} {settings.learning_rate:g}, {settings.precision}, {seeds}{held_out}"
    )


class Training:
    """A run in progress: its states on the devices, and the files and the display that follow them.

    Attributes:
      metrics: Of the epochs that are done, in order.
    """

    def __init__(
        self,
        settings: TrainSettings,
        dataset: Dataset,
        folder: RunFolder,
        checkpoints: Checkpoints | None,  # in process 0 alone
        display: Display,
        stopwatch: Stopwatch,
    ):
        self.settings = settings
        self.dataset = dataset
        self.folder = folder
        self.checkpoints = checkpoints
        self.display = display
        self.stopwatch = stopwatch
        self.mesh = make_mesh(settings.seeds)
        self.meta = describe_run(settings, dataset) if is_process_0() else {}
        with stopwatch.part("loading"):
            train_set, epoch_test_set = dataset, (dataset.test_images, dataset.test_labels)
            if settings.validation is not None:
                train_set, *epoch_test_set = hold_out(dataset, settings.validation)
            self.num_examples = len(train_set.train_labels)
            limit = resident_bytes(settings)
            streams = limit is not None and train_set.train_images.nbytes > limit
            self.feed = (StreamFeed if streams else ResidentFeed)(train_set, self.mesh)
            self.epoch_test_set = place_test_set(*epoch_test_set, self.mesh)
        with stopwatch.part("compiling"):
            _, self.order_keys, self.augment_keys = seed_keys(seeds_of(settings), self.mesh)
            self.states = initial_states(settings, dataset, self.num_examples, self.mesh)
        self.steps_per_epoch = self.num_examples // settings.batch_size
        self.last_step = count_steps(settings.epochs, self.steps_per_epoch)
        self.losses = np.zeros((settings.seeds, self.steps_per_epoch), np.float32)
        self.group: int | None = None
        self.step = 0
        self.metrics: list[EpochMetrics] = []
        self.epochs_here = 0  # whose end this process has trained
        self.segment_steps = FIRST_SEGMENT_STEPS
        self.profile = settings.profile
        log.info("mesh %s, %s", dict(self.mesh.shape), type(self.feed).__name__)

    @property
    def finished(self) -> bool:
        return self.step == self.last_step

    def restore(self) -> None:
        """Continue from the newest checkpoint, if there is one, and print what was printed up to there."""
        with self.stopwatch.part("loading"):
            restored = on_process_0(self._read_newest)
        metrics = on_process_0(self.folder.read_metrics)
        if restored is not None:
            states, self.losses, self.step = restored
            self.states = jax.tree.unflatten(jax.tree.structure(self.states), place(states, self.mesh, P(SEEDS)))
            if self.finished:
                longer = "a larger --epochs continues it, " if self.settings.recipe == "tutorial" else ""
                self.display.say(f"this run is finished: {longer}--fresh starts anew")
            else:
                self.display.say(f"continuing after step {self.step:,} of {self.last_step:,}")
        # An epoch's metrics are written before its checkpoint: after a kill between the two, the epoch comes again. So
        # does one that was the last and ended before its time.
        self.metrics = [
            epoch
            for epoch in metrics
            if epoch.step <= self.step and (epoch.step % self.steps_per_epoch == 0 or self.finished)
        ]
        if self.metrics != metrics:
            on_process_0(lambda: self.folder.write_metrics(self.metrics))
        for epoch in self.metrics:
            self.display.epoch_cost(epoch.epoch, statistics.fmean(epoch.cost))

    def _read_newest(self):
        """Return the leaves of the newest states, the losses and the step of process 0's newest checkpoint, if any."""
        restored = self.checkpoints.restore_latest(*templates(self.settings, self.dataset, self.num_examples))
        if restored is None:
            return None
        self._check(restored.meta)
        return jax.device_get(jax.tree.leaves(restored.state)), np.array(restored.losses), restored.meta["step"]

    def _check(self, saved: dict) -> None:
        """Refuse to continue on data that have changed; say what else differs that may change the bits."""
        if saved["data"] != self.meta["data"]:
            raise InputFileError(
                f"the data in {self.settings.dataset_dir or self.dataset.name} are not those that the run "
                f"{self.folder.path} was trained on; bring them back, or give another --run-name, or --fresh"
            )
        for name in ("device", "versions"):
            if saved[name] != self.meta[name]:
                self.display.say(
                    f"the run was saved with {name} {saved[name]} and continues with {self.meta[name]}: bits may differ"
                )

    def train(self) -> None:
        """Train to the last epoch, unless a signal stops it."""
        with contextlib.ExitStack() as held:
            self.scalars = None
            if self.settings.tensorboard and is_process_0():
                from cnn_jax.runs.tensorboard import open_scalars

                self.scalars = held.enter_context(open_scalars(self.folder.path / "tensorboard", after_step=self.step))
            request = held.enter_context(listen_for_stop())
            held.enter_context(self.display.progress(total_steps=self.last_step, steps_done=self.step))
            self._compile()
            while not self.finished:
                self._train_epoch(request)

    def _compile(self) -> None:
        with self.stopwatch.part("compiling"):
            orders = self._orders(0)
            piece = next(self.feed.pieces(orders, 0))
            seeds_here = self.settings.seeds // self.mesh.shape[SEEDS]
            on_cpu = jax.default_backend() == "cpu"
            if seeds_here > 1 and not on_cpu:
                one = self._lower(piece).compile().memory_analysis()
                self.group = choose_group(seeds_here, one.temp_size_in_bytes, device_bytes())
            self._lower(piece).compile()
            tested = (self.states.eval_params, *self.epoch_test_set, jnp.float32(255))
            sums_of_seeds.lower(*tested, apply_fn=self.states.apply_fn, mesh=self.mesh).compile()
        log.info(
            "compiled in %.1f s; seeds trained at once: %s", self.stopwatch.seconds["compiling"], self.group or "one"
        )

    def _lower(self, piece: Piece):
        return run_steps_of_seeds.lower(*self._arguments(piece, 0, 0), **self._laid_out(piece))

    def _arguments(self, piece, first, stop):
        return self.states, piece.images, piece.labels, piece.orders, self.augment_keys, first, stop

    def _laid_out(self, piece):
        return {"mesh": self.mesh, "group": self.group, "examples": piece.examples}

    def _orders(self, epoch: int) -> jax.Array:
        sizes = {"num_examples": self.num_examples, "batch_size": self.settings.batch_size, "mesh": self.mesh}
        return epoch_orders(self.order_keys, epoch, **sizes)

    def _train_epoch(self, request: StopRequest) -> None:
        """Train from the step reached to the end of its epoch, then test, write the metrics and save."""
        epoch = self.step // self.steps_per_epoch
        stop = min(self.last_step, (epoch + 1) * self.steps_per_epoch)
        begin, seconds = self.step, 0.0
        if self.step % self.steps_per_epoch == 0:
            self.losses = np.zeros_like(self.losses)
        costs = np.empty(0)
        for piece in self.feed.pieces(self._orders(epoch), self.step % self.steps_per_epoch):
            piece_stop = min(stop, epoch * self.steps_per_epoch + piece.stop)
            while self.step < piece_stop:
                length = self._agree_on_a_segment(request, piece_stop)
                seconds += self._train_segment(piece, length)
                costs = self.losses[:, : self.step - epoch * self.steps_per_epoch].mean(axis=1, dtype=np.float64)
                self.display.advance(
                    epoch=epoch + 1,
                    epochs=self.settings.epochs,
                    step=self.step,
                    cost=float(costs.mean()),
                    examples_per_second=self._speed(begin, seconds),
                )
                if self._saves_at(self.step) and self.step < stop:
                    self._save()
            if self.step == stop:
                break
        results = self.test(self.epoch_test_set)
        metrics = EpochMetrics(
            epoch=epoch + 1,
            step=self.step,
            cost=costs.tolist(),
            accuracy=[result.accuracy for result in results],
            loss=[result.loss for result in results],
            tested_on="test" if self.settings.validation is None else "validation",
            seconds=seconds,
            examples_per_second=self._speed(begin, seconds),
            step_milliseconds=1e3 * seconds / (self.step - begin),
            compile_seconds=self.stopwatch.seconds["compiling"] if not self.epochs_here else 0.0,
        )
        self.epochs_here += 1
        self.metrics.append(metrics)
        with self.stopwatch.part("saving"):
            on_process_0(lambda: self.folder.write_metrics(self.metrics))
        self._save()
        if self.scalars is not None:
            self.scalars.write(metrics)
        self.display.epoch_cost(epoch + 1, statistics.fmean(metrics.cost))
        self.display.epoch_line(
            epoch=epoch + 1,
            epochs=self.settings.epochs,
            tested_on=metrics.tested_on,
            accuracy=statistics.fmean(metrics.accuracy),
            examples_per_second=metrics.examples_per_second,
            left=(self.last_step - self.step) * metrics.step_milliseconds / 1e3,
        )

    def _speed(self, begin, seconds):
        return (self.step - begin) * self.settings.batch_size * self.settings.seeds / seconds

    def _agree_on_a_segment(self, request: StopRequest, piece_stop: int) -> int:
        """Return how many steps to take next, the same in every process; save and stop if one was asked to."""
        told = all_gather(request.signal_number or 0, self.segment_steps)
        if told[:, 0].any():
            self._stop(int(told[:, 0].max()))
        length = min(int(told[0, 1]), piece_stop - self.step)
        every = self.settings.checkpoint_every_steps
        return length if every is None else min(length, every - self.step % every)

    def _train_segment(self, piece: Piece, length: int) -> float:
        """Run the next few steps of an epoch in one compiled loop, and return the seconds that took."""
        place_in_epoch = self.step % self.steps_per_epoch
        first = place_in_epoch - piece.first
        # The first segment of a process still warms the device up: the one after it is traced.
        profiled = self.profile is not None and self.segment_steps != FIRST_SEGMENT_STEPS
        if profiled:
            length = min(length, PROFILED_STEPS)
        start = time.perf_counter()
        with jax.profiler.trace(self.profile) if profiled else contextlib.nullcontext():
            self.states, losses = run_steps_of_seeds(
                *self._arguments(piece, first, first + length), **self._laid_out(piece)
            )
            losses = to_host(losses)[:, first : first + length]
        seconds = time.perf_counter() - start
        if profiled:
            self.display.say(f"a trace of {length} steps is in {self.profile}")
            self.profile = None
        self.stopwatch.seconds["training"] += seconds
        # The state of a non-finite loss is lost with this exception: it is never tested, written down or saved.
        if not np.isfinite(losses).all():
            place_of, seed = np.argwhere(~np.isfinite(losses.T))[0]
            of_seed = f" of seed {self.settings.seed + seed}" if self.settings.seeds > 1 else ""
            raise NonFiniteLossError(
                f"the loss of step {self.step + place_of + 1:,}{of_seed} is {losses[seed, place_of]}; the checkpoints "
                f"in {self.folder.checkpoints} are from before; lower --learning-rate"
            )
        self.losses[:, place_in_epoch : place_in_epoch + length] = losses
        self.step += length
        self.segment_steps = max(1, round(length * SEGMENT_SECONDS / seconds))
        return seconds

    def test(self, images_and_labels: tuple[jax.Array, jax.Array], *, unscaled: bool = False) -> list[Evaluation]:
        """Test each seed's network as it is now on all images of a set."""
        with self.stopwatch.part("testing"):
            return evaluate_seeds(
                self.states.apply_fn, self.states.eval_params, *images_and_labels, mesh=self.mesh, unscaled=unscaled
            )

    def _saves_at(self, step: int) -> bool:
        every = self.settings.checkpoint_every_steps
        return every is not None and step % every == 0

    def _save(self) -> None:
        with self.stopwatch.part("saving"):
            states = to_host(self.states)
            on_process_0(lambda: self.checkpoints.save(self.step, states, self.losses, self.meta))

    def _stop(self, signal_number: int) -> NoReturn:
        if self.step > 0 and on_process_0(lambda: self.checkpoints.latest_step()) != self.step:
            self._save()
        saved = "which is saved; run the same command again to continue"
        raise StopSignalError(
            f"stopped by {signal.Signals(signal_number).name} after step {self.step:,} of {self.last_step:,}, "
            + (saved if self.step > 0 else "before anything was to be saved; run the same command again to start"),
            signal_number,
        )

    def report(self) -> float:
        """Print the test accuracy and where the time went, write result.json; return the mean test accuracy."""
        last, rows, result = self.metrics[-1], [], {}
        accuracies = last.accuracy
        test_set = self.epoch_test_set
        if self.settings.validation is not None:
            rows.append(
                ("validation accuracy", f"{describe_values(last.accuracy)} of {self.settings.validation:,} images")
            )
            result["validation_accuracy"] = statistics.fmean(last.accuracy)
            test_set = place_test_set(self.dataset.test_images, self.dataset.test_labels, self.mesh)
            accuracies = [evaluation.accuracy for evaluation in self.test(test_set)]
        self.display.accuracy(statistics.fmean(accuracies))
        count = len(self.dataset.test_labels)
        rows.append(("test accuracy", f"{describe_values(accuracies)} on pixels in [0, 1], of {count:,} images"))
        result["test_accuracy"] = statistics.fmean(accuracies)
        # Only MNIST's tutorial has a number to compare this with.
        if self.dataset.name == "mnist":
            unscaled = [evaluation.accuracy for evaluation in self.test(test_set, unscaled=True)]
            result["unscaled_test_accuracy"] = statistics.fmean(unscaled)
            rows.append(("as the tutorial tests", f"{describe_values(unscaled)} on pixels in 0..255"))
        if self.settings.seeds > 1:
            spread_of_seeds = mean_interval(accuracies)
            rows += [
                ("standard error", f"{spread_of_seeds.standard_error:.5f}"),
                ("95 % interval", f"{spread_of_seeds.low:.4f} to {spread_of_seeds.high:.4f}"),
                ("each seed", " ".join(f"{accuracy:.4f}" for accuracy in accuracies)),
            ]
            by_seed = zip(seeds_of(self.settings).tolist(), accuracies, strict=True)
            result["seeds"] = [{"seed": seed, "test_accuracy": accuracy} for seed, accuracy in by_seed]
            result["spread"] = spread_of_seeds._asdict()
        states = to_host(self.states)
        if is_process_0():
            self._write_report(rows, result, states, accuracies)
        return result["test_accuracy"]

    def _write_report(self, rows, result, states, accuracies):
        trained_here = "training" in self.stopwatch.seconds
        if trained_here or self.folder.read_result().get("step") != self.step:
            where = {"machine": describe_machine(), "device": describe_devices(), "versions": self.meta["versions"]}
            self.folder.write_result(result | {"step": self.step, "seconds": self.stopwatch.seconds} | where)
        page = self.folder.path / "report.html"
        if trained_here or not page.exists():
            # Imported here: its pictures take half a second to import, and most starts end without it.
            from cnn_jax.analysis.report import write_report

            with self.stopwatch.part("reporting"):
                model, params = states.apply_fn.__self__, of_seed(states.eval_params, 0)
                write_report(
                    page,
                    self.folder,
                    self.settings,
                    model,
                    params,
                    self.dataset,
                    step=self.step,
                    accuracies=accuracies,
                )
        rows += [(name, describe_seconds(seconds)) for name, seconds in self.stopwatch.seconds.items()]
        rows.append(("written to", str(self.folder.path)))
        self.display.table("Result", rows)

"""A run from its settings to its report: load, compile, train epoch by epoch, test, save."""

import collections
import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from flax.training.train_state import TrainState

from cnn_jax import __version__
from cnn_jax.checkpoint import Checkpoints, open_checkpoints
from cnn_jax.config import EvaluateSettings, TrainSettings
from cnn_jax.data import Dataset, check_batch_size, fingerprint, load_dataset
from cnn_jax.devices import describe_device, start_devices
from cnn_jax.display import Display, describe_seconds
from cnn_jax.errors import (
    InputFileError,
    NoCheckpointError,
    NonFiniteLossError,
    StopSignalError,
    TargetAccuracyError,
    UsageError,
)
from cnn_jax.evaluation import Evaluation, compile_evaluation, evaluate
from cnn_jax.model import CNN
from cnn_jax.run_folder import EpochMetrics, RunFolder, deciding_settings
from cnn_jax.signals import StopRequest, listen_for_stop
from cnn_jax.training import create_train_state, epoch_order, make_keys, run_steps

# A segment is as many steps as take this long: the bar moves and a signal is answered after each.
SEGMENT_SECONDS = 0.7
FIRST_SEGMENT_STEPS = 5


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
    display, stopwatch, folder = Display(), Stopwatch(), RunFolder(settings.run_folder)
    with contextlib.ExitStack() as held:
        if not settings.dry_run:
            held.enter_context(folder.locked())
            if settings.fresh and (aside := folder.move_aside()):
                display.say(f"the earlier run is now {aside}")
                held.enter_context(folder.locked())
        if not settings.fresh:
            folder.check_settings(settings)
        with stopwatch.part("loading"):
            device = start_devices(settings.platform)
            display.say(f"cnn-jax {__version__}, jax {jax.__version__} on {describe_device(device)}")
            dataset = load_run_data(settings)
        _introduce(display, settings, dataset)
        if settings.dry_run:
            display.say("dry run: nothing was trained or written")
            return
        folder.write_settings(settings)
        with open_checkpoints(folder.checkpoints, writing=True, warn=display.say) as checkpoints:
            training = _Training(settings, dataset, folder, checkpoints, display, stopwatch)
            training.restore()
            if not training.finished:
                training.train()
            accuracy = training.report()
    if settings.target_accuracy is not None and accuracy < settings.target_accuracy:
        raise TargetAccuracyError(
            f"test accuracy {accuracy:.4f} is below --target-accuracy {settings.target_accuracy}; "
            "train longer or with other settings"
        )


def evaluate_run(settings: EvaluateSettings) -> None:
    """Test a run's newest checkpoint on all test images and print the accuracy.

    Raises:
      CnnJaxError: each failure as the class that names it.
    """
    display, folder = Display(), RunFolder(settings.run_folder)
    start_devices(settings.platform)
    state, dataset = restore_run(folder, settings.data_dir, display.say)
    images, labels = jax.device_put((dataset.test_images, dataset.test_labels))
    result = evaluate(state.apply_fn, state.params, images, labels, unscaled=settings.unscaled)
    pixels = "unscaled pixels, 0..255, as the PyTorch tutorial tests" if settings.unscaled else "pixels in [0, 1]"
    display.say(
        f"{folder.path} after {int(state.step):,} steps: {result.correct:,} of {result.count:,} test images of "
        f"{dataset.name} right, loss {result.loss:.4f}; on {pixels}"
    )
    display.accuracy(result.accuracy)


def restore_run(folder: RunFolder, data_dir: Path | None, warn: Callable[[str], None]) -> tuple[TrainState, Dataset]:
    """Return the state of a run's newest checkpoint, and the data set that it was trained on.

    Args:
      folder: The run's folder.
      data_dir: Where tfds keeps its data sets; None for where the run found them.
      warn: Told, in a line, of each checkpoint that is damaged.

    Raises:
      NoCheckpointError: there is no such run, or no checkpoint in it that can be used.
    """
    settings = folder.read_settings()
    settings = dataclasses.replace(settings, data_dir=data_dir or settings.data_dir)
    with open_checkpoints(folder.checkpoints, writing=False, warn=warn) as checkpoints:
        dataset = load_run_data(settings)
        restored = checkpoints.restore_latest(*initial_state(settings, dataset))
    if restored is None:
        raise NoCheckpointError(f"{folder.checkpoints} holds no sound checkpoint; train the run first")
    return restored.state, dataset


def load_run_data(settings: TrainSettings) -> Dataset:
    """Load the data set that a run's settings name, and refuse one that does not fit them or the network."""
    dataset = load_dataset(settings.dataset, settings.dataset_dir, settings.data_dir)
    check_batch_size(settings.batch_size, len(dataset.train_labels))
    height, width, _ = dataset.train_images.shape[1:]
    if min(height, width) < 4:
        raise UsageError(f"{dataset.name} has images of {height}x{width}; two poolings need at least 4x4")
    return dataset


def initial_state(settings: TrainSettings, dataset: Dataset) -> tuple[TrainState, jax.Array]:
    """Return the state before step 0, and room for the losses of an epoch."""
    init_key, _ = make_keys(settings.seed)
    model = CNN(num_classes=dataset.num_classes, dtype=jnp.dtype(settings.precision).type)
    create = jax.jit(create_train_state, static_argnums=(1, 2, 3))
    state = create(init_key, model, dataset.train_images.shape[1:], settings.learning_rate)
    return state, jnp.zeros(len(dataset.train_labels) // settings.batch_size, jnp.float32)


def describe_run(settings: TrainSettings, dataset: Dataset) -> dict:
    """Return what a run's results depend on, as JSON's types: what each of its checkpoints records."""
    return {
        "settings": deciding_settings(settings),
        "versions": {"cnn-jax": __version__} | {name: version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        "data": fingerprint(dataset),
        "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
    }


def _introduce(display: Display, settings: TrainSettings, dataset: Dataset) -> None:
    shapes = jax.eval_shape(lambda: initial_state(settings, dataset)[0].params)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    size = "x".join(map(str, dataset.train_images.shape[1:]))
    display.say(
        f"{dataset.name}: {len(dataset.train_labels):,} training and {len(dataset.test_labels):,} test images, "
        f"{size}, {dataset.num_classes} classes; network of {parameters:,} parameters"
    )
    display.say(
        f"{settings.run_folder}: {settings.epochs} epochs of "
        f"{len(dataset.train_labels) // settings.batch_size:,} steps, batch {settings.batch_size}, "
        f"Adam at {settings.learning_rate:g}, {settings.precision}, seed {settings.seed}"
    )


class _Training:
    """A run in progress: its state on the device, and the files and the display that follow it."""

    def __init__(
        self,
        settings: TrainSettings,
        dataset: Dataset,
        folder: RunFolder,
        checkpoints: Checkpoints,
        display: Display,
        stopwatch: Stopwatch,
    ):
        self.settings = settings
        self.folder = folder
        self.checkpoints = checkpoints
        self.display = display
        self.stopwatch = stopwatch
        self.dataset = dataset
        self.num_examples = len(dataset.train_labels)
        with stopwatch.part("loading"):
            self.train_set = jax.device_put((dataset.train_images, dataset.train_labels))
            self.test_set = jax.device_put((dataset.test_images, dataset.test_labels))
        with stopwatch.part("compiling"):
            self.state, self.losses = initial_state(settings, dataset)
        self.meta = describe_run(settings, dataset)
        self.steps_per_epoch = len(self.losses)
        self.last_step = settings.epochs * self.steps_per_epoch
        self.step = 0
        self.metrics: list[EpochMetrics] = []
        self.segment_steps = FIRST_SEGMENT_STEPS

    @property
    def finished(self) -> bool:
        return self.step == self.last_step

    def restore(self) -> None:
        """Continue from the newest checkpoint, if there is one, and print what was printed up to there."""
        with self.stopwatch.part("loading"):
            restored = self.checkpoints.restore_latest(self.state, self.losses)
        if restored is not None:
            self._check(restored.meta)
            self.state, self.losses = restored.state, restored.losses
            self.step = int(self.state.step)
            if self.finished:
                self.display.say("this run is finished: a larger --epochs continues it, --fresh starts anew")
            else:
                self.display.say(f"continuing after step {self.step:,} of {self.last_step:,}")
        # An epoch's metrics are written before its checkpoint: after a kill between the two, the epoch comes again.
        metrics = self.folder.read_metrics()
        self.metrics = [epoch for epoch in metrics if epoch.step <= self.step]
        if self.metrics != metrics:
            self.folder.write_metrics(self.metrics)
        for epoch in self.metrics:
            self.display.epoch_cost(epoch.epoch, epoch.cost)

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
        progress = self.display.progress(total_steps=self.last_step, steps_done=self.step)
        with listen_for_stop() as request, progress:
            self._compile()
            while not self.finished:
                self._train_epoch(request)

    def _compile(self) -> None:
        with self.stopwatch.part("compiling"):
            run_steps.lower(self.state, self.losses, *self.train_set, self._order(0), 0, 0).compile()
            compile_evaluation(self.state.apply_fn, self.state.params, *self.test_set)

    def _order(self, epoch: int) -> jax.Array:
        _, order_key = make_keys(self.settings.seed)
        batch_size = self.settings.batch_size
        return epoch_order(order_key, epoch, num_examples=self.num_examples, batch_size=batch_size)

    def _train_epoch(self, request: StopRequest) -> None:
        """Train from the step reached to the end of its epoch, then test, write the metrics and save."""
        epoch = self.step // self.steps_per_epoch
        order = self._order(epoch)
        begin, seconds = self.step, 0.0
        while True:
            if request.signal_number is not None:
                self._stop(request.signal_number)
            seconds += self._train_segment(order)
            examples_per_second = (self.step - begin) * self.settings.batch_size / seconds
            losses = np.asarray(self.losses)[: self.step - epoch * self.steps_per_epoch]
            cost = float(losses.mean(dtype=np.float64))
            self.display.advance(
                epoch=epoch + 1,
                epochs=self.settings.epochs,
                step=self.step,
                cost=cost,
                examples_per_second=examples_per_second,
            )
            if self.step % self.steps_per_epoch == 0:
                break
            if self._saves_at(self.step):
                self._save()
        result = self.test()
        self.metrics.append(
            EpochMetrics(
                epoch=epoch + 1,
                step=self.step,
                cost=cost,
                test_accuracy=result.accuracy,
                test_loss=result.loss,
                seconds=seconds,
                examples_per_second=examples_per_second,
            )
        )
        with self.stopwatch.part("saving"):
            self.folder.write_metrics(self.metrics)
        self._save()
        self.display.epoch_cost(epoch + 1, cost)
        self.display.epoch_line(
            epoch=epoch + 1,
            epochs=self.settings.epochs,
            accuracy=result.accuracy,
            examples_per_second=examples_per_second,
            left=(self.last_step - self.step) * self.settings.batch_size / examples_per_second,
        )

    def _train_segment(self, order: jax.Array) -> float:
        """Run the next few steps of the epoch in one compiled loop, and return the seconds that took."""
        first = self.step % self.steps_per_epoch
        length = min(self.segment_steps, self.steps_per_epoch - first)
        if self.settings.checkpoint_every_steps is not None:
            length = min(
                length,
                self.settings.checkpoint_every_steps - self.step % self.settings.checkpoint_every_steps,
            )
        start = time.perf_counter()
        self.state, self.losses = run_steps(self.state, self.losses, *self.train_set, order, first, first + length)
        losses = np.asarray(self.losses)[first : first + length]
        seconds = time.perf_counter() - start
        self.stopwatch.seconds["training"] += seconds
        # The state of a non-finite loss is lost with this exception: it is never tested, written down or saved.
        if not np.isfinite(losses).all():
            step = self.step + int(np.argmin(np.isfinite(losses))) + 1
            raise NonFiniteLossError(
                f"the loss of step {step:,} is {losses[step - self.step - 1]}; the checkpoints in "
                f"{self.checkpoints.folder} are from before; lower --learning-rate"
            )
        self.step += length
        self.segment_steps = max(1, round(length * SEGMENT_SECONDS / seconds))
        return seconds

    def test(self, *, unscaled: bool = False) -> Evaluation:
        """Test the network as it is now on all test images."""
        with self.stopwatch.part("testing"):
            return evaluate(self.state.apply_fn, self.state.params, *self.test_set, unscaled=unscaled)

    def _saves_at(self, step: int) -> bool:
        every = self.settings.checkpoint_every_steps
        return every is not None and step % every == 0

    def _save(self) -> None:
        with self.stopwatch.part("saving"):
            self.checkpoints.save(self.step, self.state, self.losses, self.meta)

    def _stop(self, signal_number: int) -> NoReturn:
        if self.step > 0 and self.checkpoints.latest_step() != self.step:
            self._save()
        saved = "which is saved; run the same command again to continue"
        raise StopSignalError(
            f"stopped by {signal.Signals(signal_number).name} after step {self.step:,} of {self.last_step:,}, "
            + (saved if self.step > 0 else "before anything was to be saved; run the same command again to start"),
            signal_number,
        )

    def report(self) -> float:
        """Print the test accuracy and where the time went; return the accuracy."""
        last = self.metrics[-1]
        self.display.accuracy(last.test_accuracy)
        rows = [
            (
                "test accuracy",
                f"{last.test_accuracy:.4f} on pixels in [0, 1], of {len(self.test_set[1]):,} images",
            )
        ]
        result = {"test_accuracy": last.test_accuracy}
        # Only MNIST's tutorial has a number to compare this with.
        if self.dataset.name == "mnist":
            result["unscaled_test_accuracy"] = unscaled = self.test(unscaled=True).accuracy
            rows.append(("as the tutorial tests", f"{unscaled:.4f} on pixels in 0..255"))
        if "training" in self.stopwatch.seconds:
            self.folder.write_result(result | {"seconds": self.stopwatch.seconds})
        rows += [(name, describe_seconds(seconds)) for name, seconds in self.stopwatch.seconds.items()]
        rows.append(("written to", str(self.folder.path)))
        self.display.table("Result", rows)
        return last.test_accuracy

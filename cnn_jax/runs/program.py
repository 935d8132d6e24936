"""A run's compiled functions, made from its settings and the sizes of its data alone."""

import contextlib
import dataclasses
import functools
import inspect
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float32, Int32, UInt8

from cnn_jax.core import recipes
from cnn_jax.core.evaluation import Evaluation, pixel_scale
from cnn_jax.core.input_pipeline import RESIDENT, STREAMED, Chunk
from cnn_jax.core.model import CNN
from cnn_jax.core.recipes import Recipe
from cnn_jax.core.sharding import (
    DATA,
    EPOCH,
    SEEDS,
    count_parts,
    jit_over_mesh,
    run_seeds,
    seeds_epoch,
    shard,
    shardings,
    start_seeds,
    sum_seeds,
    to_host,
)
from cnn_jax.core.training import SeedEpoch, TrainState, create_train_state, run_steps, train_step
from cnn_jax.data.dataset import Dataset
from cnn_jax.runs.own_code import OwnCode
from cnn_jax.runs.settings import TrainSettings, recipe_defaults, require
from cnn_jax.runtime.errors import UsageError

log = logging.getLogger(__name__)

# The share of a device's memory for the intermediate values of the seeds trained at once; the rest is for the data and
# for XLA.
MEMORY_SHARE = 0.6


class Sizes(NamedTuple):
    """What a program depends on of a data set.

    Attributes:
      train_examples: How many images are trained on.
      image_shape: (height, width, channels).
      num_classes: How many classes there are.
    """

    train_examples: int
    image_shape: tuple[int, int, int]
    num_classes: int

    @classmethod
    def of(cls, dataset: Dataset, settings: TrainSettings) -> "Sizes":
        """Return the sizes of a data set without the images held out for validation."""
        held_out = settings.validation or 0
        return cls(len(dataset.train_labels) - held_out, dataset.train_images.shape[1:], dataset.num_classes)


class TestSet(NamedTuple):
    """A set of labelled images on the devices that share each seed; an image labelled -1 counts for nothing."""

    images: UInt8[Array, "m h w c"]
    labels: Int32[Array, " m"]


def shard_test_set(images: UInt8[np.ndarray, "m h w c"], labels: Int32[np.ndarray, " m"], mesh: Mesh) -> TestSet:
    """Divide a test set over the devices that share each seed, filled up with images labelled -1."""
    missing = -len(labels) % mesh.shape[DATA]
    images = np.pad(images, ((0, missing), *((0, 0),) * (images.ndim - 1)))
    return TestSet(*shard((images, np.pad(labels, (0, missing), constant_values=-1)), mesh, P(DATA)))


class Program(NamedTuple):
    """A run's functions; the mesh, the model, the recipe and the seeds are bound in them once.

    Each is compiled at its first call. None asks which devices are attached: those of a mesh of devices that are not
    can be lowered from shapes (`jax.eval_shape(program.start)` has the states') and compiled.

    Attributes:
      mesh: What it runs on.
      model: The network.
      streams: Whether the images reach the devices in chunks.
      steps_per_epoch: Batches of an epoch.
      last_step: How many steps the run has.
      seeds_at_once: As for `sharding.run_seeds`.
      start: Returns the states before step 0, every array with one more axis in front, for the seeds.
      epoch: Returns what the seeds decide of an epoch, by its number from 0.
      run_steps: Takes states (whose memory it reuses), epochs, images, labels, and two rows of the epochs' batches;
        returns the states after the steps from one row to before the other, and their losses, (S, steps).
      sum_images: Takes `eval_variables`, a test set's images and labels, and the pixel value that becomes 1; returns
        `Sums`.
    """

    mesh: Mesh
    model: nn.Module
    streams: bool
    steps_per_epoch: int
    last_step: int
    seeds_at_once: int | None
    start: functools.partial[TrainState]
    epoch: functools.partial[SeedEpoch]
    run_steps: jax.stages.Wrapped
    sum_images: jax.stages.Wrapped

    @property
    def platform(self) -> str:
        """The platform of its devices, such as `cpu`."""
        return self.mesh.devices.flat[0].platform

    @property
    def epochs(self) -> int:
        """How many epochs the run has; the last may end before its time."""
        return math.ceil(self.last_step / self.steps_per_epoch)

    def end_of_epoch(self, step: int) -> int:
        """Return the last step of the epoch in progress at `step`; the run's last epoch may be incomplete."""
        return min(self.last_step, (step // self.steps_per_epoch + 1) * self.steps_per_epoch)


class Progress(NamedTuple):
    """How far a run has come.

    The next segment of steps reuses the states' memory, and the losses' within an epoch: keep the newest alone.

    Attributes:
      step: Steps since the run began.
      states: On the devices; every array has one more axis in front, for the seeds.
      losses: Those of the epoch in progress, of which the steps taken are filled in.
    """

    step: int
    states: TrainState
    losses: Float32[np.ndarray, "s steps"]


def make_program(
    settings: TrainSettings,
    sizes: Sizes,
    mesh: Mesh,
    *,
    streams: bool = False,
    seeds_at_once: int | None = None,
    arguments: tuple[dict[str, float], ...] | None = None,
) -> Program:
    """Return a run's program; nothing is compiled yet.

    Args:
      settings: The run's.
      sizes: The sizes of its data.
      mesh: A mesh from `make_mesh`.
      streams: Whether the images reach the devices in chunks.
      seeds_at_once: As for `sharding.run_seeds`.
      arguments: The recipe's arguments in several runs to train together, each with all of the settings' seeds. The
        compiled functions take them. None compiles the settings' own into them.
    """
    steps_per_epoch = sizes.train_examples // settings.batch_size
    last_step = max(1, round(settings.epochs * steps_per_epoch))
    model = make_model(settings, sizes)
    # What a network computes of its batch, it computes of all of it; the tutorial's computes nothing.
    of_batch = settings.model is not None and keeps_state(model, sizes)
    recipe = make_recipe(settings, last_step)
    if isinstance(settings.recipe, OwnCode):
        require_trainable(settings.recipe, "--recipe", model, recipe, sizes)
    seeds = np.arange(settings.seed, settings.seed + settings.seeds, dtype=np.uint32)
    start = functools.partial(start_seeds, model=model, image_shape=sizes.image_shape, recipe=recipe)
    epoch = functools.partial(
        seeds_epoch, num_examples=sizes.train_examples, batch_size=settings.batch_size, shares=mesh.shape[DATA]
    )
    run = functools.partial(
        run_steps,
        model=model,
        recipe=recipe,
        axis=DATA,
        parts=1 if of_batch else count_parts(mesh, settings.batch_size),
        platform=mesh.devices.flat[0].platform,
    )
    rows: tuple[Any, ...] = (seeds,)
    if arguments is not None:
        of_runs = {name: np.array([each[name] for each in arguments], np.float32) for name in arguments[0]}
        repeated = {name: np.repeat(values, len(seeds)) for name, values in of_runs.items()}
        rows = np.tile(seeds, len(arguments)), repeated
        start, epoch, run = _with_arguments(start, epoch, run, functools.partial(make_recipe, settings, last_step))
    train = functools.partial(run_seeds, run=run, seeds_at_once=seeds_at_once)
    data = STREAMED if streams else RESIDENT
    return Program(
        mesh=mesh,
        model=model,
        streams=streams,
        steps_per_epoch=steps_per_epoch,
        last_step=last_step,
        seeds_at_once=seeds_at_once,
        start=functools.partial(jax.jit(start, out_shardings=shardings(mesh, P(SEEDS))), *rows),
        epoch=functools.partial(jax.jit(epoch, out_shardings=shardings(mesh, EPOCH)), *rows),
        run_steps=jit_over_mesh(
            train, mesh, (P(SEEDS), EPOCH, data, data, P(), P()), (P(SEEDS), P(SEEDS)), donate_argnums=0
        ),
        sum_images=jit_over_mesh(
            functools.partial(sum_seeds, model=model), mesh, (P(SEEDS), P(DATA), P(DATA), P()), P(SEEDS)
        ),
    )


def _with_arguments(
    start: Callable[..., TrainState], epoch: Callable[..., SeedEpoch], run: Callable, recipe_of: Callable
) -> tuple[Callable, Callable, Callable]:
    """Return a program's parts with arguments for each seed, of which a recipe is made where they are traced."""

    def start_one(seed, arguments):
        return jax.tree.map(lambda leaf: leaf[0], start(seed[np.newaxis], recipe=recipe_of(arguments)))

    def start_all(seeds, arguments):
        return jax.vmap(start_one)(seeds, arguments)

    def epoch_of_all(seeds, arguments, number):
        return epoch(seeds, number)._replace(arguments=arguments)

    def run_one(seed, **options):
        return run(seed, recipe=recipe_of(seed[1].arguments), **options)

    return start_all, epoch_of_all, run_one


def make_model(settings: TrainSettings, sizes: Sizes) -> nn.Module:
    """Return the network that a run trains: the tutorial's, or the user's own, with what it takes of the settings.

    Raises:
      UsageError: the user's is no network from such images to logits of such classes, or fails.
    """
    code = settings.model
    if not isinstance(code, OwnCode):
        dtype = jnp.dtype(settings.precision).type
        return CNN(features=settings.features, num_classes=sizes.num_classes, dtype=dtype)
    model, _ = _own_model(code, settings, sizes)
    require_trainable(code, "--model", model, recipes.tutorial(1.0), sizes)
    return model


def _own_model(code: OwnCode, settings: TrainSettings, sizes: Sizes) -> tuple[nn.Module, dict[str, Any]]:
    """Return a network of the user's, and the shapes of its weights and of what it keeps beside them.

    Raises:
      UsageError: as `make_model` does, except that its steps are not tried.
    """
    made = code.load("--model")
    if not (isinstance(made, type) and issubclass(made, nn.Module)):
        raise UsageError(f"--model {code}: it must be a class that inherits from flax.linen.Module")
    fields = {field.name for field in dataclasses.fields(made)}
    given: dict[str, object] = {"num_classes": sizes.num_classes} if "num_classes" in fields else {}
    shown = " ".join(map(str, settings.features))
    for option, text, field, value in (
        ("features", shown, "features", settings.features),
        ("precision", settings.precision, "dtype", jnp.dtype(settings.precision).type),
    ):
        if getattr(settings, option) != getattr(TrainSettings, option):
            require(field in fields, f"--{option}", text, f"left out: {code} has no field {field}")
            given[field] = value
    images = jax.ShapeDtypeStruct((2, *sizes.image_shape), np.float32)
    with code.failures_named("--model"):
        model = made(**given)
        hash(model)  # JAX compiles for each network anew, by its fields
        logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    found = _spec_of(logits)
    wanted = f"float32 {(2, sizes.num_classes)}"
    if found != wanted:
        raise UsageError(f"--model {code}: it returns {found} for images {images.shape}; logits must be {wanted}")
    if "params" not in variables:
        raise UsageError(f"--model {code}: it has no weights to train")
    return model, variables


def require_trainable(code: OwnCode, option: str, model: nn.Module, recipe: Recipe, sizes: Sizes) -> None:
    """Refuse code of the user's whose steps cannot be taken or saved, or mean something else; computes nothing.

    Raises:
      UsageError: naming it, and why.
    """
    pixels, key = jax.ShapeDtypeStruct((2, *sizes.image_shape), np.float32), _shape_of_key()
    with code.failures_named(option):
        # A step would go on with some of the wrong shapes.
        logits, labels = np.zeros((2, sizes.num_classes), np.float32), np.zeros(2, np.int32)
        losses = jax.eval_shape(recipe.loss, logits, labels)
        found = [("losses", losses, jax.ShapeDtypeStruct((2,), np.float32))]
        if recipe.augment is not None:
            keys = jax.eval_shape(jax.random.split, key)
            found.append(("images", jax.eval_shape(recipe.augment, keys, pixels), pixels))
        for what, made, wanted in found:
            if not isinstance(made, jax.ShapeDtypeStruct) or (made.shape, made.dtype) != (wanted.shape, wanted.dtype):
                raise TypeError(f"for two images it returns {_spec_of(made)}; the {what} must be {_spec_of(wanted)}")
        before, state = jax.eval_shape(lambda key: _step_of_two(key, model, recipe, sizes), key)
    if jax.tree.map(_spec_of, before) != jax.tree.map(_spec_of, state):
        raise UsageError(
            f"{option} {code}: a step changes the form of the arrays that it keeps, which must stay as it was"
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if leaf.size == 0 or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise UsageError(f"{option} {code}: it keeps {name}, {leaf.dtype} {leaf.shape}, which no checkpoint holds")


def _spec_of(made: object) -> str:
    """Return what code of the user's makes: an array's dtype and shape, or the type of anything else."""
    return f"{made.dtype} {made.shape}" if isinstance(made, jax.ShapeDtypeStruct) else type(made).__name__


def _step_of_two(key: Array, model: nn.Module, recipe: Recipe, sizes: Sizes) -> tuple[TrainState, TrainState]:
    """Return the states before and after the first step of a training, on two images."""
    images, labels = np.zeros((2, *sizes.image_shape), np.uint8), np.zeros(2, np.int32)
    state = create_train_state(key, model, sizes.image_shape, recipe)
    return state, train_step(state, images, labels, key, model=model, recipe=recipe)[0]


def _shape_of_key() -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda: jax.random.key(0))


def keeps_state(model: nn.Module, sizes: Sizes) -> bool:
    """Whether a network keeps anything beside its weights, such as statistics of its batches."""
    images = jax.ShapeDtypeStruct((1, *sizes.image_shape), np.float32)
    return {*jax.eval_shape(model.init, jax.random.key(0), images)} != {"params"}


def make_recipe(settings: TrainSettings, steps: int, arguments: Mapping[str, recipes.Number] | None = None) -> Recipe:
    """Return how a run of so many steps is trained: by a function in `core/recipes.py`, or by the user's own.

    Args:
      settings: The run's.
      steps: How many it has.
      arguments: In place of the settings' `recipe_arguments`.

    Raises:
      UsageError: the function does not take the hyperparameters; the user's makes no recipe, or fails.
    """
    code, given = settings.recipe, settings.recipe_arguments if arguments is None else arguments
    is_own = isinstance(code, OwnCode)
    function = code.load("--recipe") if is_own else getattr(recipes, code)
    with code.failures_named("--recipe") if is_own else contextlib.nullcontext():
        takes = inspect.signature(function).parameters
        if "learning_rate" not in takes:
            rate, usual = settings.learning_rate, recipe_defaults(code).learning_rate
            require(rate == usual, "--learning-rate", rate, f"{usual:g}, as {code} has no argument learning_rate")
        offered = {"steps": steps, **given}
        others = [name for name in takes if name not in ("steps", "learning_rate")]
        known = f"one of {', '.join(others)}, which {code} takes" if others else f"left out: {code} takes none"
        for name in settings.recipe_arguments:
            require(name in ("learning_rate", *others), "--hyperparameters", name, known)
        recipe = function(**{name: value for name, value in offered.items() if name in takes})
    if inspect.iscoroutine(recipe):
        recipe.close()  # or Python says that it was never awaited
    if not isinstance(recipe, Recipe):
        raise UsageError(f"--recipe {code}: it returns {type(recipe).__name__}, not a cnn_jax.core.recipes.Recipe")
    decay = recipe.ema_decay
    if isinstance(decay, int | float) and not 0 <= decay < 1:
        raise UsageError(f"--recipe {code}: its ema_decay is {decay}; it must be at least 0 and below 1")
    return recipe


def takes_any_arguments(settings: TrainSettings, program: Program, sizes: Sizes) -> bool:
    """Whether a recipe can be made of arguments that are known only when the program runs."""

    def step(key, arguments):
        return _step_of_two(key, program.model, make_recipe(settings, program.last_step, arguments), sizes)

    number = jax.ShapeDtypeStruct((), np.float32)
    try:
        jax.eval_shape(step, _shape_of_key(), dict.fromkeys(settings.recipe_arguments, number))
    except Exception:  # of whatever type: one that asks `if learning_rate > 0.1`, for example
        return False
    return True


def check_resources(settings: TrainSettings, sizes: Sizes, mesh: Mesh, device_bytes: int, *, together: int = 1) -> None:
    """Refuse, before anything is compiled, a run that cannot end well.

    What a run needs is taken for less than it is: every seed's weights with Adam's two moments, and for one seed the
    gradient and the first block's convolution of the images that are computed at once.

    Args:
      settings: The run's.
      sizes: The sizes of its data.
      mesh: A mesh from `make_mesh`.
      device_bytes: The memory of each of its devices.
      together: How many such runs train together.

    Raises:
      UsageError: that does not fit a device's memory, the steps are too many to be counted in an int32, or the user's
        network is none.
    """
    steps = settings.epochs * (sizes.train_examples // settings.batch_size)
    require(steps < 2**31, "--epochs", f"{settings.epochs:g}", f"smaller, for fewer than {2**31:,} steps")
    height, width, channels = sizes.image_shape
    if isinstance(settings.model, OwnCode):  # of whose layers nothing is known before it is compiled
        _, variables = _own_model(settings.model, settings, sizes)
        weights = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
        what, first_output = f"--model {settings.model}", 0
    else:
        first, second = settings.features
        weights = 9 * (channels + second) * first + (height // 4) * (width // 4) * second * sizes.num_classes
        images = settings.batch_size // (mesh.shape[DATA] * count_parts(mesh, settings.batch_size))
        what, first_output = f"--features {first} {second}", images * height * width * first
    seeds_here = together * settings.seeds // mesh.shape[SEEDS]
    needed = 4 * ((3 * seeds_here + 1) * weights + first_output)
    if needed > device_bytes:
        there = device_bytes / 2**30
        raise UsageError(
            f"{what} with --seeds {settings.seeds}{f', --together {together}' * (together > 1)} "
            f"and --batch-size {settings.batch_size}: "
            f"training needs more than {min(needed >> 30, 10**9):,} GiB of memory and there are {there:,.1f}; "
            "make them smaller"
        )


def start_states(program: Program) -> TrainState:
    """Return a program's states before step 0."""
    return compile_soon(program, program.start)()


def compile_soon(program: Program, function: functools.partial, *arguments: np.int32) -> Callable:
    """Compile a program's `start` or `epoch`, which take milliseconds, without most of XLA's optimisations.

    They would not pay: on two cores of a Xeon the two are traced and compiled in 1.2 s, and in 1.8 s as everything
    else is, to the same bits.
    """
    options: dict[str, str | bool] = {"xla_backend_optimization_level": "1"}
    lowered = jax.jit(function.func).lower(*function.args, *arguments)
    if program.platform == "cpu":
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # from JAX 0.12 on, XLA has nothing but its emitters
            quickest = lowered.compile(compiler_options=options | {"xla_cpu_use_fusion_emitters": False})
            return functools.partial(quickest, *function.args)
    return functools.partial(lowered.compile(compiler_options=options), *function.args)


def compile_program(
    program: Program,
    settings: TrainSettings,
    sizes: Sizes,
    states: TrainState,
    chunk: Chunk,
    test_set: TestSet,
    device_bytes: int,
    arguments: tuple[dict[str, float], ...] | None = None,
) -> Program:
    """Compile a program for its states, a chunk of its images and a test set: arrays, or their shapes.

    Args:
      program: The run's.
      settings: The run's.
      sizes: The sizes of its data.
      states: Its states.
      chunk: A chunk of its images.
      test_set: What it is tested on after each epoch.
      device_bytes: The memory of each of its devices.
      arguments: As for `make_program`.

    Returns:
      The program, which trains as many seeds at once as fit the memory of an accelerator.
    """
    seeds_here = states.step.shape[0] // program.mesh.shape[SEEDS]
    if seeds_here > 1 and program.platform != "cpu":
        one_each = dataclasses.replace(settings, seeds=program.mesh.shape[SEEDS])
        of_one = make_program(one_each, sizes, program.mesh, streams=program.streams)
        its_states, its_epoch = jax.eval_shape(of_one.start), jax.eval_shape(of_one.epoch, np.int32(0))
        steps = of_one.run_steps.lower(its_states, its_epoch, *chunk[1:3], np.int32(0), np.int32(0)).compile()
        seeds_at_once = count_seeds_at_once(seeds_here, memory_of(steps).temporaries, device_bytes)
        of_all = make_program(
            settings,
            sizes,
            program.mesh,
            streams=program.streams,
            seeds_at_once=seeds_at_once,
            arguments=arguments,
        )
        program = of_all._replace(epoch=program.epoch)
        log.info("seeds trained at once: %d", seeds_at_once)
    program.run_steps.lower(states, *chunk[:3], np.int32(0), np.int32(0)).compile()
    program.sum_images.lower(states.eval_variables, *test_set, pixel_scale(unscaled=False)).compile()
    return program


def count_seeds_at_once(seeds: int, seed_bytes: int, device_bytes: int) -> int:
    """Return how many of its seeds an accelerator should train at once.

    Args:
      seeds: The number of its seeds.
      seed_bytes: The memory that a step of one seed needs, besides the data.
      device_bytes: The memory that the device has.
    """
    return max(1, min(seeds, int(MEMORY_SHARE * device_bytes / max(1, seed_bytes))))


class Memory(NamedTuple):
    """What a compiled function needs of a device's memory, in bytes.

    Attributes:
      arguments: For its arguments.
      temporaries: For its intermediate values.
      output: For those of its results that do not take an argument's place.
    """

    arguments: int
    temporaries: int
    output: int


def memory_of(compiled: jax.stages.Compiled) -> Memory:
    """Return the memory that an accelerator's compiler planned for a function."""
    memory = compiled.memory_analysis()
    assert memory is not None, "an accelerator's compiler knows what memory a program needs"
    arguments, output = memory.argument_size_in_bytes, memory.output_size_in_bytes - memory.alias_size_in_bytes
    # A TPU's compiler reports no temporaries, but the most that is needed at once.
    temporaries = memory.temp_size_in_bytes or max(0, memory.peak_memory_in_bytes - arguments - output)
    return Memory(arguments, temporaries, output)


def evaluate_seeds(
    program: Program, states: TrainState, test_set: TestSet, *, unscaled: bool = False
) -> list[Evaluation]:
    """Test every seed's network on all images.

    Args:
      program: The run's.
      states: On its devices.
      test_set: On its devices.
      unscaled: Feed pixels in 0..255, as the PyTorch tutorial does when it tests, in place of [0, 1].
    """
    sums = to_host(program.sum_images(states.eval_variables, *test_set, pixel_scale(unscaled=unscaled)))
    return [Evaluation.of(*of_seed) for of_seed in zip(*sums, strict=True)]

"""Export a trained network for another program, and keep the file only if that program computes the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from cnn_jax.core.evaluation import BATCH_SIZE
from cnn_jax.data.dataset import PIXEL_MAXIMUM, Dataset, scale_pixels
from cnn_jax.data.loading import load_dataset
from cnn_jax.inference.page import read_page, write_page
from cnn_jax.inference.preprocess import FITTED_SIZE, SIZE
from cnn_jax.inference.pretrained import TrainedModel, load_packaged, load_trained_run, read_trained, write_trained
from cnn_jax.inference.torch_layout import params_to_torch, write_torch_file
from cnn_jax.runs.settings import Platform
from cnn_jax.runtime.devices import start_devices
from cnn_jax.runtime.display import Display
from cnn_jax.runtime.errors import StorageError, UsageError, lacks_memory
from cnn_jax.runtime.files import output_errors, replaced

# A file's logits may differ from ours by the absolute tolerance, or by the relative one times the largest logit if that
# is more. Other programs sum in another order: on MNIST, logits of up to 54 differ by 3e-5.
ABSOLUTE_TOLERANCE, RELATIVE_TOLERANCE = 1e-4, 2e-6
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
# The oldest versions that support the whole graph, so that many runtimes can read it.
ONNX_OPERATORS, ONNX_FORMAT = 17, 8

Compute = Callable[[np.ndarray], np.ndarray]


class Input(NamedTuple):
    """How an exported program takes its images.

    Attributes:
      pixels: In 0..255 as uint8, or in [0, 1] as float32.
      layout: (N, height, width, channels), or (N, channels, height, width).
    """

    pixels: Literal["uint8", "float"]
    layout: Literal["nhwc", "nchw"]

    @property
    def dtype(self) -> np.dtype:
        """The type of a pixel."""
        return np.dtype(np.uint8 if self.pixels == "uint8" else np.float32)

    def shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return the shape of an image of (height, width, channels) in this layout."""
        height, width, channels = image_shape
        return image_shape if self.layout == "nhwc" else (channels, height, width)

    def of(self, images: np.ndarray) -> np.ndarray:
        """Return a data set's images, (N, height, width, channels), uint8, as the program takes them."""
        laid_out = images if self.layout == "nhwc" else images.transpose(0, 3, 1, 2)
        return np.ascontiguousarray(laid_out if self.pixels == "uint8" else scale_pixels(laid_out))


class Format(NamedTuple):
    """A file format.

    Attributes:
      write: Writes a network to a file; raises OSError if it cannot. Only a program has an input; weights have none.
      load: Reads a network's file with the program that uses the format, and returns a function from a data set's
        images, (N, height, width, channels), uint8, to logits, (N, num_classes), float32.
    """

    write: Callable[[TrainedModel, Path, Input], None]
    load: Callable[[Path, TrainedModel, Input], Compute]


def export(
    to: str,
    output: Path,
    run: Path | None = None,
    *,
    takes: Input,
    seed: int | None = None,
    data_dir: Path | None = None,
    platform: Platform | None = None,
) -> None:
    """Write a network to a file, and keep it only if the program it is meant for computes the same on all test images.

    Raises:
      UsageError: the run, or the network in the package, has no such seed.
      NoCheckpointError: there is no such run.
      StorageError: the file could not be written, or its outputs differ from the network's.
    """
    start_devices(platform)
    display = Display()
    if run is None:
        trained = load_packaged(seed)
        dataset = load_dataset("mnist", None, data_dir)
    else:
        trained, dataset = load_trained_run(run, data_dir, display.say, seed)
        if trained.own_model is not None and to != "stablehlo":
            name = type(trained.own_model).__name__
            raise UsageError(
                f"--to {to}: it has a form for the tutorial's network, not for {name}; give --to stablehlo"
            )
    with output_errors(output, "--output"), replaced(output) as new:
        FORMATS[to].write(trained, new, takes)
        display.say(check(to, new, trained, dataset, takes, name=output))
    seed, steps = trained.training.seed, trained.training.steps
    source = run or "the packaged network"
    display.say(f"{source}, seed {seed}, after {steps:,} steps is now {output}")


def check(to: str, file: Path, trained: TrainedModel, dataset: Dataset, takes: Input, *, name: Path) -> str:
    """Compare an exported file with its network on all test images.

    Args:
      to: The file's format.
      file: Its current path.
      trained: The network that was written to it.
      dataset: The data set that the network was trained on.
      takes: How the file takes its images, if it is a program.
      name: The file's name in messages.

    Returns:
      The result of the comparison, as one line.

    Raises:
      StorageError: the logits or the accuracy differ, or the file cannot be read.
    """
    expected = trained.logits(dataset.test_images)
    try:
        compute = FORMATS[to].load(file, trained, takes)
        batches = np.split(dataset.test_images, range(BATCH_SIZE, len(expected), BATCH_SIZE))
        logits = np.concatenate([compute(images) for images in batches])
    except Exception as error:  # each program raises its own exceptions
        if lacks_memory(error):
            raise
        raise StorageError(
            f"{name} was not written: the {to} export cannot be read ({type(error).__name__}: {error}); "
            "choose another --to"
        ) from error
    difference = float(np.abs(logits - expected).max())
    tolerance = max(ABSOLUTE_TOLERANCE, RELATIVE_TOLERANCE * float(np.abs(expected).max()))
    right = [(each.argmax(axis=1) == dataset.test_labels).sum() for each in (expected, logits)]
    ours, theirs = (float(count / len(expected)) for count in right)
    # Rounding may decide between two classes whose logits are as close as that.
    best = np.sort(expected, axis=1)[:, -2:]
    ties = (best[:, -1] - best[:, 0] <= 2 * tolerance).sum() if expected.shape[1] > 1 else 0
    tested = f"on {len(expected):,} test images"
    # Not `difference > tolerance`, which a NaN would pass.
    if not difference <= tolerance or abs(right[1] - right[0]) > ties:
        raise StorageError(
            f"{name} was not written: the {to} export differs from the network {tested}: its logits by up to "
            f"{difference:.1e}, its accuracy {theirs:.4f} instead of {ours:.4f}; choose another --to"
        )
    found = f"the same accuracy, {ours:.4f}" if theirs == ours else f"accuracy {theirs:.4f} in place of {ours:.4f}"
    return f"{to}: read back and tested {tested}: {found}, and logits within {difference:.1e}"


def _write_torch(trained: TrainedModel, file: Path, _: Input) -> None:
    write_torch_file(file, params_to_torch(trained.params, trained.image_shape))


def _load_torch(file: Path, trained: TrainedModel, _: Input) -> Compute:
    import torch
    from torch.nn import functional

    weights = torch.load(file, weights_only=True)

    def compute(images: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(scale_pixels(images)).permute(0, 3, 1, 2)
        for block in ("layer1.0", "layer2.0"):
            x = functional.conv2d(x, weights[f"{block}.weight"], weights[f"{block}.bias"], padding=1)
            x = functional.max_pool2d(functional.relu(x), 2)
        return functional.linear(x.flatten(1), weights["fc.weight"], weights["fc.bias"]).numpy()

    return compute


def _write_safetensors(trained: TrainedModel, file: Path, _: Input) -> None:
    write_trained(trained, file)


def _load_safetensors(file: Path, trained: TrainedModel, _: Input) -> Compute:
    return read_trained(file).logits


def _write_onnx(trained: TrainedModel, file: Path, takes: Input) -> None:
    """Write a graph in PyTorch's layout, built by hand from at most eleven nodes.

    jax2onnx cannot convert `platform_dependent`, which `conv_block` consists of. Its releases since 0.15 exclude the
    Orbax that checkpoints need, and earlier ones do not support this JAX and Flax.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    tensors = params_to_torch(trained.params, trained.image_shape)
    nodes, x = [], "images"
    if takes.pixels == "uint8":
        tensors["maximum"] = np.asarray(PIXEL_MAXIMUM)
        nodes += [
            helper.make_node("Cast", [x], ["float"], to=TensorProto.FLOAT),
            helper.make_node("Div", ["float", "maximum"], ["scaled"]),
        ]
        x = "scaled"
    if takes.layout == "nhwc":
        nodes.append(helper.make_node("Transpose", [x], ["planes"], perm=[0, 3, 1, 2]))
        x = "planes"
    for block in ("layer1", "layer2"):
        weights = [f"{block}.0.weight", f"{block}.0.bias"]
        nodes += [
            helper.make_node("Conv", [x, *weights], [f"{block}.conv"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", [f"{block}.conv"], [f"{block}.relu"]),
            helper.make_node("MaxPool", [f"{block}.relu"], [f"{block}.pool"], kernel_shape=[2, 2], strides=[2, 2]),
        ]
        x = f"{block}.pool"
    nodes += [
        helper.make_node("Flatten", [x], ["flat"]),
        helper.make_node("Gemm", ["flat", "fc.weight", "fc.bias"], ["logits"], transB=1),
    ]
    metadata = _describe(trained, takes)
    dtype = helper.np_dtype_to_tensor_dtype(takes.dtype)
    shape = ["batch", *takes.shape(trained.image_shape)]
    graph = helper.make_graph(
        nodes,
        name="cnn",
        inputs=[helper.make_tensor_value_info("images", dtype, shape, doc_string=metadata["input"])],
        outputs=[
            helper.make_tensor_value_info(
                "logits", TensorProto.FLOAT, ["batch", len(trained.class_names)], doc_string=metadata["output"]
            )
        ],
        initializer=[numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    operators = [helper.make_opsetid("", ONNX_OPERATORS)]
    model = helper.make_model(graph, opset_imports=operators, ir_version=ONNX_FORMAT, producer_name="cnn-jax")
    helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    file.write_bytes(model.SerializeToString(deterministic=True))


def _describe(trained: TrainedModel, takes: Input) -> dict[str, str]:
    """Return what somebody who has nothing but the file must know to feed and read it."""
    height, width, channels = trained.image_shape
    white, pixels = (255, "uint8 in 0..255") if takes.pixels == "uint8" else (1, "float32 in [0, 1]")
    axes = "height, width, channels" if takes.layout == "nhwc" else "channels, height, width"
    shape = ", ".join(map(str, takes.shape(trained.image_shape)))
    if trained.preparation == "character":
        values = f"0 is paper and {white} is ink"
        preparation = (
            f"a picture of one character is cut to it, made {white} for ink and 0 for paper whatever its colours, "
            f"scaled with its aspect ratio kept until its longer side has {FITTED_SIZE} pixels, and placed into "
            f"{SIZE}x{SIZE} pixels with its centre of mass in the middle, as MNIST does"
        )
    else:
        values = f"0 is black and {white} is white" + "; the channels are red, green and blue" * (channels == 3)
        preparation = f"a picture is shrunk to {height} rows of {width} pixels"
        if channels == 1:
            background = trained.background / 255 * white
            preparation += f" of grey, and inverted if that brings its background nearer to {background:.3g}"
    return {
        "class_names": json.dumps(trained.class_names),
        "input": f"images: {pixels}, (N, {axes}) = (N, {shape}) for any N; {values}",
        "output": "logits: float32, (N, classes); the largest is the answer, and softmax makes probabilities of them",
        "preparation": preparation,
    }


def _load_onnx(file: Path, trained: TrainedModel, takes: Input) -> Compute:
    import onnxruntime

    # From its bytes, because onnxruntime takes no path that is not UTF-8.
    session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda images: np.asarray(session.run(["logits"], {"images": takes.of(images)})[0])


def _write_stablehlo(trained: TrainedModel, file: Path, takes: Input) -> None:
    (batch,) = jax.export.symbolic_shape("batch")
    variables = jax.tree.map(jnp.asarray, trained.variables)

    @jax.jit
    def apply(images: jax.Array) -> Any:
        images = images if takes.layout == "nhwc" else images.transpose(0, 2, 3, 1)
        return trained.model.apply(variables, scale_pixels(images) if takes.pixels == "uint8" else images)

    images = jax.ShapeDtypeStruct((batch, *takes.shape(trained.image_shape)), takes.dtype)
    try:
        exported = jax.export.export(apply, platforms=PLATFORMS)(images)
    except Exception as error:
        if trained.own_model is None:
            raise
        reason = next(iter(str(error).splitlines()), "")
        raise UsageError(
            f"--to stablehlo: {type(trained.own_model).__name__} fails on a batch of any size "
            f"({type(error).__name__}: {reason}); write x.shape[0] in place of len(x), and call nothing back"
        ) from error
    file.write_bytes(exported.serialize())


def _load_stablehlo(file: Path, trained: TrainedModel, takes: Input) -> Compute:
    exported = jax.export.deserialize(bytearray(file.read_bytes()))
    compute = jax.jit(exported.call)
    return lambda images: np.asarray(compute(takes.of(images)))


def _write_html(trained: TrainedModel, file: Path, _: Input) -> None:
    write_page(trained, file)


def _load_html(file: Path, trained: TrainedModel, _: Input) -> Compute:
    # There may be no browser: what the page computes with its weights is tested with the program itself.
    return read_page(file, trained).logits


FORMATS = {
    "torch": Format(_write_torch, _load_torch),
    "safetensors": Format(_write_safetensors, _load_safetensors),
    "onnx": Format(_write_onnx, _load_onnx),
    "stablehlo": Format(_write_stablehlo, _load_stablehlo),
    "html": Format(_write_html, _load_html),
}

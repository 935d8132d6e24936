"""Export a trained network for another program, and keep the file only if that program computes the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from cnn_jax.core.evaluation import BATCH_SIZE
from cnn_jax.data.dataset import Dataset, scale_pixels
from cnn_jax.data.loading import load_dataset
from cnn_jax.inference.pretrained import PACKAGED, TrainedModel, load_trained_run, read_trained, write_trained
from cnn_jax.inference.torch_layout import params_to_torch, write_torch_file
from cnn_jax.runs.settings import Platform
from cnn_jax.runtime.devices import start_devices
from cnn_jax.runtime.display import Display
from cnn_jax.runtime.errors import StorageError
from cnn_jax.runtime.files import output_errors, replaced

# A file's logits may differ from ours by the absolute tolerance, or by the relative one times the largest logit if that
# is more. Other programs sum in another order: on MNIST, logits of up to 54 differ by 3e-5.
ABSOLUTE_TOLERANCE, RELATIVE_TOLERANCE = 1e-4, 2e-6
PLATFORMS = ("cpu", "cuda", "tpu")
# The oldest versions that support the whole graph, so that many runtimes can read it.
ONNX_OPERATORS, ONNX_FORMAT = 17, 8
PIXELS = "pixels in [0, 1], 0 for paper: (N, height, width, channels)"


class Format(NamedTuple):
    """A file format.

    Attributes:
      write: Writes a network to a file; raises OSError if it cannot.
      load: Reads a network's file with the program that uses the format, and returns a function from images
        (N, height, width, channels), float32, in [0, 1], to logits (N, num_classes), float32.
    """

    write: Callable[[TrainedModel, Path], None]
    load: Callable[[Path, TrainedModel], Callable[[np.ndarray], np.ndarray]]


def export(
    to: str,
    output: Path,
    run: Path | None = None,
    *,
    seed: int | None = None,
    data_dir: Path | None = None,
    platform: Platform | None = None,
) -> None:
    """Write a network to a file, and keep it only if the program it is meant for computes the same on all test images.

    Raises:
      UsageError: the run has no such seed.
      NoCheckpointError: there is no such run.
      StorageError: the file could not be written, or its outputs differ from the network's.
    """
    start_devices(platform)
    display = Display()
    if run is None:
        trained = read_trained(PACKAGED)
        dataset = load_dataset("mnist", None, data_dir)
    else:
        trained, dataset = load_trained_run(run, data_dir, display.say, seed)
    with output_errors(output, "--output"), replaced(output) as new:
        FORMATS[to].write(trained, new)
        display.say(check(to, new, trained, dataset, name=output))
    seed, steps = trained.training.seed, trained.training.steps
    source = run or "the packaged network"
    display.say(f"{source}, seed {seed}, after {steps:,} steps is now {output}")


def check(to: str, file: Path, trained: TrainedModel, dataset: Dataset, *, name: Path) -> str:
    """Compare an exported file with its network on all test images.

    Args:
      to: The file's format.
      file: Its current path.
      trained: The network that was written to it.
      dataset: The data set that the network was trained on.
      name: The file's name in messages.

    Returns:
      The result of the comparison, as one line.

    Raises:
      StorageError: the logits or the accuracy differ, or the file cannot be read.
    """
    expected = trained.logits(dataset.test_images)
    try:
        compute = FORMATS[to].load(file, trained)
        batches = np.split(dataset.test_images, range(BATCH_SIZE, len(expected), BATCH_SIZE))
        logits = np.concatenate([compute(scale_pixels(images)) for images in batches])
    except Exception as error:  # each program raises its own exceptions
        raise StorageError(
            f"{name} was not written: the {to} export cannot be read ({type(error).__name__}: {error}); "
            "choose another --to"
        ) from error
    difference = float(np.abs(logits - expected).max())
    tolerance = max(ABSOLUTE_TOLERANCE, RELATIVE_TOLERANCE * float(np.abs(expected).max()))
    ours, theirs = (float((each.argmax(axis=1) == dataset.test_labels).mean()) for each in (expected, logits))
    tested = f"on {len(expected):,} test images"
    # Not `difference > tolerance`, which a NaN would pass.
    if not difference <= tolerance or theirs != ours:
        raise StorageError(
            f"{name} was not written: the {to} export differs from the network {tested}: its logits by up to "
            f"{difference:.1e}, its accuracy {theirs:.4f} instead of {ours:.4f}; choose another --to"
        )
    return f"{to}: read back and tested {tested}: the same accuracy, {theirs:.4f}, and logits within {difference:.1e}"


def _write_torch(trained: TrainedModel, file: Path) -> None:
    write_torch_file(file, params_to_torch(trained.params, trained.image_shape))


def _load_torch(file: Path, trained: TrainedModel) -> Callable[[np.ndarray], np.ndarray]:
    import torch
    from torch.nn import functional

    weights = torch.load(file, weights_only=True)

    def compute(images: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(images).permute(0, 3, 1, 2)
        for block in ("layer1.0", "layer2.0"):
            x = functional.conv2d(x, weights[f"{block}.weight"], weights[f"{block}.bias"], padding=1)
            x = functional.max_pool2d(functional.relu(x), 2)
        return functional.linear(x.flatten(1), weights["fc.weight"], weights["fc.bias"]).numpy()

    return compute


def _load_safetensors(file: Path, trained: TrainedModel) -> Callable[[np.ndarray], np.ndarray]:
    again = read_trained(file)
    apply = jax.jit(again.model.apply)
    return lambda images: np.asarray(apply({"params": again.params}, images))


def _write_onnx(trained: TrainedModel, file: Path) -> None:
    """Write a graph in PyTorch's layout, built by hand from nine nodes.

    jax2onnx cannot convert `platform_dependent`, which `conv_block` consists of. Its releases since 0.15 exclude the
    Orbax that checkpoints need, and earlier ones do not support this JAX and Flax.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes = [helper.make_node("Transpose", ["images"], ["planes"], perm=[0, 3, 1, 2])]
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
    tensors = params_to_torch(trained.params, trained.image_shape)
    graph = helper.make_graph(
        nodes,
        name="cnn",
        inputs=[
            helper.make_tensor_value_info(
                "images", TensorProto.FLOAT, ["batch", *trained.image_shape], doc_string=PIXELS
            )
        ],
        outputs=[helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", len(trained.class_names)])],
        initializer=[numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    operators = [helper.make_opsetid("", ONNX_OPERATORS)]
    model = helper.make_model(graph, opset_imports=operators, ir_version=ONNX_FORMAT, producer_name="cnn-jax")
    helper.set_model_props(
        model, {"class_names": json.dumps(trained.class_names), "preparation": trained.preparation, "input": PIXELS}
    )
    onnx.checker.check_model(model, full_check=True)
    file.write_bytes(model.SerializeToString(deterministic=True))


def _load_onnx(file: Path, trained: TrainedModel) -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: np.asarray(session.run(["logits"], {"images": images})[0])


def _write_stablehlo(trained: TrainedModel, file: Path) -> None:
    (batch,) = jax.export.symbolic_shape("batch")
    params = jax.tree.map(jnp.asarray, trained.params)
    apply = jax.jit(lambda images: trained.model.apply({"params": params}, images))
    exported = jax.export.export(apply, platforms=PLATFORMS)(
        jax.ShapeDtypeStruct((batch, *trained.image_shape), jnp.float32)
    )
    file.write_bytes(exported.serialize())


def _load_stablehlo(file: Path, trained: TrainedModel) -> Callable[[np.ndarray], np.ndarray]:
    exported = jax.export.deserialize(bytearray(file.read_bytes()))
    compute = jax.jit(exported.call)
    return lambda images: np.asarray(compute(images))


FORMATS = {
    "torch": Format(_write_torch, _load_torch),
    "safetensors": Format(write_trained, _load_safetensors),
    "onnx": Format(_write_onnx, _load_onnx),
    "stablehlo": Format(_write_stablehlo, _load_stablehlo),
}

"""A network as a file for other programs, each read again and tested by the program that it is for."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from cnn_jax.data.dataset import Dataset, load_dataset, scale_pixels
from cnn_jax.inference.pretrained import PACKAGED, Network, load_run_network, read_network, write_network
from cnn_jax.inference.torch_layout import params_to_torch, write_torch_file
from cnn_jax.runs.settings import Platform
from cnn_jax.runtime.devices import start_devices
from cnn_jax.runtime.display import Display
from cnn_jax.runtime.errors import StorageError

# What the logits of a file may differ by from ours: absolutely, or as a share of the largest where that is more. Other
# programs sum in another order, which on MNIST makes 3e-5 in logits of up to 54.
TOLERANCE, SHARE_OF_LARGEST = 1e-4, 2e-6
BATCH_SIZE = 500
PLATFORMS = ("cpu", "cuda", "tpu")
# The oldest that have what the graph needs, so that many runtimes read it.
ONNX_OPERATORS, ONNX_FORMAT = 17, 8
PIXELS = "pixels in [0, 1], 0 for paper: (N, height, width, channels)"


class Format(NamedTuple):
    """A kind of file.

    Attributes:
      write: Writes a network to a file; raises OSError or StorageError where it cannot.
      load: Has the program that the format is for read a file of a network; what it returns computes logits,
        (N, num_classes) float32, of images (N, height, width, channels), float32 in [0, 1].
    """

    write: Callable[[Network, Path], None]
    load: Callable[[Path, Network], Callable[[np.ndarray], np.ndarray]]


def export(
    to: str,
    output: Path,
    run: Path | None = None,
    *,
    seed: int | None = None,
    data_dir: Path | None = None,
    platform: Platform | None = None,
) -> None:
    """Write a network to a file, which is there only if it computes the same, in its own program, on all test images.

    Raises:
      UsageError: the run has no such seed.
      NoCheckpointError: there is no such run.
      StorageError: the file could not be written, or does not compute what the network does.
    """
    new = Path(f"{output}.unchecked")
    with _writing(output):
        new.touch()  # fails before anything is loaded
    try:
        start_devices(platform)
        display = Display()
        if run is None:
            network = read_network(PACKAGED)
            dataset = load_dataset("mnist", None, data_dir)
        else:
            network, dataset = load_run_network(run, data_dir, display.say, seed)
        with _writing(output):
            FORMATS[to].write(network, new)
        display.say(check(to, new, network, dataset, name=output))
        with _writing(output):
            new.replace(output)
    finally:
        new.unlink(missing_ok=True)
    seed, steps = network.training["seed"], network.training["steps"]
    source = run or "the packaged network"
    display.say(f"{source}, seed {seed}, after {steps:,} steps is now {output}")


@contextlib.contextmanager
def _writing(file):
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write {file} ({error.strerror}); give another --output") from error


def check(to: str, file: Path, network: Network, dataset: Dataset, *, name: Path) -> str:
    """Compare what a file computes with what its network computes, on all test images of its data set.

    Args:
      to: The file's format.
      file: As it is on the disk.
      network: That was written.
      dataset: That it was trained on.
      name: What to call the file.

    Returns:
      What was found, in a line.

    Raises:
      StorageError: the logits or the accuracy differ, or the file cannot be read.
    """
    expected = network.logits(dataset.test_images)
    try:
        compute = FORMATS[to].load(file, network)
        batches = np.split(dataset.test_images, range(BATCH_SIZE, len(expected), BATCH_SIZE))
        logits = np.concatenate([compute(scale_pixels(images)) for images in batches])
    except Exception as error:  # each program has failures of its own
        raise StorageError(
            f"{name} was not written: what was exported to {to} cannot be read ({type(error).__name__}: {error}); "
            "choose another --to"
        ) from error
    apart = float(np.abs(logits - expected).max())
    accuracies = [float((each.argmax(axis=1) == dataset.test_labels).mean()) for each in (expected, logits)]
    tested = f"on {len(expected):,} test images"
    # Written so that a logit that is not a number does not pass.
    if not apart <= max(TOLERANCE, SHARE_OF_LARGEST * float(np.abs(expected).max())) or len(set(accuracies)) > 1:
        raise StorageError(
            f"{name} was not written: what was exported to {to} differs from the network {tested}: its logits by up to "
            f"{apart:.1e}, its accuracy {accuracies[1]:.4f} in place of {accuracies[0]:.4f}; choose another --to"
        )
    return f"{to}: read again and tested {tested}: accuracy {accuracies[1]:.4f} as here, logits within {apart:.1e}"


def _write_torch(network, file):
    write_torch_file(file, params_to_torch(network.params, network.image_shape))


def _load_torch(file, network):
    import torch
    from torch.nn import functional

    weights = torch.load(file, weights_only=True)

    def compute(images):
        x = torch.from_numpy(images).permute(0, 3, 1, 2)
        for block in ("layer1.0", "layer2.0"):
            x = functional.conv2d(x, weights[f"{block}.weight"], weights[f"{block}.bias"], padding=1)
            x = functional.max_pool2d(functional.relu(x), 2)
        return functional.linear(x.flatten(1), weights["fc.weight"], weights["fc.bias"]).numpy()

    return compute


def _load_safetensors(file, network):
    read = read_network(file)
    return lambda images: np.asarray(read.model.apply({"params": read.params}, images))


def _write_onnx(network, file):
    """Write a graph of PyTorch's layout, made by hand.

    It is nine nodes. jax2onnx has no conversion of `platform_dependent`, which `conv_block` is made of; its releases
    since 0.15 exclude the Orbax that checkpoints need, and those before do not know this JAX and this Flax.
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
    tensors = params_to_torch(network.params, network.image_shape)
    graph = helper.make_graph(
        nodes,
        name="cnn",
        inputs=[
            helper.make_tensor_value_info(
                "images", TensorProto.FLOAT, ["batch", *network.image_shape], doc_string=PIXELS
            )
        ],
        outputs=[helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", network.num_classes])],
        initializer=[numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    operators = [helper.make_opsetid("", ONNX_OPERATORS)]
    model = helper.make_model(graph, opset_imports=operators, ir_version=ONNX_FORMAT, producer_name="cnn-jax")
    onnx.checker.check_model(model, full_check=True)
    file.write_bytes(model.SerializeToString(deterministic=True))


def _load_onnx(file, network):
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"images": images})[0]


def _write_stablehlo(network, file):
    (batch,) = jax.export.symbolic_shape("batch")
    apply = jax.jit(lambda images: network.model.apply({"params": network.params}, images))
    exported = jax.export.export(apply, platforms=PLATFORMS)(
        jax.ShapeDtypeStruct((batch, *network.image_shape), jnp.float32)
    )
    file.write_bytes(exported.serialize())


def _load_stablehlo(file, network):
    exported = jax.export.deserialize(bytearray(file.read_bytes()))
    compute = jax.jit(exported.call)
    return lambda images: np.asarray(compute(images))


FORMATS = {
    "torch": Format(_write_torch, _load_torch),
    "safetensors": Format(write_network, _load_safetensors),
    "onnx": Format(_write_onnx, _load_onnx),
    "stablehlo": Format(_write_stablehlo, _load_stablehlo),
}

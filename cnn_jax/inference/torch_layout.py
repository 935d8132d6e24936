"""Convert the network's weights to PyTorch's names and layout and back, and write the file that PyTorch reads."""

import io
from pathlib import Path

import jax
import numpy as np

from cnn_jax.runtime.errors import InputFileError

# PyTorch's name of each weight, and ours.
NAMES = {
    "layer1.0.weight": ("layer1", "kernel"),
    "layer1.0.bias": ("layer1", "bias"),
    "layer2.0.weight": ("layer2", "kernel"),
    "layer2.0.bias": ("layer2", "bias"),
    "fc.weight": ("fc", "kernel"),
    "fc.bias": ("fc", "bias"),
}
LARGEST = 1e6  # of the weights: with three layers of these, 1,024 features and pixels of 255, logits still are float32
SAVE_FLOAT32 = "save plain float32 tensors, such as model.float().state_dict()"
SHOWN = 12  # complaints, two for each of the network's tensors
# The two blocks divide an image's height and width by this.
SHRINKING = 4


def params_to_torch(params: dict, image_shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """Lay out the network's weights as the tutorial's `state_dict` does.

    Args:
      params: The weights of `CNN`: kernels (3, 3, C, F), a dense kernel (H * W * C, K), biases.
      image_shape: (height, width, channels) of the images that the network takes.

    Returns:
      float32 arrays under PyTorch's names: kernels (F, C, 3, 3), a dense weight (K, C * H * W), biases.
    """
    return {name: _to_torch(np.asarray(params[layer][kind]), image_shape) for name, (layer, kind) in NAMES.items()}


def params_from_torch(
    tensors: dict[str, np.ndarray], template: dict, image_shape: tuple[int, int, int], *, source: Path
) -> dict:
    """Lay out a `state_dict` of the tutorial as the network's weights: the reverse of `params_to_torch`.

    Args:
      tensors: Arrays under PyTorch's names.
      template: Weights with the expected shapes.
      image_shape: (height, width, channels) of the images that the network takes.
      source: The file they come from, for messages.

    Raises:
      InputFileError: tensors are missing, unknown, of another shape or dtype, not finite or too large; it names each.
    """
    expected = params_to_torch(template, image_shape)
    complaints = [f"{name} is missing" for name in expected if name not in tensors]
    complaints += [f"{name} is not part of the network" for name in tensors if name not in expected]
    for name in expected.keys() & tensors.keys():
        tensor, wanted = tensors[name], expected[name]
        if tensor.shape != wanted.shape:
            complaints.append(f"{name} has shape {tensor.shape}, not {wanted.shape}")
        elif tensor.dtype != np.float32:
            complaints.append(f"{name} is {tensor.dtype}, not float32")
        elif not (np.abs(tensor) <= LARGEST).all():
            complaints.append(f"{name} holds values that are not finite, or so large that the logits may overflow")
    if complaints:
        shown = "; ".join(sorted(complaints)[:SHOWN]) + "; ..." * (len(complaints) > SHOWN)
        fits = all(complaint.endswith(", not float32") for complaint in complaints)
        remedy = SAVE_FLOAT32 if fits else "give the weights of a network of this shape"
        raise InputFileError(f"{source} does not fit the network: {shown}; {remedy}")
    params = jax.tree.map(np.asarray, template)
    for name, (layer, kind) in NAMES.items():
        params[layer][kind] = _from_torch(tensors[name], params[layer][kind].shape, image_shape)
    return params


def write_torch_file(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a `state_dict` that `torch.load(file, weights_only=True)` reads.

    Raises:
      OSError: it could not be written.
    """
    import torch

    content = io.BytesIO()  # PyTorch's own error about a file that it cannot write hides the reason
    torch.save({name: torch.from_numpy(array.copy()) for name, array in tensors.items()}, content)
    file.write_bytes(content.getvalue())


def _to_torch(array: np.ndarray, image_shape: tuple[int, int, int]) -> np.ndarray:
    if array.ndim == 4:
        return np.ascontiguousarray(array.transpose(3, 2, 0, 1))  # (h, w, C, F) -> (F, C, h, w)
    if array.ndim == 2:
        # PyTorch flattens channel, height, width; this network height, width, channel.
        height, width = (size // SHRINKING for size in image_shape[:2])
        by_position = array.reshape(height, width, -1, array.shape[1])  # (H, W, C, K)
        return np.ascontiguousarray(by_position.transpose(3, 2, 0, 1).reshape(array.shape[1], -1))
    return array


def _from_torch(tensor: np.ndarray, shape: tuple[int, ...], image_shape: tuple[int, int, int]) -> np.ndarray:
    if tensor.ndim == 4:
        return np.ascontiguousarray(tensor.transpose(2, 3, 1, 0))
    if tensor.ndim == 2:
        height, width = (size // SHRINKING for size in image_shape[:2])
        by_channel = tensor.reshape(tensor.shape[0], -1, height, width)  # (K, C, H, W)
        return np.ascontiguousarray(by_channel.transpose(2, 3, 1, 0).reshape(shape))
    return tensor

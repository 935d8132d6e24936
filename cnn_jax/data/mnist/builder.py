"""MNIST as a tfds data set that is made from the embedded files, without TensorFlow and without a network."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8

from cnn_jax.data.dataset import Dataset
from cnn_jax.data.idx import read_idx

SPLITS = {"train": "train", "test": "t10k"}
# The SHA-256 of the four files as published, uncompressed.
SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


# Not registered: tfds has a builder named `mnist` of its own, which needs TensorFlow and a network to prepare.
class EmbeddedMnist(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """70,000 handwritten digits, 28x28x1, uint8, in the order in which they were published."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="The MNIST database of handwritten digits.",
            citation="Y. LeCun, C. Cortes, C. Burges: The MNIST database of handwritten digits. CC BY-SA 3.0.",
            features=tfds.features.FeaturesDict(
                {
                    # As bytes, not as one integer per pixel: 3 s instead of 8 to prepare.
                    "image": tfds.features.Tensor(
                        shape=(28, 28, 1), dtype=np.uint8, encoding=tfds.features.Encoding.BYTES
                    ),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            # The published order is kept, so that the data read back can be compared with the published SHA-256.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: object) -> dict[str, Iterable[tuple[int, dict[str, Any]]]]:
        return {split: self._generate_examples(prefix) for split, prefix in SPLITS.items()}

    def _generate_examples(self, prefix: str) -> Iterable[tuple[int, dict[str, Any]]]:
        images = _read_embedded(f"{prefix}-images-idx3-ubyte", ndim=3)
        labels = _read_embedded(f"{prefix}-labels-idx1-ubyte", ndim=1)
        for index, (image, label) in enumerate(zip(images[..., np.newaxis], labels, strict=True)):
            yield index, {"image": image, "label": int(label)}


def read_embedded() -> Dataset:
    """Read the embedded files themselves, for where nothing can or may be written; their SHA-256 is checked."""
    arrays = {}
    for split, prefix in SPLITS.items():
        arrays[f"{split}_images"] = _read_embedded(f"{prefix}-images-idx3-ubyte", ndim=3)[..., np.newaxis]
        arrays[f"{split}_labels"] = _read_embedded(f"{prefix}-labels-idx1-ubyte", ndim=1).astype(np.int32)
    return Dataset("mnist", **arrays, class_names=tuple("0123456789"))


def _read_embedded(name: str, *, ndim: int) -> UInt8[np.ndarray, "..."]:
    return read_idx(Path(__file__).parent / f"{name}.xz", ndim=ndim, sha256=SHA256[name])

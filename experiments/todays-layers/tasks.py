"""What each net is for: its data in three parts, its loss, and a score of every sample, higher is better."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from data import load, split_train
from letters import load_letters
from nets import HEIGHT
from torch import Tensor, nn
from torch.nn import functional

import taut

BATCH = 128
NOISE = 0.3
"""Standard deviation of what the U-Net is to take off; pixels are in [0, 1]."""

INK = 0.1
"""From where on a pixel belongs to a letter."""

Inputs = tuple[Tensor, ...]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Part:
    """Inputs of a net, one tensor for each of its arguments, and what it is to give."""

    inputs: Inputs
    targets: Tensor

    def __len__(self) -> int:
        """Samples."""
        return len(self.targets)

    def first(self, count: int | None) -> Part:
        """The first ones."""
        return Part(tuple(part[:count] for part in self.inputs), self.targets[:count])

    def chosen(self, rows: Tensor) -> Part:
        """Those of some numbers."""
        return Part(tuple(part[rows] for part in self.inputs), self.targets[rows])

    def batches(self, size: int = BATCH) -> Iterator[Part]:
        """All of them, in order."""
        for start in range(0, len(self), size):
            yield self.chosen(torch.arange(start, min(start + size, len(self))))


@dataclass(frozen=True)
class Task:
    """Data to learn, to choose by and to judge, and what is learned.

    Attributes:
        loss: of outputs and targets, a mean. score: of each sample, higher is better. unit: of the score. scale: what
            a difference of scores is multiplied by when it is shown, in `points`.
    """

    train: Part
    valid: Part
    test: Part
    loss: Loss
    score: Loss
    unit: str
    scale: float
    points: str


class Shuffled:
    """Batches (inputs ..., targets) in a new order every epoch, from the random state that the loop sets."""

    def __init__(self, part: Part) -> None:
        """Of all samples of a part."""
        self.part = part

    def __len__(self) -> int:
        """Batches in an epoch."""
        return (len(self.part) + BATCH - 1) // BATCH

    def __iter__(self) -> Iterator[Inputs]:
        """One epoch."""
        for rows in torch.randperm(len(self.part)).split(BATCH):
            batch = self.part.chosen(rows)
            yield (*batch.inputs, batch.targets)


@torch.no_grad()
def scores(net: nn.Module, part: Part, task: Task) -> Tensor:
    """The score of every sample (N,), in eval mode."""
    training = net.training
    net.eval()
    found = torch.cat([task.score(net(*batch.inputs), batch.targets) for batch in part.batches(500)])
    net.train(training)
    return found


def learned(
    net: nn.Module, task: Task, train: Part, valid: Part, length: tuple[int, float], seed: int = 0
) -> nn.Module:
    """A copy of a net, trained by Adam, half a cosine, batches of 128: the same for everybody.

    Args:
        net: is not changed.
        task: whose loss is learned.
        train: samples of an epoch.
        valid: samples by whose mean score the best epoch is chosen; the weights as they come are among the candidates.
        length: epochs, and the learning rate at the start.
        seed: of the order of samples.
    """
    epochs, rate = length
    return taut.finetune(
        net,
        None,
        None,
        Shuffled(train),
        lambda small: float(scores(small, valid, task).mean()),
        loss=task.loss,
        schedule=(taut.Stage(epochs=epochs, rate=rate),),
        example=train.first(8).inputs,
        seed=seed,
    )


def hits(outputs: Tensor, labels: Tensor) -> Tensor:
    """1 where the highest logit is the label's, else 0."""
    return (outputs.argmax(1) == labels).float()


def decibels(outputs: Tensor, clean: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of every image: -10 log10 of its mean squared error, pixels being in [0, 1]."""
    return -10 * (outputs - clean).square().flatten(1).mean(1).log10()


def noisy(clean: Tensor, seed: int) -> Part:
    """Images with noise, always the same for a seed, and without."""
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    return Part((clean + NOISE * noise,), clean)


def in_columns(images: Tensor, labels: Tensor) -> Part:
    """Letters (N, 1, 32, 32) as sequences of columns (N, 32, 32): of their own width, padded on the right with zeros.

    A blank image keeps one column.
    """
    columns = images[:, 0].transpose(1, 2)
    ink = (columns > INK).any(2)
    places = torch.arange(HEIGHT)
    first = torch.where(ink, places, HEIGHT).amin(1).clamp(max=HEIGHT - 1)
    width = (torch.where(ink, places, -1).amax(1) - first + 1).clamp(min=1)
    padding = places >= width[:, None]
    moved = columns.gather(1, (first[:, None] + places).clamp(max=HEIGHT - 1)[..., None].expand_as(columns))
    return Part((moved.masked_fill(padding[..., None], 0.0), padding), labels)


def load_task(name: str, folder: Path | None) -> Task:
    """The data of a net, always divided the same way.

    Raises:
        FileNotFoundError: Fashion-MNIST, or for "letters" the letters, are not there.
    """
    if name == "letters":
        held = load_letters(folder)
        parts = [in_columns(*pair) for pair in (held.train, held.valid, held.test)]
        return Task(*parts, functional.cross_entropy, hits, "accuracy", 100.0, "points")
    x, y, valid_x, valid_y = split_train("fashion-mnist", folder)
    test_x, test_y = load("fashion-mnist", "test", folder)
    if name == "unet":
        parts = [noisy(images, seed) for seed, images in enumerate((x, valid_x, test_x))]
        return Task(*parts, functional.mse_loss, decibels, "PSNR", 1.0, "dB")
    parts = [Part((images,), labels) for images, labels in ((x, y), (valid_x, valid_y), (test_x, test_y))]
    return Task(*parts, functional.cross_entropy, hits, "accuracy", 100.0, "points")

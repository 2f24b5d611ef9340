"""What several studies need to train and to score a net."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

BATCH = 128

Labelled = tuple[Tensor, Tensor]
"""Images and what they show."""

Augment = Callable[[Tensor], Tensor]
"""Training images in another form, drawn anew for every batch."""


class Shuffled:
    """(images, labels) in a new order every epoch, from the random state that the loop sets."""

    def __init__(self, x: Tensor, y: Tensor, images: int) -> None:
        """The first `images` of a fixed shuffle."""
        keep = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))[:images]
        self.x, self.y = x[keep], y[keep]

    def __len__(self) -> int:
        """Batches in an epoch."""
        return (len(self.x) + BATCH - 1) // BATCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch."""
        for rows in torch.randperm(len(self.x)).split(BATCH):
            yield self.x[rows], self.y[rows]


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of images that the net names right, in eval mode."""
    training = net.training
    net.eval()
    hits = sum(int((net(a).argmax(1) == b).sum()) for a, b in zip(x.split(500), y.split(500), strict=True))
    net.train(training)
    return hits / len(x)


def mirrored(x: Tensor) -> Tensor:
    """Mirror half of the batch."""
    return torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x)


def augmented(x: Tensor) -> Tensor:
    """Mirror half of the batch, shift the whole of it by up to two pixels."""
    x = mirrored(x)
    down, right = torch.randint(-2, 3, (2,)).tolist()
    return torch.roll(nn.functional.pad(x, (2, 2, 2, 2)), (down, right), (2, 3))[..., 2:-2, 2:-2]


def one_cycle(
    net: nn.Module,
    train: Labelled,
    valid: Labelled,
    peak: float,
    epochs: int,
    augment: Augment,
) -> tuple[float, dict[str, Tensor]]:
    """Train `net` in place with SGD and a one-cycle rate; the random state is the caller's.

    Args:
        net: in channels-last memory format.
        train: images and labels to learn.
        valid: images and labels that choose the epoch.
        peak: the highest rate.
        epochs: how many.
        augment: what is done to the images of a batch.

    Returns:
        The best validation accuracy, and the weights of its epoch.
    """
    (x, y), steps = train, len(train[0]) // BATCH
    sgd = torch.optim.SGD(net.parameters(), peak, momentum=0.9, weight_decay=5e-4, nesterov=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(sgd, peak, epochs * steps)
    best, state, start = 0.0, copy.deepcopy(net.state_dict()), time.time()
    for epoch in range(epochs):
        net.train()
        for index in torch.randperm(len(x))[: steps * BATCH].view(steps, BATCH):
            loss = nn.functional.cross_entropy(net(augment(x[index])), y[index], label_smoothing=0.05)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            rate.step()
        found = accuracy(net, *valid)
        print(f"epoch {epoch + 1}: validation {found:.4f}, {time.time() - start:.0f} s", flush=True)
        if found > best:
            best, state = found, copy.deepcopy(net.state_dict())
    return best, state

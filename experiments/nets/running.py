"""What several studies need to train and to score a net."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

BATCH = 128


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

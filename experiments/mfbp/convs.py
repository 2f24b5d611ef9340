"""A convolutional net on MNIST and on Fashion-MNIST: convolutions and dense layers pruned separately and together."""

from __future__ import annotations

from typing import Any

import torch
from lab import Lab, Shuffled, ramped
from mlps import accuracy
from rules import zeros
from torch import nn

import taut
from taut.studies import Cell
from taut.studies.grid import cells

SCOPES = {"convolutions": ("0", "3"), "dense": ("7", "9"), "together": ("0", "3", "7", "9")}
"""What is pruned -> names of its layers."""

SPARSITIES = (0.8, 0.9, 0.95, 0.98)
IMAGES, VALID = 8000, 2000
EPOCHS, TIMES, LAST = 10, 5, 3


def build(channels: int = 1, side: int = 28) -> nn.Module:
    """Two convolutions and two dense layers ("classical")."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 48, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(48 * (side // 4) ** 2, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def wanted(quick: bool) -> list[Cell]:
    """MFBP and magnitude everywhere; random and the source's rule where all layers are pruned."""
    if quick:
        return []
    main = cells(data=["fashion-mnist", "mnist"], scope=list(SCOPES), sparsity=SPARSITIES, rule=["sum", "magnitude"])
    more = cells(data=["fashion-mnist"], scope=["together"], sparsity=SPARSITIES, rule=["random", "source"])
    more += cells(data=["fashion-mnist", "mnist"], scope=["together"], sparsity=SPARSITIES, rule=["product"])
    control = cells(data=["fashion-mnist", "mnist"], scope=["together"], sparsity=[0.0], rule=["control"])
    colour = cells(
        data=["cifar-10"], scope=["together"], sparsity=[0.0, *SPARSITIES], rule=["control", "sum", "magnitude"]
    )
    return [*control, *main, *more, *(c for c in colour if (c["sparsity"] == 0.0) == (c["rule"] == "control"))]


def run(lab: Lab, cell: Cell) -> dict[str, Any]:
    """Test accuracy of the dense net, and of the pruned and trained one."""
    train, valid = lab.part(cell["data"], IMAGES), lab.part(cell["data"], VALID, skip=IMAGES)

    def make() -> nn.Module:
        torch.manual_seed(0)
        return build(*train[0].shape[1:3])

    def learn(net: nn.Module) -> nn.Module:
        stages = (taut.Stage(epochs=EPOCHS),)
        loss = nn.functional.cross_entropy
        judge = lambda net: accuracy(net, *valid)  # noqa: E731
        return taut.finetune(net, None, None, Shuffled(*train), judge, schedule=stages, loss=loss, example=train[0][:2])

    dense = lab.once(f"conv {cell['data']}", make, learn)
    settings = {"times": TIMES, "epochs": 1, "last": LAST, "seed": 0, "layers": SCOPES[cell["scope"]]}
    small = ramped(dense, cell["rule"], cell["sparsity"], train, valid, **settings)
    lab.keep(f"conv {cell['data']} {cell['scope']} {cell['rule']} {cell['sparsity']}", small)
    test = lab.images(cell["data"], "test")
    return {
        "dense": accuracy(dense, *test),
        "after": accuracy(small, *test),
        "zeros": zeros(small, SCOPES[cell["scope"]]),
    }

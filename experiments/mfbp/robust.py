"""Do factorized and pruned nets generalize better and stand noise better? Over-sized nets on few and many images."""

from __future__ import annotations

import time
from typing import Any

import torch
from lab import EXAMPLE, Lab
from mlps import WIDE, accuracy, modern, parameters, train
from rules import prune, zeros
from torch import Tensor, nn

import taut
from taut.nn import bake, hold_zeros
from taut.studies import Cell

IMAGES = {1000: (30, 15), 4000: (30, 15), 50_000: (6, 3)}
"""Training images -> epochs of the over-sized net, and epochs more."""

WRONG = (0.0, 0.2)
SPARSITIES = (0.5, 0.8, 0.9)
WAYS = ("small", "magnitude", "mfbp", "factored")
FEW = 10_000
NOISE = 0.5
PRUNINGS = 3


def wanted(quick: bool, seeds: int) -> list[Cell]:
    """Dense, dense with the extra epochs, and every way at every size; with many images one seed and one size."""
    grid = []
    for images in [1000] if quick else IMAGES:
        large = images > FEW
        for wrong in WRONG:
            for seed in range(1 if large else seeds):
                base = {"images": images, "wrong": wrong, "seed": seed}
                grid += [
                    base | {"way": "dense", "sparsity": 0.0},
                    base | {"way": "dense, extra epochs", "sparsity": 0.0},
                ]
                for sparsity in SPARSITIES[1:2] if quick or large else SPARSITIES:
                    ways = ("small", "mfbp") if quick else WAYS
                    grid += [base | {"way": way, "sparsity": sparsity} for way in ways]
    return grid


def run(lab: Lab, cell: Cell) -> dict[str, Any]:
    """Accuracy on the training images (their true labels apart), on test images, and on noisy test images."""
    seed = cell["seed"]
    x, y = lab.part("mnist", cell["images"], seed=200 + seed)
    given = mislabelled(y, cell["wrong"], seed)
    epochs, more = IMAGES[cell["images"]]
    start = time.perf_counter()

    def make() -> nn.Module:
        built: nn.Module = modern(WIDE, seed=seed, drop=False)
        return built

    key = f"robust {cell['images']} {cell['wrong']} {seed}"
    if cell["way"] == "small":
        small = train(modern(small_widths(cell["sparsity"]), seed=seed, drop=False), x, given, epochs + more, seed=seed)
    else:
        dense = lab.once(key, make, lambda net: train(net, x, given, epochs, seed=seed))
        small = smaller(dense, cell, x, given, more)
    seconds = time.perf_counter() - start
    test_x, test_y = lab.images("mnist", "test")
    noisy = test_x + NOISE * torch.randn(test_x.shape, generator=torch.Generator().manual_seed(seed))
    return {
        "train": accuracy(small, x, given),
        "test": accuracy(small, test_x, test_y),
        "noisy": accuracy(small, noisy, test_y),
        "params": parameters(small),
        "zeros": zeros(small),
        "seconds": seconds,
    }


def smaller(dense: nn.Module, cell: Cell, x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    """The over-sized net made smaller and trained for the extra epochs."""
    way, seed = cell["way"], cell["seed"]
    if way == "dense":
        return dense
    if way == "factored":
        net = taut.trace(dense, x[:EXAMPLE])
        stats = taut.observe(net, dense, [x[:512]])
        plan = taut.plan(net, stats, taut.Budget(params=1 - cell["sparsity"]), methods=["svd"])
        return train(taut.apply(dense, plan, stats, data=[x[:512]]), x, y, epochs, seed=seed)
    net = dense
    stages = PRUNINGS if way in {"magnitude", "mfbp"} else 1
    for t in range(1, stages + 1):
        if way in {"magnitude", "mfbp"}:
            goal = cell["sparsity"] * (1 - (1 - t / stages) ** 3)
            net = prune(net, x[:EXAMPLE], "sum" if way == "mfbp" else "magnitude", goal)
        else:
            net = modern(WIDE, seed=seed, drop=False)
            net.load_state_dict(dense.state_dict())
        net = bake(train(hold_zeros(net), x, y, epochs // stages, seed=seed + t))
    return net


def mislabelled(y: Tensor, share: float, seed: int) -> Tensor:
    """Labels of which `share` are another class."""
    noise = torch.Generator().manual_seed(seed)
    moved = (y + torch.randint(1, 10, y.shape, generator=noise)) % 10
    return torch.where(torch.rand(y.shape, generator=noise) < share, moved, y)


def small_widths(sparsity: float) -> tuple[int, ...]:
    """A net of two hidden layers with about as many parameters as are left."""
    whole = WIDE[0] * WIDE[1] + WIDE[1] * WIDE[2] + WIDE[2] * WIDE[3]
    width = next(h for h in range(WIDE[1], 0, -1) if 784 * h + h * h + 10 * h <= (1 - sparsity) * whole)
    return (784, width, width, 10)

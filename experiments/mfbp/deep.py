"""Rules side by side on a cubic ramp, by `taut.finetune`: two and five hidden layers, few digits and many."""

from __future__ import annotations

from typing import Any

from lab import Lab, ramped
from mlps import FIVE, WIDE, accuracy, modern, train
from rules import dead, zeros
from torch import nn

from taut.studies import Cell

WIDTHS = {"2 hidden": WIDE, "5 hidden": FIVE}
RULES = (
    "control",
    "sum",
    "magnitude",
    "random",
    "product",
    "reconstruction",
    "source",
    "later text",
    "committed code",
)
MAIN = ("control", "sum", "product", "magnitude", "random")
SPARSITIES = (0.9, 0.95, 0.98)
SMALL, VALID = 4000, 500

LENGTHS = {"few": (30, 10, 1, 1), "longer": (30, 10, 3, 10), "many": (10, 10, 1, 1), "quick": (10, 10, 1, 1)}
"""Images and schedule -> epochs of the dense net, prunings, epochs after each, and after the last."""


def wanted(kind: str, seeds: int) -> list[Cell]:
    """All rules at 98 % of the five-layer net; less of the rest, on one seed, and the longer schedule on two."""
    if kind == "quick":
        return [cell("quick", "5 hidden", 0, 0.98, rule) for rule in MAIN]
    grid = [cell("few", "5 hidden", seed, 0.98, rule) for seed in range(seeds) for rule in RULES]
    grid += [cell("few", "5 hidden", 0, s, rule) for s in SPARSITIES[:-1] for rule in ("sum", "product", "magnitude")]
    grid += [cell("few", "2 hidden", 0, 0.98, rule) for rule in MAIN]
    return grid + [
        cell("longer", "5 hidden", seed, 0.98, rule)
        for seed in range(min(2, seeds))
        for rule in ("control", "sum", "magnitude")
    ]


def cell(images: str, net: str, seed: int, sparsity: float, rule: str) -> Cell:
    """One run."""
    return {"images": images, "net": net, "seed": seed, "sparsity": sparsity, "rule": rule}


def full() -> list[Cell]:
    """The same at 98 % on all 50,000 digits, one seed."""
    return [cell("many", "5 hidden", 0, 0.98, rule) for rule in MAIN[:-1]]


def run(lab: Lab, cell: Cell) -> dict[str, Any]:
    """Accuracy on test images of the dense net, and of the pruned and trained one."""
    epochs, times, between, last = LENGTHS[cell["images"]]
    seed, many = cell["seed"], cell["images"] == "many"
    held = 10_000 if many else VALID
    total = 60_000 if many else SMALL
    # the digits of a seed; with many, all seeds share them
    x, y = lab.part("mnist", total - held, seed=0 if many else 100 + seed)
    valid = lab.part("mnist", held, seed=0 if many else 100 + seed, skip=total - held)
    test_x, test_y = lab.images("mnist", "test")
    if not many:
        test_x, test_y = test_x[::10], test_y[::10]

    def make() -> nn.Module:
        built: nn.Module = modern(WIDTHS[cell["net"]], seed=seed, drop=False)
        return built

    def learn(net: nn.Module) -> nn.Module:
        return train(net, x, y, epochs, valid=valid, seed=seed)

    known = "few" if cell["images"] == "longer" else cell["images"]
    dense = lab.once(f"deep {known} {cell['net']} {seed}", make, learn)
    settings = {"times": times, "epochs": between, "last": last, "seed": seed}
    small = ramped(dense, cell["rule"], cell["sparsity"], (x, y), valid, **settings)
    lab.keep(f"deep {cell['images']} {cell['net']} {seed} {cell['rule']} {cell['sparsity']}", small)
    return {
        "dense": accuracy(dense, test_x, test_y),
        "after": accuracy(small, test_x, test_y),
        "zeros": zeros(small),
        "dead": dead(small),
    }

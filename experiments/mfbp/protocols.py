"""The two protocols of the sources on full MNIST: the finished one (one pruning), and the draft's (a ramp, a curve)."""

from __future__ import annotations

import copy
from typing import Any

from lab import EXAMPLE, Lab
from mlps import FIVE, FOUR, TWO, WIDE, modern, scores, train
from rules import dead, prune, zeros
from torch import nn

from taut.nn import bake, hold_zeros
from taut.studies import Cell
from taut.studies.grid import cells

PUBLISHED = {
    ("2 hidden", 0.7377): (0.99272, 0.99289),
    ("2 hidden", 0.8356): (0.99291, 0.99275),
    ("2 hidden", 0.9383): (0.99293, 0.99068),
    ("4 hidden", 0.6630): (0.99236, 0.99284),
    ("4 hidden", 0.7862): (0.99236, 0.99284),
    ("4 hidden", 0.8980): (0.99201, 0.99223),
}
"""Net and share pruned -> the finished paper's AUC (of labels) before and after."""

WIDTHS = {"2 hidden": TWO, "4 hidden": FOUR}
RULES = ("control", "sum", "product", "magnitude", "random", "source", "later text", "committed code")
MAIN = ("control", "sum", "product", "magnitude")
EXTRA = {("random", level) for _, level in PUBLISHED} | {(rule, 0.8356) for rule in RULES}
"""Rules and levels of the smaller net that one seed tries besides the main ones."""

TRAIN, VALID = 50_000, 10_000

LENGTHS = {"full": (TRAIN, 12, 5), "paper": (TRAIN, 100, 50), "quick": (3_000, 6, 3)}
"""Kind of run -> training images, epochs of the dense net, epochs after the pruning."""


def wanted(kind: str, seeds: int) -> list[Cell]:
    """The main rules at every published level; the others on the first seed of the smaller net."""
    grid = [
        {"kind": kind, "net": net, "seed": seed, "sparsity": level, "rule": rule}
        for seed in range(seeds)
        for net, level in PUBLISHED
        for rule in RULES
        if rule in MAIN or (seed == 0 and kind != "quick" and net == "2 hidden" and (rule, level) in EXTRA)
    ]
    first = {net: min(level for known, level in PUBLISHED if known == net) for net in WIDTHS}
    grid = [c for c in grid if c["rule"] != "control" or c["sparsity"] == first[c["net"]]]  # it prunes nothing
    if kind == "quick":
        grid = [c for c in grid if (c["net"] == "2 hidden" and c["sparsity"] == 0.8356) or c["rule"] == "control"]
    return [c for c in grid if kind != "quick" or c["net"] == "2 hidden"]


def finished(lab: Lab, cell: Cell) -> dict[str, Any]:
    """One pruning of the trained net, then training: scores of the test images before and after."""
    paper = cell["kind"] == "paper"
    images, epochs, more = LENGTHS[cell["kind"]]
    x, y = lab.part("mnist", images)
    valid = lab.part("mnist", VALID, skip=TRAIN)
    seed = cell["seed"]

    def make() -> nn.Module:
        init = 0.01 if paper else None
        built: nn.Module = modern(WIDTHS[cell["net"]], seed=seed, bias=not paper, init=init)
        return built

    def learn(net: nn.Module) -> nn.Module:
        return train(net, x, y, epochs, valid=valid, paper=paper, seed=seed)

    dense = lab.once(f"finished {cell['kind']} {cell['net']} {seed}", make, learn)
    test = lab.images("mnist", "test")
    before = scores(dense, *test)
    small = dense
    if cell["rule"] != "control":
        small = prune(dense, x[:EXAMPLE], cell["rule"], cell["sparsity"], rank=5 if paper else None)
    bare = scores(small, *test)
    tuned = small if paper else without_dropout(small)
    small = bake(train(hold_zeros(tuned), x, y, more, valid=valid, paper=paper, seed=seed + 10))
    after = scores(small, *test)
    return {"before": before, "bare": bare, "after": after, "zeros": zeros(small), "dead": dead(small)}


def without_dropout(net: nn.Module) -> nn.Module:
    """A copy that drops nothing: what is left of a pruned net has no weights to spare (Han et al. 2015)."""
    copied = copy.deepcopy(net)
    for module in copied.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return copied


DRAFT = {"2 hidden": WIDE, "5 hidden": FIVE}
DRAFT_EPOCHS = {"full": (TRAIN, 40, 10), "quick": (2_000, 4, 2)}
"""Kind of run -> images, epochs before the first pruning, prunings (two epochs each)."""

GOAL = 0.9
THRESHOLD = 0.002


def curves(kind: str) -> list[Cell]:
    """Plain and pruned, by our default and by the source's rule with a fixed threshold."""
    ways = ("plain", "sum", "source")
    grid = cells(kind=[kind], net=["2 hidden"] if kind == "quick" else list(DRAFT), way=ways)
    return [cell for cell in grid if (cell["net"], cell["way"]) != ("5 hidden", "source")]


def draft(lab: Lab, cell: Cell) -> dict[str, Any]:
    """AUC on the test images after every epoch; pruned nets: from the middle on, one pruning every second epoch."""
    images, plain, times = DRAFT_EPOCHS[cell["kind"]]
    x, y = lab.part("mnist", images)
    test = lab.images("mnist", "test")
    found: list[dict[str, float]] = []

    def make() -> nn.Module:
        built: nn.Module = modern(DRAFT[cell["net"]], seed=0, bias=False, init=0.01)
        return built

    def each(net: nn.Module) -> None:
        found.append(scores(net, *test) | {"zeros": zeros(net)})

    # a source's curve begins with the epochs that all three share
    if cell["way"] == "plain":
        net = train(make(), x, y, plain, paper=True, each=each)
        lab.keep(f"draft {cell['kind']} {cell['net']}", net)
        train(net, x, y, 2 * times, paper=True, each=each, seed=1)
        return {"curve": found}
    net = lab.once(f"draft {cell['kind']} {cell['net']}", make, lambda net: train(net, x, y, plain, paper=True))
    for t in range(1, times + 1):
        train(hold_zeros(net), x, y, 1, paper=True, each=each, seed=t)
        sparsity = GOAL * (1 - (1 - t / times) ** 3)
        net = prune(bake(net), x[:EXAMPLE], cell["way"], sparsity, rank=50)
        train(hold_zeros(net), x, y, 1, paper=True, each=each, seed=t)
        net = bake(net)
    return {"curve": found}

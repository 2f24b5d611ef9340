"""What pruned nets become: dead units taken out, shared bases, separate factors; bytes and milliseconds, measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from convs import build
from deep import SMALL, VALID, WIDTHS
from lab import EXAMPLE, Lab, ramped
from mlps import accuracy, modern, train
from torch import nn

import taut
from taut.studies import Cell
from taut.studies.grid import cells

BATCHES = (1, 128)
RULES = ("sum", "product", "reconstruction", "magnitude")


def wanted(quick: bool) -> list[Cell]:
    """The nets that the ramps left at 98 %, at two batch sizes."""
    if quick:
        return cells(net=["5 hidden, quick"], rule=["sum", "magnitude"], sparsity=[0.98], batch=[1])
    dense = cells(net=["5 hidden"], rule=RULES, sparsity=[0.98], batch=BATCHES)
    rules = ("sum", "product", "magnitude")
    conv = cells(net=["conv fashion-mnist"], rule=rules, sparsity=[0.98], batch=[1, 32])
    return dense + conv


def run(lab: Lab, cell: Cell) -> dict[str, Any]:
    """The masked net without its dead units, against the dense net."""
    data, x, dense, pruned = nets(lab, cell)
    example = x[: cell["batch"]]
    net = taut.trace(pruned, example)
    small = taut.apply(pruned, taut.Plan.of(net, [taut.whole(net, "dead_units")]), taut.observe(net, pruned))
    test = lab.images(data, "test")
    found = taut.compare(dense, small, None, example)
    assert found.latency is not None
    times = {name: [pair.before, pair.after] for name, pair in found.latency.runtimes.items()}
    best = found.latency.best
    return {
        "accuracy": accuracy(small, *test),
        "masked": accuracy(pruned, *test),
        "dense": accuracy(dense, *test),
        "params": [found.before.params, found.after.params],
        "macs": [found.before.macs, found.after.macs],
        "bytes": [found.before.bytes, found.after.bytes],
        "widths": [list(m.weight.shape) for m in small.modules() if isinstance(m, nn.Linear | nn.Conv2d)],
        "times": times,
        "ms": [best.before, best.after],
        "speedup": best.ratio,
    }


def nets(lab: Lab, cell: Cell) -> tuple[str, torch.Tensor, nn.Module, nn.Module]:
    """Data set, its images, the dense net and the masked one, as the other parts left them."""
    rule, sparsity = cell["rule"], cell["sparsity"]
    if cell["net"].startswith("conv"):
        data = cell["net"].removeprefix("conv ")
        dense, pruned = (lab.read(f"conv {data}{rest}", build()) for rest in ("", f" together {rule} {sparsity}"))
        return data, lab.images(data, "test")[0], dense, pruned
    kind = "quick" if cell["net"].endswith("quick") else "few"
    empty = [modern(WIDTHS["5 hidden"], seed=0, drop=False) for _ in range(2)]
    key = f"deep {kind} 5 hidden 0"
    return (
        "mnist",
        lab.images("mnist", "test")[0],
        lab.read(key, empty[0]),
        lab.read(f"{key} {rule} {sparsity}", empty[1]),
    )


SHARES = (0.025, 0.05, 0.1)
WAYS = ("shared", "svd", "magnitude", "mfbp")
TUNE = 5


def ways(quick: bool) -> list[Cell]:
    """Shared bases, separate factors and masks at equal parameters."""
    return [] if quick else cells(share=SHARES, way=WAYS, seed=[0])


def sharing(lab: Lab, cell: Cell) -> dict[str, Any]:
    """Test accuracy of the five-layer net, untrained and after a few epochs."""
    seed, share, way = cell["seed"], cell["share"], cell["way"]
    train_set = lab.part("mnist", SMALL - VALID, seed=100 + seed)
    valid = lab.part("mnist", VALID, seed=100 + seed, skip=SMALL - VALID)
    test = lab.images("mnist", "test")
    dense = lab.read(f"deep few 5 hidden {seed}", modern(WIDTHS["5 hidden"], seed=seed, drop=False))
    if way in {"magnitude", "mfbp"}:
        rule = "sum" if way == "mfbp" else way
        settings: dict[str, Any] = {"times": 1, "epochs": TUNE, "last": TUNE, "seed": seed}
        small = ramped(dense, rule, 1 - share, train_set, valid, **settings)
        bare = ramped(dense, rule, 1 - share, train_set, valid, **settings | {"epochs": 0, "last": 0})
    else:
        net = taut.trace(dense, train_set[0][:EXAMPLE])
        data = [train_set[0][:1024]]
        stats = taut.observe(net, dense, data)
        if way == "shared":
            plan = taut.Plan.of(net, [allowed(taut.whole(net, "shared", share=share))])
        else:
            plan = taut.plan(net, stats, taut.Budget(params=share), methods=["svd"])
        bare = taut.apply(dense, plan, stats, data=data)
        small = train(taut.apply(dense, plan, stats, data=data), *train_set, TUNE, valid=valid, seed=seed)
    held = [p for p in small.parameters() if p.ndim > 1]
    return {
        "bare": accuracy(bare, *test),
        "after": accuracy(small, *test),
        "dense": accuracy(dense, *test),
        "values": sum(int((p != 0).sum()) for p in held),
        "macs": taut.trace(small, train_set[0][:EXAMPLE]).cost.macs,
    }


def allowed(step: taut.Step) -> taut.Step:
    """The step even where operations grow: sharing is for storage."""
    return replace(step, allow_growth=True)

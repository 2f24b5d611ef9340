"""Pruning, Tucker, both in either order, and both planned together: the same net, images and number of epochs."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from data import load, split_train
from fashion import trained
from googlenet import trained_googlenet
from running import Shuffled, accuracy
from torch import Tensor, nn

import taut
from taut.artifact.manifest import taut_version
from taut.studies import Cell

IMAGES = 8_000
"""Training images of an epoch."""

EPOCHS = 2
"""Of every run: all at once after one step, half after each of two."""

CALIBRATION = 1_024
LOW_RANK = ("svd", "spatial", "tucker")
JOINT = ("channels", *LOW_RANK)
PLANNED = {"joint": JOINT, "planned": LOW_RANK}
"""Ways that a budget decides: channels and ranks in one plan, and ranks alone."""

PRUNED = (0.5, 0.3, 0.18, 0.1)
"""Fractions of MACs that pruning alone keeps."""

KNOBS = (1.4, 1.0, 0.7, 0.45)
"""Factors of the automatic ranks, for Tucker alone."""

BOTH = ((0.8, 1.4), (0.8, 1.0), (0.6, 1.2), (0.5, 0.9))
"""Fraction that pruning keeps, and factor of the automatic ranks of what is left."""

TOO_FAR = ((0.35, 0.8), (0.25, 0.6))
"""Tried first, on one net: they lose far more than the accuracies at which the ways are compared."""

BUDGETS = (0.5, 0.25, 0.1)
"""Fractions of MACs for the joint plan."""

NETS = ("vgg", "resnet")
"""With --paper GoogLeNet, the source's net, as well."""

LARGE = ("googlenet",)
"""One seed."""


def wanted(quick: bool, seeds: int | None, nets: tuple[str, ...] = NETS) -> list[Cell]:
    """All runs; GoogLeNet, Taylor scores, and what was tried first, with one seed."""
    if quick:
        ways = [("control", None), ("prune", [0.4]), ("tucker", [0.8]), ("prune-tucker", [0.6, 0.9])]
        ways.append(("tucker-prune", [0.6, 0.9]))
        return [{"net": "resnet", "way": way, "level": level, "seed": 0} for way, level in ways]
    cells = []
    for net in nets:
        for seed in range(1 if net in LARGE else seeds or 1):
            cells += [_cell(net, "control", None, seed)]
            cells += [_cell(net, "prune", [macs], seed) for macs in PRUNED]
            cells += [_cell(net, "tucker", [knob], seed) for knob in KNOBS]
            cells += [_cell(net, "prune-tucker", list(pair), seed) for pair in BOTH]
            cells += [_cell(net, "tucker-prune", list(pair), seed) for pair in BOTH]
            cells += [_cell(net, way, [macs], seed) for macs in BUDGETS for way in PLANNED]
    cells += [_cell("resnet", "prune-tucker", list(pair), 0) for pair in TOO_FAR]
    cells += [_cell("vgg", "prune-taylor", [macs], 0) for macs in PRUNED[:2]]
    return cells


def mark(folder: str | None) -> str:
    """What all runs depend on beside their settings."""
    x, y, _, _, test_x, test_y = images(folder)
    digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in (y, test_y, x[:100], test_x[:100]))).hexdigest()[:12]
    return f"taut {taut_version()}, torch {torch.__version__}, data {digest}, {(IMAGES, EPOCHS, CALIBRATION)}"


def _cell(net: str, way: str, level: list[float] | None, seed: int) -> Cell:
    return {"net": net, "way": way, "level": level, "seed": seed}


def net_of(name: str) -> nn.Module:
    """A trained net in eval mode."""
    return trained_googlenet() if name == "googlenet" else trained(name)


@cache
def images(folder: str | None) -> tuple[Tensor, ...]:
    """Training, validation and test images with labels."""
    place = None if folder is None else Path(folder)
    return (*split_train("fashion-mnist", place), *load("fashion-mnist", "test", place))


def automatic(net: Any, knob: float) -> list[taut.Step]:
    """Tucker-2 of every convolution with a kernel, SVD of every Linear but the classifier, ranks by the weights."""
    free = [layer for layer in net.layers if layer.skip is None]
    last = [layer.name for layer in free if layer.kind == "Linear"][-1:]
    steps = []
    for layer in free:
        method = "tucker" if layer.kernel and max(layer.kernel) > 1 else "svd"
        alone = min(layer.weight[0] // layer.groups, layer.weight[1]) < 2
        if layer.name in last or alone or (method == "svd" and layer.kernel):
            continue
        steps.append(taut.Step((layer.name,), method, {"vbmf": knob}))
    return steps


def run(place: Cell, cell: Cell) -> dict[str, Any]:
    """One net compressed and tuned: its size, and its accuracy on test images."""
    x, y, valid_x, valid_y, test_x, test_y = images(place["folder"])
    if place["quick"]:
        test_x, test_y = test_x[:2000], test_y[:2000]
    model = net_of(cell["net"])
    net = taut.trace(model, x[:2])
    epochs = 2 if place["quick"] else EPOCHS
    work = _Work(model, net, (x, y, valid_x, valid_y), epochs, 2_000 if place["quick"] else IMAGES, cell["seed"])
    small = work.carried_out(cell["way"], cell["level"], kept(place, cell, mark(place["folder"])))
    cost = taut.trace(small, x[:2]).cost
    return {
        "accuracy": accuracy(small, test_x, test_y),
        "params": cost.params / net.cost.params,
        "macs": cost.macs / net.cost.macs,
        "dense": accuracy(model, test_x, test_y),
    }


def kept(place: Cell, cell: Cell, made: str) -> Path:
    """Where the untrained net of a cell stays for the other seeds; `made` says what it depends on beside the cell."""
    digest = hashlib.sha256(made.encode()).hexdigest()[:8]
    name = f"{'quick-' * place['quick']}{cell['net']}-{cell['way']}-{cell['level']}-{digest}.pt"
    return Path(place["out"]) / "plans" / name


class _Work:
    """A net and the images that it is tuned on."""

    def __init__(
        self, model: nn.Module, net: Any, data: tuple[Tensor, ...], epochs: int, count: int, seed: int
    ) -> None:
        self.model, self.net, self.data, self.epochs, self.count, self.seed = model, net, data, epochs, count, seed
        rows = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(0))[:CALIBRATION]
        self.batches = list(data[0][rows].split(256))

    def carried_out(self, way: str, level: list[float] | None, path: Path) -> nn.Module:
        """The compressed and tuned net; what a budget decides serves all seeds and is kept at `path`."""
        if way == "control" or level is None:
            return self.tuned(self.model, [], [self.epochs])
        if way in {"prune", "prune-taylor"}:
            return self.tuned(self.model, [[self.pruning(self.net, level[0], way)]], [self.epochs])
        if way == "tucker":
            return self.tuned(self.model, [automatic(self.net, level[0])], [self.epochs])
        half = self.epochs // 2
        if way == "prune-tucker":
            steps = [[self.pruning(self.net, level[0], way)], automatic(self.net, level[1])]
            return self.tuned(self.model, steps, [half, half])
        if way == "tucker-prune":
            first = self.tuned(self.model, [automatic(self.net, level[1])], [half])
            net = taut.trace(first, self.data[0][:2])
            return self.tuned(first, [[self.pruning(net, level[0], way)]], [half])
        return self.tuned(self.planned(way, level[0], path), [], [self.epochs])

    def planned(self, way: str, macs: float, path: Path) -> nn.Module:
        """What a budget decides, untrained."""
        if not path.exists():
            budget = taut.Budget(macs=macs)
            found = taut.compress(self.model, self.data[0][:2], budget=budget, data=self.batches, methods=PLANNED[way])
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(found.model, draft := path.with_suffix(f".{os.getpid()}"))
            draft.replace(path)
        small: nn.Module = torch.load(path, weights_only=False)
        return small

    def pruning(self, net: Any, macs: float, way: str) -> taut.Step:
        """Channels out of the whole network."""
        criterion = "taylor" if way == "prune-taylor" else "obs"
        return taut.whole(net, "channels", macs=macs, criterion=criterion)

    def tuned(self, model: nn.Module, groups: list[list[taut.Step]], epochs: list[int]) -> nn.Module:
        """Steps carried out group by group, with training after each."""
        x, y, valid_x, valid_y = self.data
        net = taut.trace(model, x[:2])
        stages, steps = [], []
        for number, count in enumerate(epochs):
            mine = groups[number] if number < len(groups) else []
            stages.append(taut.Stage(tuple(range(len(steps), len(steps) + len(mine))), epochs=count))
            steps += mine
        stats = taut.observe(net, model, self.batches)
        return taut.finetune(
            model,
            taut.Plan.of(net, steps) if steps else None,
            stats,
            Shuffled(x, y, self.count),
            lambda small: accuracy(small, valid_x, valid_y),
            loss=nn.functional.cross_entropy,
            schedule=tuple(stages),
            seed=self.seed,
        )

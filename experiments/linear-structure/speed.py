"""Time of the first two layers and their replacements at real shapes, best runtime against best runtime.

Weights are random: time does not depend on them. The replacements stand alone, as they do inside the net once the
orders of their clusters are folded into the neighbours. Every runtime runs the original and all replacements of a
layer in turns; ratios are of medians.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from shapes import net
from torch import Tensor, nn

import taut
from taut.core.example import Example
from taut.measure.onnx import to_onnx
from taut.measure.runtimes import Subject, chosen

MONOCHROMATIC = (3, 4, 6, 8, 12, 16, 24)
OUTER = (6, 8, 10, 12, 16)
SVD = ((16, 24), (16, 32), (19, 24), (19, 64), (24, 24), (24, 48), (32, 64))
QUICK = {"conv1": {"monochromatic 6"}, "conv2": {"outer 6", "bicluster 19 24", "bicluster 19 64"}}


def forms() -> dict[str, dict[str, Any]]:
    """Layer -> name of the form -> method."""

    def made(name: str, **settings: Any) -> Any:
        return taut.methods.resolve(taut.Step((), name, settings))

    mono = {f"monochromatic {k}": made("monochromatic", colours=k, reorders="") for k in MONOCHROMATIC}
    outer = {f"outer {k}": made("outer", inputs=48, outputs=2, rank=k, reorders="") for k in OUTER}
    svds = {
        f"bicluster {i} {o}": made("bicluster", inputs=2, outputs=2, rank_in=i, rank_out=o, reorders="") for i, o in SVD
    }
    return {"conv1": mono, "conv2": {**outer, **svds}}


def inputs(batch: int) -> dict[str, Tensor]:
    """What the two layers read."""
    generator = torch.Generator().manual_seed(0)
    return {
        "conv1": torch.randn(batch, 3, 224, 224, generator=generator),
        "conv2": torch.randn(batch, 96, 54, 54, generator=generator),
    }


@torch.no_grad()
def measure(layer: str, batch: int, rounds: int, *, quick: bool = False) -> dict[str, Any]:
    """Milliseconds of the original and of every form in every runtime, and the speedups."""
    model = net()
    x = inputs(batch)[layer]
    group = taut.trace(model, torch.zeros(1, 3, 224, 224)).group([layer])
    built: dict[str, nn.Module] = {"original": model.get_submodule(layer)}
    methods = {name: m for name, m in forms()[layer].items() if not quick or name in QUICK[layer]}
    for name, method in methods.items():
        built[name] = method.skeleton(group)[layer].eval()
        for parameter in built[name].parameters():
            nn.init.normal_(parameter, std=0.02)
    times = _all_times(built, x, rounds)
    best = {name: min(found[name] for found in times.values()) for name in built}
    cost = group.cost.macs
    return {
        "layer": layer,
        "batch": batch,
        "ms": times,
        "best_ms": best,
        "speedup": {name: best["original"] / best[name] for name in methods},
        "fewer_macs": {name: cost / method.cost(group).macs for name, method in methods.items()},
    }


def _all_times(models: dict[str, nn.Module], x: Tensor, rounds: int) -> dict[str, dict[str, float]]:
    """Runtime -> model -> median milliseconds; every model is exported once."""
    with tempfile.TemporaryDirectory() as folder:
        subjects = {
            name: _subject(model, x, Path(folder) / f"{place}.onnx")
            for place, (name, model) in enumerate(models.items())
        }
        fit = [r for r in chosen() if all(r.refuses(subject) is None for subject in subjects.values())]
        return {runtime.name: _timed(runtime, subjects, rounds) for runtime in fit}


def _timed(runtime: Any, subjects: dict[str, Subject], rounds: int) -> dict[str, float]:
    """All models in turns; where sessions of a runtime disturb each other (ONNX Runtime), one session at a time."""
    found: dict[str, list[float]] = {name: [] for name in subjects}
    if runtime.name != "onnxruntime":
        found = _laps({name: runtime.build(subject) for name, subject in subjects.items()}, rounds)
    else:
        for _ in range(3):
            for name, subject in subjects.items():
                found[name] += _laps({name: runtime.build(subject)}, max(5, rounds // 2))[name]
    return {name: 1000 * statistics.median(laps) for name, laps in found.items()}


def _subject(model: nn.Module, x: Tensor, path: Path) -> Subject:
    example = Example(model, x)

    def onnx() -> Path:
        if not path.exists():
            to_onnx(model, example, path)
        return path

    return Subject(model, example, onnx)


def _laps(runs: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    laps: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 3):
        for name, (run, given) in runs.items():
            start = time.perf_counter()
            run(given)
            if turn >= 3:
                laps[name].append(time.perf_counter() - start)
    return laps


@torch.no_grad()
def breakdown(batch: int, rounds: int) -> dict[str, float]:
    """Share of every layer in the forward time of the whole net, eager, the layers one after the other."""
    model, x = net(), torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    spent: dict[str, list[float]] = {name: [] for name, _ in model.named_children()}
    for turn in range(rounds + 2):
        y = x
        for name, layer in model.named_children():
            start = time.perf_counter()
            y = layer(y)
            if turn >= 2:
                spent[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(laps) for name, laps in spent.items()}
    total = sum(medians.values())
    return {name: value / total for name, value in medians.items()}


PAIRS = {"first two": "outer 8", "first two, SVDs": "bicluster 16 32"}
"""What stands for conv2 behind the monochromatic conv1: the source's cascade, and the fastest form of the second."""


@torch.no_grad()
def first_two(kind: str, batch: int, rounds: int) -> dict[str, Any]:
    """The first two layers with all between them, original and compressed (C' = 6 first), best against best."""
    model, x = net(), inputs(batch)["conv1"]
    network = taut.trace(model, torch.zeros(1, 3, 224, 224))
    part = nn.Sequential(*list(model.children())[:6])
    small = nn.Sequential(*list(model.children())[:6])
    found = forms()
    for place, name, form in ((0, "conv1", "monochromatic 6"), (3, "conv2", PAIRS[kind])):
        method = found[name][form]
        # the order of conv1's outputs is left to conv2; where its first layer is grouped, that one order is not folded
        method = replace(method, reorders="i") if form.startswith("outer") else method
        small[place] = method.skeleton(network.group([name]))[name]
    for parameter in small.parameters():
        nn.init.normal_(parameter, std=0.02)
    models = {"original": part.eval(), "cascade": small.eval()}
    times = _all_times(models, x, rounds)
    best = {name: min(ms[name] for ms in times.values()) for name in models}
    return {"ms": times, "best_ms": best, "speedup": best["original"] / best["cascade"]}

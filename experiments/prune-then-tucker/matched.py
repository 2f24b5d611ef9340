"""Curves at matched accuracy: how many times smaller a way makes a net before it loses so many points."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

WAYS = ("prune", "tucker", "prune-tucker", "tucker-prune", "planned", "joint", "prune-taylor")
TECHNIQUES = ("prune", "tucker")
"""The source's two techniques."""

COMPARED = (
    ("prune-tucker", TECHNIQUES),
    ("tucker-prune", TECHNIQUES),
    ("joint", TECHNIQUES),
    ("joint", (*TECHNIQUES, "planned")),
)
"""Combinations, and the single ways that they have to beat."""

TITLES = {
    "prune": "pruning",
    "tucker": "Tucker",
    "prune-tucker": "pruning, then Tucker",
    "tucker-prune": "Tucker, then pruning",
    "planned": "planned ranks",
    "joint": "one plan of both",
    "prune-taylor": "pruning by Taylor scores",
}
DROPS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
"""Points of test accuracy below the uncompressed control with the same training."""


def matched(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every net, drop and size measure the factor of every way, a geometric mean over seeds.

    A way has a factor where every seed's curve reaches down to that accuracy; curves are straight between measured
    points (accuracy over the logarithm of the factor), from the control on, and nothing is extrapolated.
    """
    found = []
    for net in dict.fromkeys(row["net"] for row in rows):
        for drop in DROPS:
            for key in ("params", "macs"):
                factors = {way: _factor([r for r in rows if r["net"] == net], way, key, drop) for way in WAYS}
                known = {way: value for way, value in factors.items() if value is not None}
                if len(known) > 1:
                    found.append({"net": net, "drop": drop, "size": key, **known})
    return found


def _factor(rows: Sequence[dict[str, Any]], way: str, key: str, drop: float) -> float | None:
    logs = []
    for seed in sorted({row["seed"] for row in rows if row["way"] == way}):
        mine = [row for row in rows if row["seed"] == seed]
        control = next((row["accuracy"] for row in mine if row["way"] == "control"), None)
        if control is None:
            return None
        points = [(1.0, control), *((1 / row[key], row["accuracy"]) for row in mine if row["way"] == way)]
        log = reached(points, control - drop / 100)
        if log is None:
            return None
        logs.append(log)
    return math.exp(sum(logs) / len(logs)) if logs else None


def reached(points: Iterable[tuple[float, float]], accuracy: float) -> float | None:
    """The logarithm of the largest factor at which the curve is still as accurate; None if it never falls below."""
    curve = sorted((math.log(factor), value) for factor, value in points)
    for place in range(len(curve) - 1, 0, -1):
        (x0, y0), (x1, y1) = curve[place - 1], curve[place]
        if y1 >= accuracy:
            return None if place == len(curve) - 1 else x1
        if y0 >= accuracy > y1:
            return x0 + (x1 - x0) * (y0 - accuracy) / (y0 - y1)
    return None


def gains(
    table: Sequence[dict[str, Any]], way: str = "prune-tucker", against: Sequence[str] = TECHNIQUES
) -> list[dict[str, Any]]:
    """The factor of a way over that of the best single one, minus one, wherever all are known."""
    known = [row for row in table if way in row and all(single in row for single in against)]
    return [
        {
            **{key: row[key] for key in ("net", "drop", "size")},
            "gain": row[way] / max(row[single] for single in against) - 1,
        }
        for row in known
    ]


def draw(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """curves.svg: accuracy over the factor of parameters and of MACs, a row of panels for every net."""
    nets = list(dict.fromkeys(row["net"] for row in rows))
    figure, axes = plt.subplots(len(nets), 2, figsize=(10, 3.4 * len(nets)), squeeze=False)
    for panels, net in zip(axes, nets, strict=True):
        mine = [row for row in rows if row["net"] == net]
        control = [row["accuracy"] for row in mine if row["way"] == "control"]
        for axis, key in zip(panels, ("params", "macs"), strict=True):
            for way in WAYS:
                points: dict[str, list[tuple[float, float]]] = defaultdict(list)
                for row in mine:
                    if row["way"] == way:
                        points[str(row["level"])].append((1 / row[key], row["accuracy"]))
                if points:
                    means = sorted(tuple(sum(c) / len(c) for c in zip(*p, strict=True)) for p in points.values())
                    axis.plot(*zip(*means, strict=True), marker="o", markersize=3, label=TITLES[way])
            axis.axhline(sum(control) / len(control), color="grey", linewidth=0.8, linestyle="--", label="control")
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:g}x"))
            axis.set_xlabel({"params": "fewer parameters", "macs": "fewer multiply-accumulates"}[key])
            axis.set_ylabel(f"{net}: test accuracy")
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out / "curves.svg", metadata={"Date": None})
    plt.close(figure)

"""The figures of the study."""

from __future__ import annotations

import statistics
from pathlib import Path

from matplotlib.figure import Figure
from sheets import NAMES, WAYS, Row, pick
from torch import Tensor


def draw_curves(rows: list[Row], path: Path) -> None:
    """What the true AUC on the test images lacks to 1, over the epochs."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    colours = {"2 hidden": "C0", "5 hidden": "C3"}
    lines = {"plain": "-", "sum": "--", "source": ":"}
    plain = {row["net"]: row["curve"] for row in rows if row["way"] == "plain"}
    for row in rows:
        curve = [1 - point["auc"] for point in row["curve"]]
        start = len(plain[row["net"]]) - len(curve)
        axes.plot(
            range(start + 1, start + 1 + len(curve)),
            curve,
            lines[row["way"]],
            color=colours[row["net"]],
            label=f"{row['net']}, {WAYS[row['way']]}",
        )
    axes.set_xlabel("epoch")
    axes.set_ylabel("1 - mean one-vs-rest AUC, test images")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)


def draw_basis(basis: Tensor, path: Path) -> None:
    """Columns of the first basis as images: what the network's input is described by."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(4, 10)
    for place, axes in enumerate(panels.flat):
        column = basis[:, place].reshape(28, 28)
        limit = float(column.abs().max()) or 1.0
        axes.imshow(column, cmap="coolwarm", vmin=-limit, vmax=limit)
        axes.set_axis_off()
    figure.suptitle("Columns of the first basis G_0 (784 inputs)")
    figure.savefig(path)


def draw_ramps(rows: list[Row], path: Path) -> None:
    """Accuracy over sparsity of the rules on the same ramp."""
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    mine = pick(rows, images="few", net="5 hidden")
    for rule in dict.fromkeys(row["rule"] for row in mine):
        some = pick(mine, rule=rule)
        levels = sorted({row["sparsity"] for row in some})
        means = [statistics.mean(r["after"] for r in pick(some, sparsity=s)) for s in levels]
        if rule == "control":
            axes.axhline(means[0], color="grey", lw=0.8, label=NAMES[rule])
        else:
            axes.plot([100 * s for s in levels], means, "o-", label=NAMES[rule])
    axes.set_xlabel("weights pruned, %")
    axes.set_ylabel("accuracy, test digits")
    axes.set_title("Five hidden layers, 3,500 images, mean of the seeds", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path)

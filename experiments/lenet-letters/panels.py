"""The figures: the two panels of Figure 4, printed and ours, and all methods over bytes and latency."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter
from printed import Row, mean, pick
from reductions import PUBLISHED

SECTIONS = {"fc": ("magnitude fc", "svd fc"), "conv": ("magnitude conv", "cp conv")}
NAMES = {"fc": "fully connected layers", "conv": "convolutions"}


def draw_shares(rows: list[Row], path: Path) -> None:
    """Accuracy over the share of the section that is kept."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    control = mean(pick(rows, way="control")) if pick(rows, way="control") else None
    for axes, (section, experiments) in zip(figure.subplots(1, 2, sharey=True), SECTIONS.items(), strict=True):
        for place, experiment in enumerate(experiments):
            text = pick(rows, experiment=experiment, way="text")
            levels = sorted({row["level"] for row in text})
            shares = [pick(text, level=level)[0]["share"] for level in levels]
            ours = [100 * mean(pick(text, level=level)) for level in levels]
            printed = [PUBLISHED[experiment, level][2] for level in levels]
            method = experiment.split()[0]
            axes.plot(shares, ours, "o-", color=f"C{place}", label=f"{method}, ours")
            axes.plot(shares, printed, "x--", color=f"C{place}", alpha=0.6, label=f"{method}, printed (EMNIST)")
        if control is not None:
            axes.axhline(100 * control, color="grey", lw=0.8, label="ours, not reduced")
        axes.axhline(91.1, color="grey", lw=0.8, ls="--", label="printed, not reduced")
        axes.set_title(NAMES[section], fontsize=10)
        axes.set_xlabel("share of the section's weights kept, %")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="lower right")
        if section == "fc":
            axes.set_ylabel("test accuracy, %")
    figure.savefig(path)


def draw_methods(studies: dict[str, dict[str, list[Row]]], path: Path) -> None:
    """Accuracy after training over the zipped file and over latency, a row of panels per net."""
    figure = Figure(figsize=(10, 3.4 * len(studies) + 0.6), layout="constrained")
    grid: Any = figure.subplots(len(studies), 2, squeeze=False)
    known: dict[str, Any] = {}
    for panels, (net, kinds) in zip(grid, studies.items(), strict=True):
        rows = [row for row in kinds["trained"] if row["accuracy"] is not None]
        floor = min(row["accuracy"] for row in rows if row["method"] in {"original", "control"}) - 0.12
        lost = sum(row["accuracy"] < floor for row in rows)
        for axes, key, label in zip(panels, ("zipped", "ms"), ("file after zlib, bytes", "ms, 32 images"), strict=True):
            for row in rows:
                method = row["method"].partition("(")[0]
                place = list(known).index(method) if method in known else len(known)
                style = {"color": f"C{place % 10}", "marker": "*os^vDP"[place % 7], "linestyle": ""}
                drawn = axes.plot(row[key], 100 * max(row["accuracy"], floor), **style)
                known.setdefault(method, drawn[0])
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter() if key == "zipped" else ScalarFormatter())
            axes.set_xlabel(label)
            axes.set_ylabel("test accuracy, %")
            below = f"; {lost} below {100 * floor:.0f} % stand at the edge" if lost else ""
            axes.set_title(f"{net}, trained further alike{below}", fontsize=9)
            axes.grid(alpha=0.3)
    figure.legend(known.values(), known, loc="outside lower center", ncols=8, fontsize=8)
    figure.savefig(path)

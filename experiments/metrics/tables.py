"""The table and the figure of the study."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from plans import WAYS

from taut.studies import Bound

Rows = Sequence[Mapping[str, Any]]


def _head(*names: str) -> list[str]:
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]


def _spread(values: list[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def _untrained(rows: Rows, dense: Mapping[str, float]) -> list[str]:
    lines = ["## Untrained: test accuracy, mean over calibration seeds ± standard deviation", ""]
    for net in dense:
        mine = [row for row in rows if row["net"] == net]
        times = sorted({row["times"] for row in mine})
        lines += [f"{net}, dense {dense[net]:.4f}:", ""]
        lines += _head("plan", *(f"MACs /{t}, {kind}" for t in times for kind in ("bare", "refitted")))
        for way in [way for way in WAYS if any(row["way"] == way for row in mine)]:
            found = [
                _spread([row[kind] for row in mine if (row["way"], row["times"]) == (way, t)])
                for t in times
                for kind in ("bare", "refitted")
            ]
            lines.append(f"| {way} | " + " | ".join(found) + " |")
        lines.append("")
    return lines


def _tuned(rows: Rows, points: Mapping[str, int]) -> list[str]:
    lines = ["## Fine-tuned alike: test accuracy before -> after", ""]
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    for net, times in points.items():
        lines += [f"{net} at MACs /{times} (the control is not compressed):", ""]
        lines += _head("net", "MACs", "parameters", "before", *(f"after {length}" for length in lengths))
        for way in dict.fromkeys(row["way"] for row in rows):
            mine = {row["length"]: row for row in rows if (row["net"], row["way"]) == (net, way)}
            first = next(iter(mine.values()))
            after = " | ".join(f"{mine[length]['after']:.4f}" if length in mine else "-" for length in lengths)
            sizes = " | ".join(f"{first[key]:.2f}x fewer" for key in ("macs", "params"))
            lines.append(f"| {way} | {sizes} | {first['before']:.4f} | {after} |")
        lines.append("")
    return lines


def markdown(
    untrained: Rows, tuned: Rows, dense: Mapping[str, float], points: Mapping[str, int], remarks: Sequence[Bound | str]
) -> str:
    """Both tables; the bounds and what was skipped."""
    lines = ["# What counts as damage, and what recovery brings", "", *_untrained(untrained, dense)]
    lines += [*_tuned(tuned, points), "## Bounds", "", *(f"- {remark}" for remark in remarks)]
    return "\n".join(lines) + "\n"


def draw(rows: Rows, dense: Mapping[str, float], path: Path) -> None:
    """Accuracy over MACs: a panel per net, bare dashed, refitted solid."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for place, net in enumerate(dense):
        axes = figure.add_subplot(1, len(dense), place + 1)
        for colour, way in enumerate(WAYS):
            mine = [row for row in rows if (row["net"], row["way"]) == (net, way)]
            times = sorted({row["times"] for row in mine})
            if not mine:
                continue
            for kind, style in (("refitted", "-"), ("bare", "--")):
                means = [statistics.mean(row[kind] for row in mine if row["times"] == t) for t in times]
                axes.plot(
                    times, means, style, marker="o", color=f"C{colour}", label=way if kind == "refitted" else None
                )
        axes.axhline(dense[net], color="0.6", linewidth=1, label="dense")
        axes.set_xscale("log", base=2)
        axes.set_xticks(times, [f"/{t}" for t in times])
        axes.set(title=net, xlabel="MACs", ylabel="test accuracy" if not place else "")
        axes.legend(fontsize=8, title="solid refitted, dashed bare", title_fontsize=8)
    figure.savefig(path)

"""The table of the study, and its bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from taut.studies import Bound

Rows = Sequence[Mapping[str, Any]]

HEAD = ("net", "calibration", "Linear weights", "parameters", "file", "MACs", "cosine", "reciprocal rank", "lost, 95 %")


def _of(rows: Rows, way: str) -> list[float]:
    """Percents lost, by seed."""
    return [row["lost_percent"] for row in rows if row["way"] == way]


def _line(row: Mapping[str, Any]) -> str:
    sizes = [f"{row[key]:.2f}x fewer" for key in ("linear", "params", "bytes", "macs")]
    lost = f"{row['lost_percent']:.2f} % ({row['lost_low']:.2f} to {row['lost_high']:.2f})"
    parts = [row["way"], str(row["seed"]), *sizes, f"{row['cosine']:.4f}", f"{row['mrr']:.4f}", lost]
    return "| " + " | ".join(parts) + " |"


def markdown(untrained: Rows, distilled: Rows, bounds: Sequence[Bound]) -> str:
    """The page table.md."""
    head = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines = ["# all-MiniLM-L6-v2", "", "## Untrained", "", *head, *map(_line, untrained), ""]
    lines += ["## Distilled without labels", ""]
    for row in distilled:
        lines.append(
            f"- {row['way']}: {row['texts']:,} texts, {row['epochs']} epochs, {row['minutes']:.1f} minutes on "
            f"{row['threads']} threads"
        )
    lines += ["", *head, *map(_line, distilled), ""]
    lines += ["## Bounds", "", *(f"- {bound}" for bound in bounds or ["No bound was tested."])]
    return "\n".join(lines) + "\n"


def limits(untrained: Rows, distilled: Rows) -> list[Bound]:
    """What is asked of the default call, alone and beside the peers, and of distillation; of what has run so far."""
    ours, file, tuned = (_of(untrained, "taut"), _of(untrained, "taut, file"), _of(distilled, "taut"))
    bounds = [
        Bound("times fewer Linear weights", 2.0, min(row["linear"] for row in untrained if row["way"] == "taut")),
        Bound("untrained, half the Linear weights: percent lost, mean over draws", 5.0, mean(ours), at_most=True),
    ]
    peers = [mean(_of(untrained, way)) for way in {row["way"] for row in untrained if "SVD" in row["way"]}]
    if peers:
        bounds.append(Bound("the same, less than the best peer", min(peers), mean(ours), at_most=True))
    if file:
        size = next(row["bytes"] for row in untrained if row["way"] == "taut, file")
        bounds.append(Bound("times smaller file", 2.5, size))
        bounds.append(Bound("untrained, that file: percent lost", 5.0, file[0], at_most=True))
    rounded = _of(untrained, "taut, file in half precision")
    if rounded:
        bounds.append(Bound("a file of that size in half precision: percent lost", 5.0, rounded[0], at_most=True))
    if trained := _of(distilled, "taut, file"):
        bounds.append(Bound("that file distilled: percent lost", 5.0, trained[0], at_most=True))
    if tuned:
        bounds.append(Bound("distilled: percent lost", 2.0, tuned[-1], at_most=True))
    return bounds

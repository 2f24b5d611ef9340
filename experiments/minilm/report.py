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
    minutes = ", ".join(f"{row['way']} {row['minutes']:.1f} minutes on {row['threads']} threads" for row in distilled)
    lines = ["# all-MiniLM-L6-v2", "", "## Untrained", "", *head, *map(_line, untrained), ""]
    lines += ["## Distilled without labels", "", f"{minutes}.", "", *head, *map(_line, distilled), ""]
    lines += ["## Bounds", "", *(f"- {bound}" for bound in bounds or ["No bound was tested."])]
    return "\n".join(lines) + "\n"


def limits(untrained: Rows, distilled: Rows) -> list[Bound]:
    """What is asked of the default call, alone and beside the peers, and of distillation."""
    ours = _of(untrained, "taut")
    peers = {row["way"] for row in untrained if "SVD" in row["way"]}
    best = min(mean(_of(untrained, way)) for way in peers)
    file = next(row for row in untrained if row["way"] == "taut, file")
    return [
        Bound("times fewer Linear weights", 2.0, min(row["linear"] for row in untrained if row["way"] == "taut")),
        Bound("untrained, half the Linear weights: percent lost, mean over seeds", 5.0, mean(ours), at_most=True),
        Bound("the same below the best peer's", best, mean(ours), at_most=True),
        Bound("times smaller file", 2.5, file["bytes"]),
        Bound("untrained, that file: percent lost", 5.0, file["lost_percent"], at_most=True),
        Bound("distilled: percent lost", 2.0, *_of(distilled, "taut"), at_most=True),
    ]

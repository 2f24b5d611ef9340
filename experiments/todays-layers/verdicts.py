"""What is chosen on validation samples, the bounds, and the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from sides import CONTROL, OURS

from taut.studies import Bound

Row = Mapping[str, Any]
Rows = Sequence[Row]
Units = Mapping[str, tuple[str, str]]
"""Net -> what its score is called, and what differences of it are."""

HEAD = ("net", "MACs", "", "control", "side", "its score", "Torch-Pruning", "best way", "MACs left", "above it, 95 %")


def best_peer(rows: Rows, net: str, macs: float) -> str | None:
    """The peer's way of the highest validation score at a point; None where none runs."""
    found = [
        row
        for row in rows
        if (row["net"], row["macs"]) == (net, macs) and row["side"] not in (*OURS, CONTROL) and "error" not in row
    ]
    return max(found, key=lambda row: row["valid"])["side"] if found else None


def best_rate(rows: Rows) -> float:
    """The learning rate of the highest validation score, on the mean over the nets that tried all of them."""
    rates = dict.fromkeys(row["rate"] for row in rows)
    return max(rates, key=lambda rate: mean(row["valid"] for row in rows if row["rate"] == rate))


def point(row: Row) -> str:
    """A net, its size, whether it was trained, and who made it, in words."""
    trained = "untrained" if row["rate"] is None else "trained equally"
    return f"{row['net']}, MACs /{1 / row['macs']:g}, {trained}, {row['side']}"


def ratios(runtimes: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """How many times faster ours is than the peer's: in each runtime, and each side in its fastest."""
    theirs, ours = (min(times[f"{side}_ms"] for times in runtimes.values()) for side in ("theirs", "ours"))
    return {runtime: times["faster"] for runtime, times in runtimes.items()} | {"fastest beside fastest": theirs / ours}


def limits(made: Rows, tested: Rows, units: Units) -> list[Bound]:
    """Ours above the peer's at every point, within the budget; the control does not fall by the training."""
    if not any("above" in row for row in tested):
        return []
    bounds = [
        Bound(f"{row['net']}: share of the MACs left by {row['side']}", row["macs"], row["macs_left"], at_most=True)
        for row in made
        if row["side"] in OURS
    ]
    for row in tested:
        if "above" in row:
            name = f"{point(row)}: {units[row['net']][1]} above Torch-Pruning"
            bounds.append(Bound(f"{name} ({row['above_low']:.2f} to {row['above_high']:.2f})", 0.0, row["above"]))
    for row in {row["net"]: row for row in tested if row["rate"] is not None}.values():
        name = f"{row['net']}: {units[row['net']][1]} that the control gained by the training"
        bounds.append(Bound(name, 0.0, row["gained"]))
    return bounds


def _line(row: Row, made: Rows, unit: str, points: str) -> str:
    digits = 2 if unit == "PSNR" else 4
    theirs = f"{row['theirs']:.{digits}f}" if "theirs" in row else "does not run"
    above = (
        f"{row['above']:+.2f} {points} ({row['above_low']:+.2f} to {row['above_high']:+.2f})" if "above" in row else ""
    )
    parts = [row["net"], f"/{1 / row['macs']:g}", "untrained" if row["rate"] is None else f"trained, {row['rate']:g}"]
    parts += [f"{row['control']:.{digits}f}", row["side"], f"{row['ours']:.{digits}f}"]
    same = [
        each for each in made if all(each[key] == row[key] for key in ("net", "macs")) and each["side"] == row["peer"]
    ]
    parts += [
        theirs,
        (row["peer"] or "").removeprefix("Torch-Pruning "),
        *(f"{each['macs_left']:.3f}" for each in same),
    ]
    return "| " + " | ".join([*parts, *([] if same else [""]), above]) + " |"


def _sizes(made: Rows, tuned: Rows, rates: Mapping[str, float | None]) -> list[str]:
    names = ("net", "side", "MACs left", "parameters left", "validation, untrained", "validation, trained", "seconds")
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in made:
        after = [
            other["valid"]
            for other in tuned
            if all(other[key] == row[key] for key in ("net", "side", "macs")) and other["rate"] == rates[row["net"]]
        ]
        if "error" in row:
            lines.append(f"| {row['net']} | {row['side']} | {row['error']} | | | | |")
            continue
        parts = [f"{row[key]:.4f}" for key in ("macs_left", "params_left", "valid")]
        parts += [f"{after[0]:.4f}" if after else "", f"{row['seconds']:.0f}"]
        lines.append(f"| {row['net']} | {row['side']} | " + " | ".join(parts) + " |")
    return lines


def markdown(
    made: Rows, tuned: Rows, tested: Rows, units: Units, bounds: Sequence[Bound], absent: Mapping[str, str]
) -> str:
    """The page table.md."""
    lines = ["# Attention, padding masks, transposed convolutions", ""]
    lines += [f"Nothing was measured for {name}. {why}\n" for name, why in absent.items()]
    lines += ["Test scores: accuracy; PSNR in dB for unet. Paired intervals over the test samples.", ""]
    lines += ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines += [_line(row, made, *units[row["net"]]) for row in tested]
    rates = {row["net"]: row["rate"] for row in tested if row["rate"] is not None}
    lines += ["", "## All nets, on validation samples", "", *_sizes(made, tuned, rates), ""]
    lines += ["## Bounds", "", *(f"- {bound}" for bound in bounds or ["No bound was tested."])]
    return "\n".join(lines) + "\n"

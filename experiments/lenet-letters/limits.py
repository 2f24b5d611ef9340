"""The stated bounds that the runs can test."""

from __future__ import annotations

import statistics
from typing import Any

from printed import Row, mean, named, pick
from reductions import PUBLISHED, SHARES

from taut.studies import Bound

POINT = 0.01
TIMES = 16, 24
"""What the literature says of vector quantization, at about a point."""

IMAGE = 1e-4
"""Less than one test image: above is above."""


def limits(found: dict[str, Any]) -> list[Bound]:
    """Counts, optimal brain surgeon against magnitude, and what vector quantization is said to lose."""
    return [*counted(found["tables"]), *surgeon(found.get("surgeons", [])), *quantized(found.get("vectors", []))]


def counted(rows: list[Row]) -> list[Bound]:
    """Totals and percentages that the built nets have, of all that were built."""
    text = pick(rows, way="text", seed=0)
    totals = [row["params as counted"] == PUBLISHED[row["experiment"], row["level"]][0] for row in text]
    shares = [
        f"{row['share as counted']:.2f}" == f"{SHARES[row['experiment'], row['level']]:.2f}"
        for row in text
        if (row["experiment"], row["level"]) in SHARES
    ]
    return [
        Bound(f"built nets with the printed number of parameters, of {len(totals)}", len(totals), sum(totals)),
        Bound(f"built nets with the printed share of their section, of {len(shares)}", len(shares), sum(shares)),
    ]


def surgeon(rows: list[Row]) -> list[Bound]:
    """The smallest lead of optimal brain surgeon over magnitude where magnitude loses more than a point."""
    found = []
    for net in dict.fromkeys(row["net"] for row in rows):
        blind, mine = (
            pick(rows, net=net, method="magnitude", refit=False)[0],
            pick(rows, net=net, method="obs", refit=False),
        )
        leads = [
            statistics.mean(row["curve"][place][1] for row in mine) - accuracy
            for place, (_, accuracy) in enumerate(blind["curve"])
            if accuracy < blind["dense"] - POINT
        ]
        if leads:
            name = f"{net}: accuracy of optimal brain surgeon above magnitude's, at the worst sparsity"
            found.append(Bound(name, IMAGE, min(leads)))
    return found


def quantized(rows: list[Row]) -> list[Bound]:
    """Loss against the control, at the setting of so small a file that is best on validation images."""
    found = []
    for data in dict.fromkeys(row["data"] for row in rows):
        some = pick(rows, data=data)
        control = mean([row for row in some if not row["settings"]], "trained")
        ways: dict[str, list[Row]] = {}
        for row in some:
            if "block" in row["settings"]:
                ways.setdefault(named(row["settings"]), []).append(row)
        for times in TIMES:
            small = [way for way in ways.values() if mean_ratio(way) >= times]
            if small:
                best = max(small, key=lambda way: mean(way, "valid"))
                name = f"{data}: accuracy that codebooks of {times} times fewer bytes lose against the control"
                found.append(Bound(name, POINT, control - mean(best, "trained"), at_most=True))
    return found


def mean_ratio(rows: list[Row]) -> float:
    """How many times smaller the files are."""
    return statistics.mean(row["bytes"][0] / row["bytes"][1] for row in rows)

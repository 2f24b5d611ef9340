"""Verdicts on the source's claims, from the results alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matched import TECHNIQUES, TITLES, gains

from taut.studies.claims import CONTRADICTED, REPRODUCED

FIRST = "prune-tucker"
SMALL = 1.0
"""Points that "similar accuracy" may mean."""


def findings(found: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Claim -> ours, verdict, why; claims that nothing here can fail have none."""
    table = found["matched"]
    verdicts = {
        "prior-pruning": _alone(table, "prune"),
        "prior-low-rank": _alone(table, "tucker"),
        "several-techniques-size": _gain(table, "params", one_plan=True),
        "several-techniques-compute": _gain(table, "macs", one_plan=True),
        "title-combination": _gain(table, "params"),
        "compression": _most(table, "params", 0.57),
        "compression-over-tucker": _most(table, "params", 0.57, "tucker"),
        "compression-over-pruning": _most(table, "params", 0.57, "prune"),
        "flops": _most(table, "macs", 0.48),
        "order": _order(table),
        "faster": _faster(found["speeds"]),
    }
    return {claim: verdict for claim, verdict in verdicts.items() if verdict}


def _alone(table: Sequence[dict[str, Any]], way: str) -> dict[str, str]:
    """Whether one way alone makes the nets smaller at no more than SMALL points."""
    rows = [row for row in table if row["size"] == "params" and row["drop"] <= SMALL and way in row]
    best = {net: max(r[way] for r in rows if r["net"] == net) for net in dict.fromkeys(r["net"] for r in rows)}
    if not best:
        return {}
    told = ", ".join(f"{net} {value:.1f}x" for net, value in best.items())
    verdict = REPRODUCED if min(best.values()) > 1.1 else CONTRADICTED
    return _verdict(f"{told} fewer parameters at up to {SMALL:g} point", verdict, "matched accuracy, same training")


def _gain(table: Sequence[dict[str, Any]], size: str, *, one_plan: bool = False) -> dict[str, str]:
    """Whether both beat the best single way at most accuracies."""
    way = "joint" if one_plan else FIRST
    rows = [row["gain"] for row in gains(table, way) if row["size"] == size]
    if not rows:
        return {}
    wins = sum(gain > 0 for gain in rows)
    told = f"{TITLES[way]}: better in {wins} of {len(rows)} matched comparisons, {min(rows):+.0%} to {max(rows):+.0%}"
    return _verdict(
        told, REPRODUCED if 2 * wins > len(rows) else CONTRADICTED, "against the better of pruning and Tucker alone"
    )


def _most(table: Sequence[dict[str, Any]], size: str, printed: float, single: str = "") -> dict[str, str]:
    """The largest gain of pruning, then Tucker beside the printed one."""
    against = (single,) if single else TECHNIQUES
    rows = [row for row in table if row["size"] == size and FIRST in row and all(s in row for s in against)]
    if not rows:
        return {}
    most, row = max(((r[FIRST] / max(r[s] for s in against) - 1, r) for r in rows), key=lambda pair: pair[0])
    dense = max(1 - 1 / r[FIRST] for r in rows)
    told = f"at most {most:+.0%} ({row['net']}, {row['drop']} points below the control); against dense -{dense:.0%}"
    why = f"printed: up to {printed:.0%}; against {' and '.join(TITLES[s] for s in against)} at matched accuracy"
    return _verdict(told, REPRODUCED if most >= printed else CONTRADICTED, why)


def _order(table: Sequence[dict[str, Any]]) -> dict[str, str]:
    rows = [(row[FIRST], row["tucker-prune"]) for row in table if FIRST in row and "tucker-prune" in row]
    if not rows:
        return {}
    wins = sum(first > second for first, second in rows)
    told = f"pruning first is better in {wins} of {len(rows)} matched comparisons"
    return _verdict(told, REPRODUCED if 2 * wins > len(rows) else CONTRADICTED, "the source shows no other order")


def _faster(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    known = [row for row in rows if row["side"] == "ours" and "batch 32" in row]
    if not known:
        return {}
    wins = sum(row["batch 32"] > 1.05 for row in known)
    told = ", ".join(f"{row['net']} at MACs x {row['macs']}: {row['batch 32']:.2f}x" for row in known)
    why = "best runtime against best, batch 32; FLOPs are not time"
    return _verdict(told, REPRODUCED if wins == len(known) else CONTRADICTED, why)


def _verdict(ours: str, verdict: str, why: str) -> dict[str, str]:
    return {"ours": ours, "verdict": verdict, "why": why}

"""What must hold, and what was found."""

from __future__ import annotations

from typing import Any

from contest import ALONE, FAST, FRACTIONS, PEERS, UNTRAINED, interval, unpacked
from matched import COMPARED, TECHNIQUES, TITLES, gains

from taut.studies import Bound

GAIN = 0.3
BELOW = {("vgg", 0.125): 1.2, ("resnet", 0.25): 1.8}
"""Points below the dense net that one plan of channels and low rank aims at, untrained."""


def limits(found: dict[str, Any], quick: bool) -> list[Bound]:
    """Every bound that the rows allow to test."""
    sides = {(row["net"], row["side"], row["macs"]): row for row in found["contest"]}
    bounds = _combination(found) if not quick else []
    if quick:
        ours, theirs = sides["resnet", "ours", 0.25], sides.get(("resnet", "l2", 0.25))
        if theirs is not None:
            difference = _difference(ours, theirs, "after")[0]
            bounds.append(Bound("resnet at MACs /4, ours - Torch-Pruning, tuned", 0.0, difference))
        bounds.append(Bound("resnet at MACs /4, ours untrained", 0.8, _accuracy(ours, "before")))
        macs = [row for row in found["pipelines"] if row["way"] == "prune-tucker"]
        bounds.append(Bound("MACs left after pruning, then Tucker", 0.4, max(r["macs"] for r in macs), at_most=True))
        return bounds
    for side in ("ours", FAST):
        bounds += _tuned(sides, side)
    bounds += _untrained(sides)
    bounds += _speeds(found)
    return bounds


def _tuned(sides: dict[Any, Any], side: str) -> list[Bound]:
    """Ours beside the better of the peer's, both tuned: not significantly below it, and above it at MACs /8."""
    bounds = []
    words = {"ours": "ours", FAST: f"ours {FAST}"}[side]
    for net in dict.fromkeys(net for net, _, _ in sides):
        for macs in FRACTIONS:
            peers = [sides[net, peer, macs] for peer in PEERS if (net, peer, macs) in sides]
            ours = sides.get((net, side, macs))
            if ours and peers:
                best = max(peers, key=lambda row: _accuracy(row, "after"))
                mean, half = _difference(ours, best, "after")
                name = f"{net} at MACs x {macs}, {words} - best of Torch-Pruning, tuned, "
                name += "above it" if macs == 0.125 else "with the paired 95 % interval"
                bounds.append(Bound(name, 0.0, mean if macs == 0.125 else mean + half))
    return bounds


def _combination(found: dict[str, Any]) -> list[Bound]:
    """The mean gain of a combination over the best single way, over the accuracies compared, per net and size."""
    bounds = []
    for way, against in COMPARED:
        table = gains(found["matched"], way, against)
        words_of = "pruning and Tucker alone" if against == TECHNIQUES else "those and planned ranks"
        for net in dict.fromkeys(row["net"] for row in table):
            for size in ("params", "macs"):
                mine = [row["gain"] for row in table if row["net"] == net and row["size"] == size]
                if mine:
                    words = "compression" if size == "params" else "fewer MACs"
                    mean = sum(mine) / len(mine)
                    bounds.append(Bound(f"{net}: {words} by {TITLES[way]}, over {words_of}", GAIN, mean))
    return bounds


def _untrained(sides: dict[Any, Any]) -> list[Bound]:
    bounds = []
    for net, macs in UNTRAINED:
        rows = {side: sides.get((net, side, macs)) for side in ("ours", *ALONE, *PEERS)}
        ours, dense = rows["ours"], sides.get((net, "control", 1.0))
        if ours is None or dense is None:
            continue
        mine = _accuracy(ours, "before")
        peers = [_accuracy(rows[p], "after") for p in PEERS if rows[p]]
        if peers:
            name = f"{net} at MACs x {macs}: ours untrained - best of Torch-Pruning tuned"
            bounds.append(Bound(name, 0.0, mine - max(peers)))
        for single in ALONE:
            if rows[single]:
                name = f"{net} at MACs x {macs}, untrained: one plan - {single} alone"
                bounds.append(Bound(name, 0.0, mine - _accuracy(rows[single], "before")))
        lost = 100 * (_accuracy(dense, "before") - mine)
        name = f"{net} at MACs x {macs}, untrained: points below dense"
        bounds.append(Bound(name, BELOW[net, macs], lost, at_most=True))
    return bounds


def _speeds(found: dict[str, Any]) -> list[Bound]:
    """Latency beside the faster peer's, batch 32, and of one plan beside low rank alone."""
    speeds = {(row["net"], row["side"], row["macs"]): row.get("batch 32") for row in found["speeds"]}
    bounds = []
    for net in dict.fromkeys(row["net"] for row in found["contest"]):
        for macs in FRACTIONS:
            ours = speeds.get((net, FAST, macs))
            peers = [value for peer in PEERS if (value := speeds.get((net, peer, macs))) is not None]
            if ours and peers:
                name = f"{net} at MACs x {macs}: our speedup, {FAST}, over the best of Torch-Pruning's"
                bounds.append(Bound(name, 1.0, ours / max(peers)))
            alone = speeds.get((net, "low rank", macs))
            one = speeds.get((net, "ours", macs))
            if one and alone and (net, macs) in UNTRAINED:
                bounds.append(
                    Bound(f"{net} at MACs x {macs}: speedup of one plan over low rank alone", 1.0, one / alone)
                )
    return bounds


def _accuracy(row: dict[str, Any], when: str) -> float:
    return float(unpacked(row[when], row["images"]).mean())


def _difference(a: dict[str, Any], b: dict[str, Any], when: str) -> tuple[float, float]:
    return interval(unpacked(a[when], a["images"]), unpacked(b[when], b["images"]))

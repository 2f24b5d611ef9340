"""The closest network to a budget that cannot be met: not the smallest there is, but the nearest that still works.

The order of what counts:

1. Limits that can be held are held.
2. From the least that plans reach of the others, the search goes up the front of damage over cost, in steps of 5 % of
   the original (twice as far each time while nothing works), until one more step would win back no more than 2 % of the
   original's answers, and at least half of them are kept. Answers are compared on calibration samples; without any,
   outputs on the example.
3. Where nothing on the way does, the network stays as it is (not if that breaks a limit that can be held).

All methods that were asked for take part: the walk starts where the one that reaches furthest ends, so that more of
them never make it worse.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from taut.core.text import count, some
from taut.search.ranks import Reach
from taut.search.session import Session
from taut.types import Layer, Plan
from taut.types.amounts import percent_note
from taut.types.keep import AS_ASKED

STEP = 0.05
"""Share of the original's cost by which the next network may be larger."""

WORTH = 0.02
"""Share of the answers that it has to win back for that."""

WORKS = 0.5
"""Share of the answers below which a network is no use, whatever it costs."""

BELOW = (0.5, 0.8)
"""Parts of the way from the limits to what one method alone reaches, where several together may get."""

BLOCKING = 3
"""Kinds of layers that a message names at most."""

WORTH_NAMING = 0.01
"""Share of the cost below which a kind of layer blocks nothing."""


@dataclass(frozen=True)
class Nearest:
    """The closest network.

    Attributes:
        model: the network. plan: what was done. agreement: the share of the original's answers that it gives.
    """

    model: nn.Module
    plan: Plan
    agreement: float


def find_nearest(session: Session, limits: Mapping[str, float]) -> Nearest:
    """The closest network to limits that cannot be met."""
    least, whole = session.planner.least(limits), {key: session.whole(key) for key in limits}
    missed = [key for key in limits if least[key] > limits[key]]
    best: Nearest | None = None
    for aims in _below(limits, least, missed) if session.planner.joint else ():
        best = _better(best, _at(session, aims))
    larger, step = 0.0, STEP
    while any(least[key] + larger * whole[key] < whole[key] for key in missed):
        here = _at(session, {**limits, **{key: least[key] + larger * whole[key] for key in missed}})
        if best is not None and here is not None and _settled(best, here):
            return best
        best = _better(best, here)
        step = STEP if best is not None and best.agreement >= WORKS else 2 * step
        larger += step
    whole_network = Nearest(*session.uncompressed(met=False), 1.0)
    held = any(limits[key] < whole[key] for key in limits if key not in missed)
    if best is not None and (_settled(best, whole_network) or (held and best.agreement >= WORKS)):
        return best
    return whole_network


def _settled(best: Nearest, larger: Nearest) -> bool:
    """Whether a network works, and the next larger one is not worth its cost."""
    return best.agreement >= WORKS and larger.agreement - best.agreement <= WORTH


def _better(one: Nearest | None, other: Nearest | None) -> Nearest | None:
    """The one that gives more of the original's answers; the first of two alike."""
    if one is None or other is None:
        return one or other
    return other if other.agreement > one.agreement else one


def _at(session: Session, aims: Mapping[str, float]) -> Nearest | None:
    """The network within some limits that gives most of the original's answers, of all ways to get there."""
    best: Nearest | None = None
    for model, plan in session.alternatives(aims):
        if plan.steps:
            best = _better(best, Nearest(model, plan, session.judge.agreement(model)))
    return best


def _below(
    limits: Mapping[str, float], least: Mapping[str, float], missed: Sequence[str]
) -> Iterator[dict[str, float]]:
    """Limits tighter than what one method alone reaches."""
    for part in BELOW:
        yield {**limits, **{key: limits[key] ** (1 - part) * least[key] ** part for key in missed}}


def explain(session: Session, limits: Mapping[str, float], nearest: Nearest) -> str:
    """Why the limits cannot be met, what was reached instead and how, and what stands in the way."""
    amounts = session.amounts(nearest.model, limits)
    asked = " and ".join(f"{key} <= {_amount(key, limit)}" for key, limit in limits.items())
    reached = ", ".join(f"{key} {_amount(key, amounts[key])} of {_amount(key, session.whole(key))}" for key in limits)
    ways = sorted({step.method for step in nearest.plan.steps})
    runtime = "" if session.meter is None else f", measured in {session.meter.runtime.name}"
    if ways:
        closest = (
            f"The closest that still works reaches {reached}{runtime}; it gives {nearest.agreement:.1%} of the "
            f"original's answers, by {' and '.join(ways)}."
        )
    else:
        closest = f"No network near it works, so the closest is the original: {reached}{runtime}."
    key = max(limits, key=lambda key: amounts[key] / max(limits[key], 1e-9))
    note = percent_note(limits, {key: session.whole(key) for key in limits})
    parts = [f"No plan meets the budget {asked}.", closest, *_least(session, limits, amounts), _kept(session, key)]
    return " ".join(part for part in (*parts, _blocking(session, key)) if part) + note


def _amount(key: str, value: float) -> str:
    return f"{value:.3g}" if key == "latency" else count(round(value))


def _least(session: Session, limits: Mapping[str, float], reached: Mapping[str, float]) -> list[str]:
    """What is left at the least by every key that is missed, and where most of it is."""
    reach = session.planner.reach(limits)
    least = {key: min(reach.amounts[key], reached[key]) for key in limits}
    said = []
    for key in (key for key in limits if least[key] > limits[key]):
        field, _ = _counted(key)
        largest = sorted(reach.costs, key=lambda name: getattr(reach.costs[name], field), reverse=True)[:BLOCKING]
        where = [
            f"{_name(name)} ({_amount(field, getattr(reach.costs[name], field))}{_why(session, reach, name)})"
            for name in largest
            if getattr(reach.costs[name], field) >= WORTH_NAMING * getattr(session.network.cost, field)
        ]
        inside = f", most of it in {', '.join(where)}" if where else ""
        said.append(
            f"At the least these methods leave {key} {_amount(key, least[key])} of "
            f"{_amount(key, session.whole(key))}{inside}."
        )
    return said


def _why(session: Session, reach: Reach, name: str) -> str:
    """Why a layer is not smaller, where something keeps it from that."""
    net = session.stats.network
    floors, skips = net.floors, {la.name: net.reason_of(la) for la in net.layers}
    if name in floors:
        return f": {floors[name].share:.0%} of it stays, as asked"
    if name in _free(session):
        return ""
    reason = (skips.get(name) or reach.stays.get(name, "")).replace(AS_ASKED, "kept as asked")
    return f": {reason}" if reason else ""


def _free(session: Session) -> set[str]:
    """The layers that some method takes, whatever the reason why others leave them alone."""
    return {name for choice in session.planner.choices for name in choice.group.names}


def _kept(session: Session, key: str) -> str:
    """The layers that the user wants left alone, with their share of the cost."""
    field, words = _counted(key)
    layers = [layer for layer in session.network.layers if layer.name in session.network.kept and getattr(layer, field)]
    if not layers:
        return ""
    share = sum(getattr(layer, field) for layer in layers) / max(getattr(session.network.cost, field), 1)
    return f"Kept as asked: {some([layer.name for layer in layers], 8)} with {share:.0%} of the {words}."


def _counted(key: str) -> tuple[str, str]:
    """The count of a layer that tells most of a key of a budget, and its name."""
    return ("macs", "MACs") if key in {"macs", "latency"} else ("params", "parameters")


def _blocking(session: Session, key: str) -> str:
    """The kinds of layers that no method may touch, with their share of the cost."""
    field, words = _counted(key)
    free = _free(session)
    whole = max(float(getattr(session.network.cost, field)), 1.0)
    groups: dict[tuple[str, str], list[Layer]] = defaultdict(list)
    net = session.stats.network
    for layer in net.layers:  # after the exact steps, which may have freed some
        if layer.skip not in {None, AS_ASKED} and layer.name not in free and getattr(layer, field):
            groups[layer.kind, str(net.reason_of(layer)).replace(f"'{layer.name}'", "it")].append(layer)
    shares = {kind: sum(getattr(layer, field) for layer in layers) / whole for kind, layers in groups.items()}
    largest = sorted(shares, key=shares.__getitem__, reverse=True)[:BLOCKING]
    parts = [
        f"{kind} with {shares[kind, reason]:.0%} of the {words} ({_names(groups[kind, reason])}: {reason})"
        for kind, reason in largest
        if shares[kind, reason] >= WORTH_NAMING
    ]
    if parts:
        return f"Left alone are {'; '.join(parts)}."
    if session.network.kept or session.network.floors:
        return "Ask for less, or keep less."
    return "Ask for less." if session.planner.joint else "Ask for less, or add methods such as channels."


def _name(name: str) -> str:
    return f"'{name}'" if name else "(model)"


def _names(layers: Sequence[Layer]) -> str:
    first = _name(layers[0].name)
    return first if len(layers) == 1 else f"{first} and {len(layers) - 1} more"

"""Models within limits: what is counted is corrected, what is measured is searched for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from taut.planning.application import ROLLED_BACK
from taut.planning.plan import amount
from taut.search.nearest import explain, find_nearest
from taut.search.session import Workshop
from taut.types import Cost, Plan

Built = tuple[nn.Module, Plan]

TRIES = 4
"""Plans until the budget holds on the counted model; the second is only needed for file headers and roll-backs."""

TIMED_TRIES = 7
"""Plans until a budget of time holds on the measured model."""

SPARE = 0.95
"""Below this share of every limit a model may grow again, where the limit is one of time."""

CLOSE = 0.98
"""Share of the allowed time that is aimed at: it is measured with noise."""


@dataclass
class _Search:
    """What was tried for some limits.

    Attributes:
        best: the model that meets them and uses most of them.
        low, high: aims of time between which the right one lies: known to be met, known to be missed.
    """

    limits: Mapping[str, float]
    best: Built | None = None
    low: float = 0.0
    high: float = 1.0
    _uses: float = 0.0

    def note(self, built: Built, found: Mapping[str, float], aim: float) -> bool:
        """Keep a model if it is the best so far; whether it meets the limits."""
        used = max(found[key] / max(limit, 1e-9) for key, limit in self.limits.items())
        met = all(found[key] <= limit for key, limit in self.limits.items())
        if met and used > self._uses:
            self.best, self._uses = built, used
        if met:
            self.low = max(self.low, aim)
        elif found.get("latency", 0.0) > self.limits.get("latency", 1.0):
            self.high = min(self.high, aim)
        return met

    def between(self, aim: float) -> float:
        """The next aim of time: the one proposed, or where that is known to be wrong the middle of what is left."""
        if self.low < aim < self.high:
            return aim
        return math.sqrt(max(self.low, self.high / 4) * self.high)


def meet(shop: Workshop, limits: Mapping[str, float]) -> tuple[Built, str | None]:
    """A model whose counted and measured cost is within `limits`; with the reason where the closest one is not."""
    if all(amount(shop.network, key) <= limit for key, limit in limits.items()):
        return shop.unchanged(), None
    aims = {key: limit * CLOSE if key == "latency" else limit for key, limit in limits.items()}
    search = _Search(limits)
    for _ in range(TIMED_TRIES if "latency" in limits else TRIES):
        built = shop.within(aims)
        if built is None:
            break
        failed = _rolled_back(built[1])
        shop = shop.without(failed) if failed else shop
        found = shop.amounts(built[0], limits)
        if search.note(built, found, aims.get("latency", 0.0)) and not _spares(found, limits):
            break
        if failed:
            continue  # the same aims, by other layers
        aims = {key: _aim(key, aims[key], found[key], limit) for key, limit in limits.items()}
        if "latency" in aims:
            aims["latency"] = search.between(aims["latency"])
    if search.best is not None:
        return search.best, None
    nearest = find_nearest(shop, limits)
    found = shop.amounts(nearest.model, limits)
    if search.note((nearest.model, nearest.plan), found, 0.0) and search.best is not None:
        return search.best, None  # what the search for plans passed over
    return (nearest.model, nearest.plan), explain(shop, limits, nearest)


def _rolled_back(plan: Plan) -> dict[str, str]:
    """Layers of which the rewrite failed, and why."""
    return {kept.layer: kept.reason for kept in plan.kept if kept.reason.startswith(ROLLED_BACK)}


def _spares(found: Mapping[str, float], limits: Mapping[str, float]) -> bool:
    """Whether the time is all that binds, and much of it is left: it was predicted, and may be spent."""
    tight = any(found[key] > SPARE * limit for key, limit in limits.items())
    return "latency" in limits and not tight


def _aim(key: str, aim: float, found: float, limit: float) -> float:
    """What to ask for next time, so that what is found is within the limit."""
    if key == "latency":
        return min(1.0, aim * limit / found * CLOSE)
    return max(1.0, aim - 1.02 * max(0.0, found - limit))


def path_limits(shop: Workshop, ratio: float) -> dict[str, float]:
    """Ceilings on params and MACs that make the compressible part of the network `ratio` times smaller."""
    cost = shop.stats.network.cost
    movable = cost if shop.mixer else sum((choice.options[0].cost for choice in shop.choices), Cost())
    keys = [key for key in ("params", "macs") if getattr(movable, key)]
    return {key: getattr(cost, key) - getattr(movable, key) * (1 - 1 / ratio) for key in keys}


def along_path(shop: Workshop, ratio: float, caps: Mapping[str, float] | None = None) -> tuple[nn.Module, Plan] | None:
    """The model `ratio` times smaller on the path that `explore` shows and `Budget(drop=...)` searches.

    Args:
        shop: the model.
        ratio: of the compressible part.
        caps: further absolute ceilings.

    Returns:
        None where no plan is that small.
    """
    if ratio <= 1 and not caps:
        return shop.unchanged()
    limits = path_limits(shop, ratio)
    if not limits and not caps:
        return None
    for key, cap in (caps or {}).items():
        limits[key] = min(limits.get(key, cap), cap)
    for _ in range(TRIES):
        built = shop.within(limits)
        if built is None:
            return None
        found = shop.amounts(built[0], caps or {})
        over = {key for key, cap in (caps or {}).items() if found[key] > cap}
        if not over:
            return built
        limits |= {key: _aim(key, limits[key], found[key], (caps or {})[key]) for key in over}
    return None

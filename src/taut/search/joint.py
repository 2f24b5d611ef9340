"""Channels and ranks in one plan: how much of a budget each should save is predicted, and then judged by the output.

The widths that remain when channels save a share of the way decide what low rank can still save. For every share that
is looked at, channels go until the network costs f^t of the original (f the budget's fraction, t the share), and ranks
are chosen by the integer program within what is left of the budget, from what was observed of the channels that stay.
Damages of channels and of ranks have one unit: their sum says which shares are worth a try. These are carried out on
the original, with one refit towards its outputs, and the divergence of the output on samples that no refit saw decides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from torch import nn

from taut.core.progress import stage
from taut.measure.counting import count
from taut.measure.latency_model import layer_ops
from taut.planning.application import apply_plan
from taut.planning.candidates import Choice
from taut.planning.knapsack import HEADER_BYTES, network_cost
from taut.planning.narrowing import REMEMBERED, Latest, narrow
from taut.planning.plan import describe, narrowing_step
from taut.recovery.judging import Judge
from taut.recovery.targets import Noted
from taut.search.behind import Behind, sum_of
from taut.search.held_out import Batches, divided
from taut.search.ranks import Built, Limits, RankPlanner, Reach
from taut.structure.statistics import Statistics
from taut.structure.surgery import shallow
from taut.types import Cost, Group, Method, Plan, Setting, Step

FIRST_SHARES = (0.0, 0.5, 1.0)
"""Shares of the way that channels save, tried first: none, half, all."""

OTHER_SHARES = (0.25, 0.75)
"""Shares tried where none of these will do."""

SHARES_TRIED = 5
"""Shares tried at most."""

PLAUSIBLE = 2.0
"""Times the least predicted damage up to which channels alone, or ranks alone, are tried as well."""

NOT_COMPARABLE = 1e300
"""Divergence of a plan that holds the limits, where outputs cannot be compared."""

NEARLY = 1.05
"""Divergences that differ by less than this factor are equal: then more channels go, which keep all of the speed."""

LET_OUT = 12
"""Budgets between one that cannot be met and the whole network, to find the closest."""

FURTHEST = 7
"""Halvings of the way between limits that channels cannot meet and the whole network."""

ALL_BUT_RANKS = 1 - 1e-9
"""Share of the way that channels go to the end, so that ranks may follow."""

AIMS, CLOSE = 6, 0.02
"""Times that channels are chosen anew as more fell than the layers count, and what share of the network is near."""

ALIKE = 1.1
"""Budgets that differ by no more than this factor are served by the same share."""


@dataclass(frozen=True, eq=False)
class JointPlanner:
    """Plans with fewer channels and low rank.

    Attributes:
        ranks: plans by low rank alone, with the model, its statistics and its data.
        method: takes out channels.
        low_rank: the methods that may follow.
        align: every rank is a multiple of it.
        latency_correction: measured over predicted time of the shapes at some shares.
        asked: whether the user named the method: then he hears of channels that cannot go.
        latest: narrower networks that were made of the model last, by planners with other rates, too.
    """

    ranks: RankPlanner
    method: Method
    low_rank: tuple[Method, ...]
    align: int
    latency_correction: Mapping[float, float] = field(default_factory=dict)
    latest: Latest = field(default_factory=Latest, repr=False)
    asked: bool = True
    joint: ClassVar[bool] = True
    _shares: dict[float, float] = field(default_factory=dict, repr=False)
    """Tightness of limits -> the share that was found for them."""
    _narrowed: dict[tuple[float, int], Behind | None] = field(default_factory=dict, repr=False)

    @property
    def stats(self) -> Statistics:
        """Of the model that plans are carried out on."""
        return self.ranks.stats

    @property
    def choices(self) -> tuple[Choice, ...]:
        """What can be done to its layers where no channels go."""
        return self.ranks.choices

    @property
    def movable(self) -> Cost:
        """Cost of what can become smaller: any layer may be narrower, but those that the user wants to stay."""
        net = self.stats.network
        return net.cost - sum((net.bound(layer) for layer in net.layers), Cost())

    @cached_property
    def _samples(self) -> tuple[Batches | None, list[Any] | None]:
        """Batches to refit on while plans are compared, and inputs to judge with."""
        return divided(self.stats.network.example, self.ranks.data)

    @cached_property
    def _judge(self) -> Judge | None:
        held = self._samples[1]
        return None if held is None else Judge(self.stats.network.example, self.ranks.base, held, self.stats.kinds)

    def best_within(self, limits: Limits) -> Built | None:
        """The model and plan with the least divergence among those within `limits`; None where there is none."""
        tightness = self._tightness(limits)
        share = next(
            (t for known, t in self._shares.items() if max(tightness / known, known / tightness) <= ALIKE), None
        )
        if share is None:
            share = self._best_share(limits)
            if share is None:
                return None
            self._shares[tightness] = share
        return self._built(share, limits, self.ranks.data)

    def alternatives(self, limits: Limits) -> Iterator[Built]:
        """Models within `limits` where channels save none, half or all of the way."""
        for share in FIRST_SHARES if self.low_rank else FIRST_SHARES[-1:]:
            built = self._built(share, limits, self.ranks.data)
            if built is not None and self._holds(built[0], limits):
                yield built

    def shape_candidates(self, limits: Limits) -> Iterator[tuple[float, nn.Module]]:
        """The first shares, with models within `limits`: of the shapes they would have, and nothing recovered."""
        for share in FIRST_SHARES if self.low_rank else FIRST_SHARES[-1:]:
            plan = self._plan(share, self._aims(share, limits))
            if plan is not None:
                yield share, apply_plan(self.ranks.base, plan, self.stats)[0]

    def least(self, limits: Limits) -> dict[str, float]:
        """What plans cost at least by the keys of `limits`: of ranks or channels alone, what comes closest to them."""
        ways = (self.ranks.least(limits), self._least_channels(limits))
        return min(ways, key=lambda way: max(way[key] / max(limit, 1e-9) for key, limit in limits.items()))

    def _least_channels(self, limits: Limits) -> dict[str, float]:
        """What channels alone cost at least on the way to limits that cannot be met: let out until they can."""
        aims = dict(limits)
        for step in range(LET_OUT + 1):
            let = step / LET_OUT
            aims = {key: limit ** (1 - let) * self.ranks.whole(key) ** let for key, limit in limits.items()}
            if self._narrow(1.0, aims) is not None:
                break
        return aims

    def reach(self, limits: Limits) -> Reach:
        """How far ranks, channels, and ranks behind channels go at most."""
        ways = [self.ranks.reach(limits)]
        narrowed = self._furthest(limits)
        stays: dict[str, str] = {}
        if narrowed is not None:
            inner = narrowed.ranks
            stays = {kept.layer: kept.reason for kept in narrowed.kept}
            alone = {key: network_cost(inner.network, key, inner.latency_model) for key in limits}
            ways.append(Reach(alone, {layer.name: layer.cost for layer in inner.network.layers}))
            ways += [inner.reach(limits)] if inner.choices else []
        least = min(ways, key=lambda way: max(way.amounts[key] / max(limit, 1e-9) for key, limit in limits.items()))
        return replace(least, stays=stays)

    def _furthest(self, limits: Limits) -> Behind | None:
        """The network from which as many channels went as can, on the way to limits that cannot be met."""
        low, high, best = 0.0, 1.0, None
        for _ in range(FURTHEST):
            let = (low + high) / 2
            aims = {key: limit ** (1 - let) * self.ranks.whole(key) ** let for key, limit in limits.items()}
            narrowed = self._narrow(ALL_BUT_RANKS, aims)
            low, high, best = (let, high, best) if narrowed is None else (low, let, narrowed)
        return best

    def without(self, reasons: Mapping[str, str]) -> JointPlanner:
        """The same with some layers left alone, for these reasons."""
        return replace(
            self, ranks=self.ranks.without(reasons), latest=Latest(), _shares=dict(self._shares), _narrowed={}
        )

    def _tightness(self, limits: Limits) -> float:
        """How many times less the tightest limit allows than the original costs."""
        return max([1.0, *(self.ranks.whole(key) / max(limit, 1e-9) for key, limit in limits.items())])

    def _aims(self, share: float, limits: Limits) -> Limits:
        """Limits for a share, with regard to how far off the times of its neighbours were predicted."""
        if "latency" not in limits or not self.latency_correction:
            return limits
        shares = sorted(self.latency_correction)
        factor = float(np.interp(share, shares, [self.latency_correction[t] for t in shares]))
        return {**limits, "latency": limits["latency"] / factor}

    def _best_share(self, limits: Limits) -> float | None:
        """The share of the way that channels should save."""
        if not self.low_rank:
            return 1.0
        if self._judge is None:  # nothing to measure with: half each
            return next((t for t in (0.5, 1.0, 0.0) if self._works(t, limits)), None)
        first, many = self._promising(limits)
        if many == 1 and self._works(first[0], limits):
            return first[0]
        fit = self._samples[0]
        targets = None if fit is None else Noted(fit, self.stats.network)  # as large as some activations
        losses: dict[float, float] = {}
        with stage("mixing channels and ranks", total=many) as bar:
            while len(losses) < many:
                share = first[len(losses)] if len(losses) < len(first) else _next(losses)
                losses[share] = self._loss(share, limits, targets)
                bar()
            for share in (*FIRST_SHARES, *OTHER_SHARES):  # what was promising was rolled back, or is not small enough
                if share not in losses and not any(map(math.isfinite, losses.values())):
                    losses[share] = self._loss(share, limits, targets)
        lowest = min(losses.values(), default=math.inf)
        if lowest == NOT_COMPARABLE:  # outputs of lengths that depend on values: half each
            return min((t for t, loss in losses.items() if loss == lowest), key=lambda t: abs(t - 0.5))
        return max(t for t, loss in losses.items() if loss <= lowest * NEARLY) if math.isfinite(lowest) else None

    def _promising(self, limits: Limits) -> tuple[Sequence[float], int]:
        """The shares to try first, and how many to try: all where no damage is predicted.

        Predictions do not see what errors of several layers do together, and ranks behind channels are a guess: the
        ends that come near the least predicted damage are tried, too, of half of the way the better end in any case,
        and then the middle between the best and its neighbour.
        """
        if self.stats.curves:
            return FIRST_SHARES, SHARES_TRIED  # measured damages of ranks, and predicted ones of channels, are no sum
        predicted: dict[float, float] = {}
        for share in FIRST_SHARES:
            damage = self._predicted(share, self._aims(share, limits))
            if damage is None:
                return FIRST_SHARES, SHARES_TRIED
            predicted[share] = damage
        best = min(predicted, key=predicted.__getitem__)
        if not math.isfinite(predicted[best]):
            return (), 0
        ends = [t for t in (0.0, 1.0) if t != best]
        near = [t for t in ends if predicted[t] <= PLAUSIBLE * predicted[best]]
        if not near and best not in (0.0, 1.0):
            near = [min(ends, key=predicted.__getitem__)]
        return (best, *near), 1 + len(near) + bool(near)

    def _predicted(self, share: float, limits: Limits) -> float | None:
        """The damage of a share; infinite where nothing is so small, None where it cannot be told."""
        if share == 0 or all(limit >= self.ranks.whole(key) for key, limit in limits.items()):
            plan = self.ranks.best_plan_within(limits)
            return math.inf if plan is None else sum_of(step.damage for step in plan.steps)
        behind = self._behind_at(share, limits)
        if behind is None:
            return math.inf
        return behind.step.damage if share == 1 else behind.predicted(limits)

    def _works(self, share: float, limits: Limits) -> bool:
        """Whether the plan at a share is carried out as it was made: nothing recovered, nothing judged."""
        built = self._built(share, limits, None)
        return built is not None and self._holds(built[0], limits)

    def _loss(self, share: float, limits: Limits, targets: Noted | None) -> float:
        """Divergence on held-out samples; infinite where there is no such plan."""
        built = self._built(share, limits, targets)
        if built is None or self._judge is None or not self._holds(built[0], limits):
            return math.inf
        return min(self._judge.divergence(built[0]), NOT_COMPARABLE)

    def _holds(self, model: nn.Module, limits: Limits) -> bool:
        """Whether a plan is as small as it was to be: what was rolled back makes it larger, and diverges by nothing."""
        counted = [key for key in limits if key != "latency"]
        cost = count(shallow(model), self.stats.network.example)
        slack = 2 * HEADER_BYTES * len(self.stats.network.layers)
        return all(getattr(cost, key) <= limits[key] + (slack if key == "bytes" else 0) for key in counted)

    def _built(self, share: float, limits: Limits, data: Batches | Noted | None) -> Built | None:
        """The model at a share, refitted on `data`."""
        plan = self._plan(share, self._aims(share, limits))
        return None if plan is None else apply_plan(self.ranks.base, plan, self.stats, data)

    def _plan(self, share: float, limits: Limits) -> Plan | None:
        """The plan within `limits` of which channels save a share of the way."""
        if share == 0 or all(limit >= self.ranks.whole(key) for key, limit in limits.items()):
            return self.ranks.best_plan_within(limits)
        narrowed = self._behind_at(share, limits)
        if narrowed is None:
            return None
        net, inner = self.stats.network, narrowed.stats.network
        rest = describe(inner, narrowed.stats, (), ()) if share == 1 else narrowed.ranks.best_plan_within(limits)
        if rest is None:
            return None
        told = {kept.layer for kept in narrowed.kept}  # carrying the step out tells them again
        kept = tuple(k for k in rest.kept if k.layer not in told and inner[k.layer] == net[k.layer])
        return replace(rest, steps=(narrowed.step, *rest.steps), kept=kept, before=net.cost)

    def _behind_at(self, share: float, limits: Limits) -> Behind | None:
        """The narrower network; limits that are nearly the same share one, but where channels alone decide."""
        if share == 1:
            return self._narrow(share, limits)
        key = share, round(math.log(self._tightness(limits)) / math.log(ALIKE))
        if key not in self._narrowed:
            self._narrowed[key] = self._narrow(share, limits)
            while len(self._narrowed) > REMEMBERED:
                del self._narrowed[next(iter(self._narrowed))]
        return self._narrowed[key]

    def _narrow(self, share: float, limits: Limits) -> Behind | None:
        """The network from which channels went until it costs f^share; None where these cannot go so far.

        What no layer counts, as the products of queries and keys, may fall with the channels: then less of these goes.
        """
        whole = self.ranks.whole("macs")
        beside = whole - (narrowing_step(self.stats.network, self.method).group or Group(())).cost.macs
        if "macs" not in limits or beside < CLOSE * whole:
            return self._narrow_to(share, limits)
        target = whole * min(1.0, limits["macs"] / whole) ** share
        best, most, freed, bounds = None, 0.0, 0.0, (0.0, beside)
        for _ in range(AIMS):
            narrowed = self._narrow_to(share, limits, freed)
            left = 0.0 if narrowed is None else float(narrowed.stats.network.cost.macs)
            bounds = (bounds[0], freed) if left > target else (freed, bounds[1])
            if most < left <= target:  # heads go one by one: what comes later may use less
                best, most = narrowed, left
            if best is not None and target - most < CLOSE * whole:
                break
            unused = freed + target - left  # by layers that fit as they are
            freed = unused if bounds[0] < unused < bounds[1] else sum(bounds) / 2
        return best

    def _narrow_to(self, share: float, limits: Limits, freed: float = 0.0) -> Behind | None:
        """The same where so many MACs fall that no layer counts."""
        step = self._channel_step(share, limits, freed)
        narrowed = None if step is None else narrow(self.ranks.base, step, self.stats, self.latest, tell=self.asked)
        if narrowed is None:
            return None
        done = replace(narrowed.step, reason=f"{share:.0%} of the way; least damage per saved cost")
        return Behind(done, tuple(narrowed.kept), narrowed.made, self.ranks, self.low_rank, self.align)

    def _channel_step(self, share: float, limits: Limits, freed: float) -> Step | None:
        """The step with which channels save their share of the way; None where all of them together cannot."""
        group = narrowing_step(self.stats.network, self.method).group or Group(())
        falls = {"macs": freed}
        asked = {key: self._kept_share(group, key, limit, share, falls.get(key, 0.0)) for key, limit in limits.items()}
        if any(value <= 0 for value in asked.values()):
            return None
        keys: dict[str, Setting] = {("params" if key == "bytes" else key): min(1.0, v) for key, v in asked.items()}
        if "latency" in keys and self.ranks.latency_model is not None:
            keys["rates"] = [*self.ranks.latency_model.rates, float(self.ranks.latency_model.lanes)]
        return narrowing_step(self.stats.network, self.method, **keys)

    def _kept_share(self, group: Group, key: str, limit: float, share: float, freed: float) -> float:
        """What is left of the layers' cost when the network's falls to the power `share` of its fraction.

        `freed` falls beside them.
        """
        total = self.ranks.whole(key)
        target: float = total * min(1.0, limit / total) ** share
        if key == "latency" and self.ranks.latency_model is not None:
            mine = sum(self.ranks.latency_model.of(layer_ops(layer)) for layer in group.layers)
        elif key == "bytes":
            mine = group.cost.params * total / max(self.stats.network.cost.params, 1)
        else:
            mine = float(getattr(group.cost, key))
        return 1 - (total - freed - target) / mine if mine > 0 else 0.0


def _next(losses: Mapping[float, float]) -> float:
    """Between the best share and its worse explored neighbour's side: the middle of the more promising gap."""
    known = sorted(losses)
    best = min(known, key=losses.__getitem__)
    at = known.index(best)
    sides = [known[i] for i in (at - 1, at + 1) if 0 <= i < len(known)]
    widest = max(abs(best - side) for side in sides)
    near = [side for side in sides if abs(best - side) == widest]
    return (best + min(near, key=losses.__getitem__)) / 2

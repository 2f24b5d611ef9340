"""Plans by low rank alone: one candidate for every layer, as the integer program chooses them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import nn

from taut.measure import LatencyModel
from taut.planning.application import apply_plan
from taut.planning.candidates import Choice
from taut.planning.knapsack import closest, least, network_cost, solve
from taut.planning.plan import describe
from taut.recovery.judging import Judge
from taut.search.held_out import Batches, divided
from taut.structure.statistics import Statistics
from taut.types import Cost, Network, Plan

Built = tuple[nn.Module, Plan]
Limits = Mapping[str, float]
"""Ceilings by the keys of a budget: counts are absolute, "latency" is a share of the original's."""


DEARER = 1.0, 4.0, math.inf
"""Times that damages of blocks are taken for: several that go do more harm than the sum, and the refit repairs some."""


@dataclass(frozen=True)
class Reach:
    """How far methods go towards limits that they do not meet.

    Attributes:
        amounts: what is left at the least, by the keys of the limits.
        costs: of every layer there. stays: layers that give channels which stay -> why.
    """

    amounts: Mapping[str, float]
    costs: Mapping[str, Cost]
    stays: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class RankPlanner:
    """Plans that leave all widths as they are.

    Attributes:
        base: the model that plans are carried out on.
        stats: of it, with its traced network.
        choices: what can be done to its layers.
        data: calibration batches to refit on, or None.
        latency_model: predicts times; None where no limit is one of "latency".
        left_alone: layers of which a rewrite failed -> why.
    """

    base: nn.Module
    stats: Statistics
    choices: tuple[Choice, ...]
    data: Batches | None
    latency_model: LatencyModel | None = None
    left_alone: Mapping[str, str] = field(default_factory=dict)
    joint: ClassVar[bool] = False
    _judged: dict[tuple[tuple[str, float], ...], Plan | None] = field(default_factory=dict, repr=False)
    """Limits -> the plan that was found best for them."""

    @property
    def network(self) -> Network:
        """The base as it was traced."""
        return self.stats.network

    @property
    def movable(self) -> Cost:
        """Cost of what can become smaller."""
        layers = {name for choice in self.choices if choice.block is None for name in choice.group.names}
        layers |= {name for c in self.choices if (b := c.block) is not None for name in b.layers}
        free = (layer for layer in self.network.layers if layer.name in layers)
        return sum((layer.cost - self.network.bound(layer) for layer in free), Cost())

    def best_within(self, limits: Limits) -> Built | None:
        """The model with the least damage within `limits`; None where no plan is so small."""
        plan = self.best_plan_within(limits)
        return None if plan is None else apply_plan(self.base, plan, self.stats, self.data)

    def best_plan_within(self, limits: Limits) -> Plan | None:
        """The plan with the least damage; of those that take out blocks, and one that does not, the best by its output.

        What several blocks do to the output together is not the sum, so that held-out samples decide.
        """
        plan = self.plan_within(limits)
        if plan is None or self.data is None or not _takes_blocks(plan):
            return plan
        key = tuple(sorted(limits.items()))
        if key not in self._judged:
            plans = {factor: self._dearer(factor).plan_within(limits) for factor in DEARER}
            self._judged[key] = self._best_of([plan for plan in plans.values() if plan is not None])
        return self._judged[key]

    def _best_of(self, plans: Sequence[Plan]) -> Plan:
        """The one whose refitted network is closest to the original on samples that no refit saw."""
        distinct = [plan for place, plan in enumerate(plans) if plan not in plans[:place]]
        fit, held = divided(self.stats.network.example, self.data)
        if len(distinct) == 1 or held is None:
            return distinct[0]
        judge = Judge(self.stats.network.example, self.base, held, self.stats.kinds)
        losses = [judge.divergence(apply_plan(self.base, plan, self.stats, fit)[0]) for plan in distinct]
        return distinct[losses.index(min(losses))]

    def _dearer(self, factor: float) -> RankPlanner:
        """The same with blocks that do so many times the damage; infinite: that do not go."""
        if factor == math.inf:
            return replace(self, choices=tuple(_without(self.choices, _blocks(self.choices))))
        choices = (
            choice
            if choice.block is None
            else replace(choice, options=tuple(replace(o, damage=o.damage * factor) for o in choice.options))
            for choice in self.choices
        )
        return replace(self, choices=tuple(choices))

    def plan_within(self, limits: Limits) -> Plan | None:
        """The plan with the least damage within `limits`; None where none is so small."""
        picks = solve(self.network, self.choices, limits, self.latency_model)
        return None if picks is None else describe(self.network, self.stats, self.choices, picks)

    def alternatives(self, limits: Limits) -> Iterator[Built]:
        """Models within `limits` by other ways than the best: here there is one way."""
        built = self.best_within(limits)
        if built is not None:
            yield built

    def shape_candidates(self, limits: Limits) -> Iterator[tuple[float, nn.Module]]:
        """Models of the shapes that `limits` lead to, with nothing recovered, each with a number of its own."""
        plan = self.plan_within(limits)
        if plan is not None:
            yield 0.0, apply_plan(self.base, plan, self.stats)[0]

    def least(self, limits: Limits) -> dict[str, float]:
        """What the plan that comes closest to `limits` costs by their keys."""
        return least(self.network, self.choices, limits, self.latency_model)

    def reach(self, limits: Limits) -> Reach:
        """How far plans go at most."""
        picks = closest(self.network, self.choices, limits, self.latency_model)
        costs = {layer.name: layer.cost for layer in self.network.layers}
        costs |= {name: Cost() for choice in self.choices for name in choice.group.names[1:]}
        costs |= {choice.name: choice.options[i].cost for choice, i in zip(self.choices, picks, strict=True)}
        return Reach(self.least(limits), costs)

    def whole(self, key: str) -> float:
        """What the base costs by a key of a budget."""
        return network_cost(self.network, key, self.latency_model)

    def without(self, reasons: Mapping[str, str]) -> RankPlanner:
        """The same with some layers left alone, for these reasons."""
        return replace(
            self,
            stats=replace(self.stats, network=self.network.skipping(reasons)),
            choices=tuple(_without(self.choices, reasons)),
            left_alone={**self.left_alone, **reasons},
            _judged={},
        )


def _blocks(choices: Sequence[Choice]) -> set[str]:
    """The blocks among what may be changed."""
    return {choice.name for choice in choices if choice.block is not None}


def _takes_blocks(plan: Plan) -> bool:
    return any(layer.block is not None for step in plan.steps if step.group is not None for layer in step.group.layers)


def _without(choices: Sequence[Choice], names: Collection[str]) -> Iterator[Choice]:
    """The choices for all but some layers and blocks; nothing goes with such a block."""
    for choice in choices:
        if not set(choice.group.names) & set(names):
            yield replace(choice, options=tuple(option for option in choice.options if option.block not in names))

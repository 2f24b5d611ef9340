"""Plans by low rank alone: one candidate for every layer, as the integer program chooses them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import nn

from taut.measure import LatencyModel
from taut.planning.application import apply_plan
from taut.planning.candidates import Choice
from taut.planning.knapsack import closest, least, network_cost, solve
from taut.planning.plan import describe
from taut.structure.statistics import Statistics
from taut.types import Cost, Network, Plan

Built = tuple[nn.Module, Plan]
Batches = Sequence[tuple[Any, Any]]
Limits = Mapping[str, float]
"""Ceilings by the keys of a budget: counts are absolute, "latency" is a share of the original's."""


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

    @property
    def network(self) -> Network:
        """The base as it was traced."""
        return self.stats.network

    @property
    def movable(self) -> Cost:
        """Cost of what can become smaller."""
        layers = (choice.group.layer for choice in self.choices)
        return sum((layer.cost - self.network.bound(layer) for layer in layers), Cost())

    def best_within(self, limits: Limits) -> Built | None:
        """The model with the least damage within `limits`; None where no plan is so small."""
        plan = self.plan_within(limits)
        return None if plan is None else apply_plan(self.base, plan, self.stats, self.data)

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
        costs |= {c.group.layer.name: c.options[i].cost for c, i in zip(self.choices, picks, strict=True)}
        return Reach(self.least(limits), costs)

    def whole(self, key: str) -> float:
        """What the base costs by a key of a budget."""
        return network_cost(self.network, key, self.latency_model)

    def without(self, reasons: Mapping[str, str]) -> RankPlanner:
        """The same with some layers left alone, for these reasons."""
        return replace(
            self,
            stats=replace(self.stats, network=self.network.skipping(reasons)),
            choices=tuple(choice for choice in self.choices if not set(choice.group.names) & set(reasons)),
            left_alone={**self.left_alone, **reasons},
        )

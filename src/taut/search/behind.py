"""What ranks can do to a network behind a step of channels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from taut.measure.counting import count
from taut.planning.blocks import survey_all
from taut.planning.candidates import scaled
from taut.planning.knapsack import solve
from taut.planning.narrowing import Made
from taut.search.ranks import Limits, RankPlanner
from taut.structure.statistics import Statistics
from taut.structure.surgery import shallow
from taut.structure.tracing import trace
from taut.types import Kept, Method, Step


@dataclass(frozen=True, eq=False)
class Behind:
    """A network after channels went; what is found out about it is kept with it, for all limits.

    Attributes:
        step: with which they did. kept: layers of which channels stay.
        made: the network.
        front: plans by low rank of the whole network. low_rank: the methods that may follow. align: see `JointPlanner`.
    """

    step: Step
    kept: tuple[Kept, ...]
    made: Made
    front: RankPlanner
    low_rank: Sequence[Method]
    align: int

    @property
    def _timed(self) -> bool:
        return self.front.latency_model is not None

    @property
    def _seen_by_running(self) -> bool:
        """Whether more must be known than what the network costs: times, and what stands in blocks."""
        return self._timed or any(choice.block for choice in self.front.choices)

    @property
    def stats(self) -> Statistics:
        """What was observed of the layers that are left, and what the network costs."""
        key = "known", self._seen_by_running
        if key not in self.made.found:
            inner, whole = self.made.stats.network, self.front.network
            if self._seen_by_running:
                inner = trace(self.made.model, whole.example).leaving_as(whole)
            else:
                inner = replace(inner, cost=count(shallow(self.made.model), whole.example))
            inner = inner.skipping(self.front.left_alone)
            self.made.found[key] = replace(self.made.stats, network=inner)
        known: Statistics = self.made.found[key]
        return known

    @cached_property
    def ranks(self) -> RankPlanner:
        """Plans by low rank: every layer that became narrower is decomposed anew.

        What limits of time and others ask of it is the same, but for what is timed.
        """
        if self._timed not in self.made.found:
            stats, data = self.stats, self.front.data
            settings: dict[str, Any] = {"timed": self._timed, "before": self.front.choices}
            choices = survey_all(stats.network, self.made.model, stats, data, self.low_rank, self.align, **settings)
            self.made.found[self._timed] = stats, choices
        stats, choices = self.made.found[self._timed]
        return RankPlanner(self.made.model, stats, choices, self.front.data, self.front.latency_model)

    def predicted(self, limits: Limits) -> float | None:
        """The damage of the step and of ranks within `limits`; infinite where nothing is so small, None if not known.

        The options of the whole layers stand for those of the narrower ones: as much cheaper as the layer became, at
        the same damage. That is exact where the spectrum is as steep as it was, and needs no decomposition.
        """
        if self.step.damage is None:
            return None
        if self._seen_by_running:
            plan = self.ranks.best_plan_within(limits)
            return math.inf if plan is None else sum_of((self.step.damage, *(step.damage for step in plan.steps)))
        before, after = self.front.network, self.stats.network
        choices = scaled(self.front.choices, before, after)
        picks = solve(after, choices, limits)
        if picks is None:
            return math.inf
        return self.step.damage + sum(c.options[i].damage for c, i in zip(choices, picks, strict=True))


def sum_of(damages: Iterable[float | None]) -> float | None:
    """Their sum; None where one is not known."""
    known = list(damages)
    return None if None in known else sum(damage for damage in known if damage is not None)

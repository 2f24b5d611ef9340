"""Candidates: networks made so many times smaller, built and judged; the same ones here or by workers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from taut.core.example import Example
from taut.core.modes import quiet
from taut.core.randomness import own_states, seed_globals
from taut.measure.accuracy import Score
from taut.search.held_out import Batches
from taut.search.limits import Evaluation, model_at_ratio
from taut.search.session import Session
from taut.types import Cost, Plan
from taut.types.keep import Keep
from taut.types.method import MethodLike


@dataclass(frozen=True)
class Candidate:
    """A network that was built.

    Attributes:
        model: the network, where somebody needs it. plan: what was done. before, after: counted costs.
        score: what the user's metric says.
    """

    model: nn.Module | None
    plan: Plan
    before: Cost
    after: Cost
    score: Score | None


def candidate_at(session: Session, ratio: float, evaluation: Evaluation | None, seed: int) -> Candidate | None:
    """The candidate of a ratio, whatever was built before it; None where no plan is that small."""
    with own_states():
        seed_globals(seed)
        built = model_at_ratio(session, ratio)
        if built is None:
            return None
        small, plan = built
        score = None if evaluation is None else evaluation.score(small)
        return Candidate(small, plan, session.network.cost, session.cost(small), score)


@dataclass(frozen=True)
class Candidates:
    """What workers are sent: ratio -> candidate, from a session that each opens for itself.

    Attributes:
        model, example, data, methods, keep, seed: as `Session.open` takes them.
        evaluation: the user's metric.
        timed: whether networks that are not the original go back, to be timed.
    """

    model: nn.Module
    example: Example
    data: Batches | None
    methods: Iterable[MethodLike] | None
    keep: Keep
    evaluation: Evaluation | None
    seed: int
    timed: bool

    @cached_property
    def session(self) -> Session:
        """Opened once per worker."""
        return Session.open(self.model, self.example, self.data, self.methods, keep=self.keep)

    def __call__(self, item: dict[str, Any]) -> Candidate | None:
        """The candidate of a ratio."""
        with quiet(self.seed):
            candidate = candidate_at(self.session, item["ratio"], self.evaluation, self.seed)
        if candidate is None or (self.timed and candidate.plan.steps):
            return candidate
        return replace(candidate, model=None)

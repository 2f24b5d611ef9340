"""Candidates: networks made so many times smaller, built and judged; the same ones here or by workers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from taut.core.example import Example
from taut.core.modes import quiet
from taut.core.randomness import own_states, seed_globals
from taut.core.workers import Results
from taut.measure.accuracy import Score
from taut.search.held_out import Batches
from taut.search.limits import DropLimit, Evaluation, model_at_ratio
from taut.search.ranks import Built
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
        whole: whether networks that are not the original go back, as to be timed.
        measured, align: as `Session.open` takes them.
    """

    model: nn.Module
    example: Example
    data: Batches | None
    methods: Iterable[MethodLike] | None
    keep: Keep
    evaluation: Evaluation | None
    seed: int
    whole: bool = True
    measured: bool = False
    align: int = 1

    @cached_property
    def session(self) -> Session:
        """Opened once per worker."""
        return Session.open(
            self.model,
            self.example,
            self.data,
            self.methods,
            keep=self.keep,
            measured=self.measured,
            align=self.align,
        )

    def __call__(self, item: dict[str, Any]) -> Candidate | None:
        """The candidate of a ratio."""
        with quiet(self.seed):
            candidate = candidate_at(self.session, item["ratio"], self.evaluation, self.seed)
        if candidate is None or (self.whole and candidate.plan.steps):
            return candidate
        return replace(candidate, model=None)


class Ahead:
    """A bisection made in advance: with the candidate that is asked for those that may be asked for next.

    Those are the ones that it would come to one after the other, however each is judged; decided is in the same order.
    """

    def __init__(self, results: Results, width: int) -> None:
        """None is made yet.

        Args:
            results: of the workers, whose work is `Candidates`.
            width: candidates at a time.
        """
        self.results, self.width = results, width
        self.made: dict[float, Candidate | None] = {}

    def __call__(self, limit: DropLimit, left: int) -> tuple[Built, float] | None:
        """The model for the ratio that is asked for, and its metric; None where no plan is that small."""
        if limit.ratio not in self.made:
            ratios = self._ratios(limit, left)
            results = self.results([{"ratio": ratio} for ratio in ratios])
            self.made = {ratios[place]: candidate for place, candidate in results}
        made = self.made.pop(limit.ratio)
        if made is None or made.model is None or made.score is None:
            return None
        return (made.model, made.plan), made.score.value

    def _ratios(self, limit: DropLimit, left: int) -> list[float]:
        """The ratio that is asked for, and as many of those that may follow as are made at a time."""
        found: list[float] = []
        coming = deque([(limit, left)])
        while coming and len(found) < self.width:
            here, tries = coming.popleft()
            found.append(here.ratio)
            for amount in (here.floor, None) if tries > 1 else ():
                after = replace(here)
                after.correct(amount)
                coming.append((after, tries - 1))
        return found

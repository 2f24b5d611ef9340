"""A budget met: plans are proposed, built and measured, and what is asked for is corrected by what was found."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from taut.core.progress import stage, track
from taut.core.randomness import own_states, seed_globals
from taut.measure.accuracy import Score, measure
from taut.planning.plan import unmet_plan
from taut.search.nearest import explain, find_nearest
from taut.search.ranks import Built
from taut.search.session import Session
from taut.types import Budget, Plan

Evaluate = Callable[[nn.Module], Any]

COUNTED_TRIES = 4
"""Plans until a count holds on the built model; the second is only needed for file headers and roll-backs."""

TIMED_TRIES = 7
"""Plans until a budget of time holds on the measured model."""

JUDGED_TRIES = 6
"""Plans of which the user's metric is asked."""

SPARE = 0.95
"""Below this share of every limit a model may grow again, where the limit is one of time."""

CLOSE = 0.98
"""Share of the allowed time that is aimed at: it is measured with noise."""

LARGEST_RATIO = 32.0
"""Of the ways on which a metric is followed down, the far end."""


@dataclass(frozen=True)
class Evaluation:
    """The user's metric, and what it says of the original."""

    evaluate: Evaluate
    original: Score

    @classmethod
    def of(cls, evaluate: Evaluate, original: nn.Module) -> Evaluation:
        """Ask it about the original: first of all, since a faulty one should cost no work."""
        with stage("evaluating"):
            return cls(evaluate, measure(evaluate, original))

    def score(self, model: nn.Module) -> Score:
        """What it says of a model, from the random state of the seed in force whatever was drawn before."""
        with stage("evaluating"), own_states():
            seed_globals(torch.initial_seed())
            return measure(self.evaluate, model)


class Limit(Protocol):
    """One key of a budget while a plan is searched for.

    Attributes:
        key: of the budget. tries: plans that are worth it. predicted: whether plans are made on a guess of it.
    """

    key: str
    tries: int
    predicted: bool

    def aims(self, session: Session) -> dict[str, float]:
        """What the planner is asked for."""

    def holds(self, amount: float) -> bool:
        """Whether so much is allowed."""

    def use(self, amount: float) -> float:
        """How much of what is allowed that is."""

    def correct(self, amount: float | None) -> bool:
        """Ask for something else, by what was found (None: no plan). Whether there is anything else to ask for."""


@dataclass
class CostLimit:
    """A ceiling on what a model costs.

    Attributes:
        key: of the budget. limit: what is allowed. aim: what the planner is asked for.
    """

    key: str
    limit: float
    aim: float = field(init=False)

    def __post_init__(self) -> None:
        """Ask for the limit itself."""
        self.aim = self.limit

    def aims(self, session: Session) -> dict[str, float]:
        """One key, whatever the model is."""
        del session
        return {self.key: self.aim}

    def holds(self, amount: float) -> bool:
        """As it was counted or measured."""
        return amount <= self.limit

    def use(self, amount: float) -> float:
        """Its share."""
        return amount / max(self.limit, 1e-9)


@dataclass
class CountedLimit(CostLimit):
    """A ceiling on parameters, MACs or bytes: known of a plan before it is built, up to headers and roll-backs."""

    tries: int = COUNTED_TRIES
    predicted: bool = False

    def correct(self, amount: float | None) -> bool:
        """Ask for as much less as there was too much."""
        if amount is None or self.holds(amount):
            return False
        self.aim = max(1.0, self.aim - 1.02 * (amount - self.limit))
        return True


@dataclass
class LatencyLimit(CostLimit):
    """A ceiling on the measured time as a share of the original's: predicted, then bracketed.

    Attributes:
        low, high: aims between which the right one lies: known to be met, known to be missed.
    """

    key: str = "latency"
    limit: float = 1.0
    tries: int = TIMED_TRIES
    predicted: bool = True
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        """Aim below the limit by the noise."""
        self.aim = self.limit * CLOSE

    def correct(self, amount: float | None) -> bool:
        """In proportion, or where that is known to be wrong to the middle of what is left."""
        if amount is None:
            return False
        if self.holds(amount):
            self.low = max(self.low, self.aim)
        else:
            self.high = min(self.high, self.aim)
        aim = min(1.0, self.aim * self.limit / amount * CLOSE)
        self.aim = aim if self.low < aim < self.high else math.sqrt(max(self.low, self.high / 4) * self.high)
        return True


@dataclass
class DropLimit:
    """A floor under the user's metric, looked for by bisection of the logarithm of the ratio.

    Attributes:
        floor: of the metric.
        low, high: how many times smaller the compressible part is: known to hold, known to fall below.
    """

    floor: float
    key: str = "drop"
    tries: int = JUDGED_TRIES
    predicted: bool = True
    low: float = 1.0
    high: float = LARGEST_RATIO
    ratio: float = 4.0

    def aims(self, session: Session) -> dict[str, float]:
        """Limits of the ratio that is tried."""
        return limits_at_ratio(session, self.ratio)

    def holds(self, amount: float) -> bool:
        """`amount` is the metric's value."""
        return amount >= self.floor

    def use(self, amount: float) -> float:
        """How small it is: alone, the smallest is best."""
        del amount
        return self.ratio

    def correct(self, amount: float | None) -> bool:
        """The middle of what is left."""
        if amount is not None and self.holds(amount):
            self.low = self.ratio
        else:
            self.high = self.ratio
        self.ratio = math.sqrt(self.low * self.high)
        return True


Ahead = Callable[[DropLimit, int], tuple[Built, float] | None]
"""A limit and how many tries are left -> the model for the ratio that it asks for, made elsewhere, and its metric."""


class BudgetSearch:
    """The one search for plans: propose for the aims of all limits, build, measure, correct the aims, keep the best.

    Args:
        session: the model and what plans are made from.
        limits: the keys of the budget.
        evaluation: needed for a `DropLimit`.
        ahead: gives candidates of a `DropLimit` that stands alone; None: they are made here.
    """

    def __init__(
        self,
        session: Session,
        limits: Iterable[Limit],
        evaluation: Evaluation | None = None,
        ahead: Ahead | None = None,
    ) -> None:
        """Nothing is tried yet."""
        self.session, self.limits, self.evaluation, self.ahead = session, tuple(limits), evaluation, ahead
        self.best: Built | None = None
        self._merit = -math.inf

    def run(self) -> Built | None:
        """The best model within all limits; None where none was found."""
        tries = max(limit.tries for limit in self.limits)
        for tried in track(range(tries), "searching"):
            built, amounts = self._made(tries - tried)
            failed = {} if built is None else _rolled_back(built[1])
            held = built is not None and self.note(built, amounts)
            if held and not self._spares(amounts):
                break
            if failed:
                self.session, self.ahead = self.session.without(failed), None  # workers know nothing of it
            if failed and not held:
                continue  # the same aims, by other layers
            corrected = [limit.correct(amounts.get(limit.key)) for limit in self.limits]
            if not any(corrected):
                break
        return self.best

    def _made(self, left: int) -> tuple[Built | None, dict[str, float]]:
        """The next model, and what it comes to by every key; `left`: how many tries there are, with this one."""
        if self.ahead is not None and isinstance(limit := self.limits[0], DropLimit):
            judged = self.ahead(limit, left)
            return (None, {}) if judged is None else (judged[0], {"drop": judged[1]})
        built = self.session.best_within(aims) if (aims := self._aims()) else None
        return built, {} if built is None else self.amounts(built[0])

    def amounts(self, model: nn.Module) -> dict[str, float]:
        """What a built model comes to by every key: counted, timed, judged."""
        found = self.session.amounts(model, [limit.key for limit in self.limits if limit.key != "drop"])
        if self.evaluation is not None and any(limit.key == "drop" for limit in self.limits):
            found["drop"] = self.evaluation.score(model).value
        return found

    def note(self, built: Built, amounts: dict[str, float]) -> bool:
        """Keep a model if it is the best so far; whether it is within all limits."""
        if not all(limit.holds(amounts[limit.key]) for limit in self.limits):
            return False
        merit = self._merit_of(amounts)
        if merit > self._merit:
            self.best, self._merit = built, merit
        return True

    def _aims(self) -> dict[str, float]:
        """The lowest aim of each key."""
        aims: dict[str, float] = {}
        for limit in self.limits:
            for key, aim in limit.aims(self.session).items():
                aims[key] = min(aim, aims.get(key, aim))
        return aims

    def _merit_of(self, amounts: dict[str, float]) -> float:
        """Which of the models within all limits is best: of several keys the one of least damage."""
        if len(self.limits) > 1 and "drop" in amounts:
            return amounts["drop"]
        return max(limit.use(amounts[limit.key]) for limit in self.limits)

    def _spares(self, amounts: dict[str, float]) -> bool:
        """Whether plans are made on a guess, and much is left by every key: it may be spent."""
        guessed = any(limit.predicted for limit in self.limits)
        return guessed and all(limit.key == "drop" or limit.use(amounts[limit.key]) <= SPARE for limit in self.limits)


@dataclass(frozen=True)
class Missed:
    """Why a model is the closest to a budget and not within it.

    Attributes:
        reason: in words. only_drop: whether all costs hold, so that training may still win back the rest.
    """

    reason: str
    only_drop: bool = False


def meet_budget(
    session: Session, budget: Budget, evaluation: Evaluation | None = None, ahead: Ahead | None = None
) -> tuple[Built, Missed | None]:
    """The model with the least damage within a budget; of `drop` alone the smallest.

    Args:
        session: of the model.
        budget: its keys all have to hold.
        evaluation: for the key `drop`.
        ahead: for that key alone, as of `BudgetSearch`.

    Returns:
        Beside it, where it is not within the budget but the closest, why.
    """
    costs = budget.limits(session.network.cost)
    if budget.drop is None or evaluation is None:
        return _meet_costs(session, costs)
    floor = evaluation.original.value - budget.drop
    if not costs:
        built = BudgetSearch(session, [DropLimit(floor)], evaluation, ahead).run()
        return built or session.uncompressed(), None
    built, missed = _meet_costs(session, costs)
    score = evaluation.score(built[0])
    if missed is not None or score.value >= floor:
        return built, missed
    # What is predicted to do least damage falls too far: others may not, the metric decides.
    other = BudgetSearch(session, [*_cost_limits(costs), DropLimit(floor)], evaluation).run()
    if other is not None:
        return other, None
    reason = (
        f"No plan meets the budget drop <= {budget.drop} together with the other keys: {score.name} falls by "
        f"{evaluation.original.value - score.value:.3g}, from {evaluation.original.value:.4f} to {score.value:.4f}. "
        "Allow a larger drop, or a larger budget."
    )
    return built, Missed(reason, only_drop=True)


def _cost_limits(costs: dict[str, float]) -> list[Limit]:
    return [(LatencyLimit if key == "latency" else CountedLimit)(key, limit) for key, limit in costs.items()]


def _meet_costs(session: Session, costs: dict[str, float]) -> tuple[Built, Missed | None]:
    """The least damage within ceilings that are counted or timed; or the closest model, and why."""
    if all(session.whole(key) <= limit for key, limit in costs.items()):
        return session.uncompressed(), None
    search = BudgetSearch(session, _cost_limits(costs))
    built = search.run()
    if built is not None:
        return built, None
    nearest = find_nearest(search.session, costs)
    if search.note((nearest.model, nearest.plan), search.amounts(nearest.model)) and search.best is not None:
        return search.best, None  # what the search for plans passed over
    return (nearest.model, unmet_plan(nearest.plan)), Missed(explain(search.session, costs, nearest))


def _rolled_back(plan: Plan) -> dict[str, str]:
    """Layers of which the rewrite failed, and why."""
    return {kept.layer: kept.reason for kept in plan.kept if kept.code == "rolled back"}


def limits_at_ratio(session: Session, ratio: float) -> dict[str, float]:
    """Ceilings on params and MACs that make the compressible part of the network `ratio` times smaller."""
    cost, movable = session.stats.network.cost, session.planner.movable
    keys = [key for key in ("params", "macs") if getattr(movable, key)]
    return {key: getattr(cost, key) - getattr(movable, key) * (1 - 1 / ratio) for key in keys}


def model_at_ratio(session: Session, ratio: float) -> Built | None:
    """The model whose compressible part is `ratio` times smaller, on the path that `explore` shows.

    Returns:
        None where no plan is that small.
    """
    if ratio <= 1:
        return session.uncompressed()
    limits = limits_at_ratio(session, ratio)
    return session.best_within(limits) if limits else None

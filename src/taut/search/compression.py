"""`compress`: the verbs in a row, until the budget holds on the final model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from taut.artifact.checkpoint import save
from taut.artifact.comparison import Comparison, compare
from taut.artifact.exporting import Export, export
from taut.core.atomic_folder import rehearse
from taut.core.example import Example
from taut.core.modes import quiet
from taut.errors import BudgetError, CallError
from taut.measure.accuracy import Score, measure
from taut.planning.application import warn_of_training
from taut.search.limits import along_path, meet
from taut.search.session import Workshop, bare
from taut.structure.surgery import shallow
from taut.training.finetuning import Finetune, carry_out
from taut.training.state import OURS
from taut.types import Budget, Method, Plan

Evaluate = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class Result:
    """What `compress` returns.

    Attributes:
        model: the new model. plan: what was done to which layer, and why. comparison: before and after, measured.
        example: how the model is called.
    """

    model: nn.Module
    plan: Plan
    comparison: Comparison
    example: Example = field(repr=False)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write model.safetensors, manifest.json and comparison.json into `folder` (`taut.save`)."""
        save(self.model, self.plan, folder, comparison=self.comparison, overwrite=overwrite)

    def export(self, path: str | Path) -> Export:
        """Write the model as .onnx or .xml (OpenVINO), checked there (`taut.export`)."""
        return export(self.model, self.example, path)


def compress(  # noqa: PLR0913 - the call is documented with these
    model: nn.Module,
    example: Any,
    *,
    budget: Budget,
    data: Any = None,
    evaluate: Evaluate | None = None,
    finetune: Finetune | None = None,
    methods: Iterable[str | Method] | None = None,
    sensitivity: bool = False,
    align: int = 1,
    seed: int = 0,
) -> Result:
    """One budget in, the best plan out: applied, recovered and measured.

    Args:
        model: a trained model; it is not changed.
        example: an input that fixes how the model is called and its size.
        budget: what the result may cost (`taut.Budget`).
        data: calibration batches, with or without targets; without them the weights alone decide.
        evaluate: `evaluate(model)` -> a float (higher is better), a dict whose first key decides, `taut.Metric` or
            per-sample scores. Needed for `Budget(drop=...)`; use VALIDATION data, never the test split.
        finetune: how to train afterwards (`taut.Finetune`); the best validation weights win, the untrained included.
        methods: names or method objects; None for those marked default.
        sensitivity: plan with measured damages (`taut.sensitivity`): slower, and better where layers interact
            strongly, as in deep nets at large ratios. Needs `data`.
        align: every rank is a multiple of it; 16 makes large convolutions a fifth faster on CPUs, at coarser steps.
        seed: of everything random; the same seed gives the same bytes, but with a budget of `latency`: times differ.

    Returns:
        Model, plan and comparison.

    Raises:
        BudgetError: the budget cannot be met; `.best` is the closest Result.
        CallError, DataError, ModelError: see `taut.errors`.
    """
    _check(budget, evaluate, finetune, measured=sensitivity and data is None)
    model = bare(model)
    dense = None if evaluate is None else measure(evaluate, model)  # a faulty `evaluate` should cost no work
    with quiet(seed):
        shop = Workshop.open(model, example, data, methods, measured=sensitivity, align=align, latency=_timed(budget))
        if budget.drop is not None and evaluate is not None and dense is not None:
            built, problem = _search_drop(shop, budget, evaluate, dense)
        else:
            built, problem = meet(shop, budget.limits(shop.network.cost))
        warn_of_training(shop.stats.outputs(shop.base), built[0])
        if finetune is not None:
            tuned = _trained(shop, *built, finetune, seed)
            broken = None if problem else _broken(shop, tuned[0], built[0], budget, evaluate, dense)
            if broken is None:
                built = tuned
            else:
                warnings.warn(f"Training broke the budget of {broken}: the untrained result is kept.", stacklevel=2)
        result = finished(shop, *built, evaluate, dense, budget.latency)
    if problem is not None:
        raise BudgetError(problem, result)
    return result


def _check(budget: Budget, evaluate: Evaluate | None, finetune: Finetune | None, *, measured: bool) -> None:
    """Refuse before any work what cannot be done; `measured`: damages are to be measured, without data."""
    if not isinstance(budget, Budget):
        raise CallError(f"The budget must be a taut.Budget. Got {type(budget).__name__} instead.")
    if budget.drop is not None and evaluate is None:
        raise CallError("A budget of 'drop' needs evaluate=: a function of the model, on validation data.")
    if finetune is not None and finetune.folder is not None:
        rehearse(finetune.folder, OURS)
    if measured:
        raise CallError("sensitivity=True measures on calibration data: give data=.")


def _timed(budget: Budget) -> float | None:
    """The share of the time to plan for; None where all of it is allowed and nothing else asked for."""
    return None if budget == Budget(latency=1.0) else budget.latency


def _broken(
    shop: Workshop,
    model: nn.Module,
    untrained: nn.Module,
    budget: Budget,
    evaluate: Evaluate | None,
    dense: Score | None,
) -> str | None:
    """The first key of the budget that the final model does not hold."""
    limits = budget.limits(shop.network.cost)
    if shop.cost(model) == shop.cost(untrained):
        limits.pop("latency", None)  # of equal shapes: it was timed
    found = shop.amounts(model, limits)
    for key, limit in limits.items():
        if found[key] > limit:
            return key
    if budget.drop is None or evaluate is None or dense is None:
        return None
    return "drop" if measure(evaluate, model).value < dense.value - budget.drop else None


def _trained(shop: Workshop, small: nn.Module, plan: Plan, wish: Finetune, seed: int) -> tuple[nn.Module, Plan]:
    """The built model trained all at once; or the schedule from the original, where its stages apply the steps."""
    schedule = wish.schedule(plan) if callable(wish.schedule) else wish.schedule
    if schedule is not None and any(stage.steps for stage in schedule):
        return shop.trained(plan, replace(wish, schedule=schedule), seed)
    wish = replace(wish, schedule=schedule)
    model, _ = carry_out(small, None, shop.stats, wish, teacher=shop.original, seed=seed)
    return model, plan


def finished(
    shop: Workshop,
    small: nn.Module,
    plan: Plan,
    evaluate: Evaluate | None,
    dense: Score | None,
    latency: float | None,
) -> Result:
    """The result with its comparison and the counted cost; `latency` is the share of the time that was allowed."""
    comparison = compared(shop, small, evaluate, dense, latency=latency)
    return Result(small, replace(plan, after=shop.cost(small)), comparison, shop.network.example)


def compared(
    shop: Workshop,
    small: nn.Module,
    evaluate: Evaluate | None,
    dense: Score | None,
    *,
    quick: bool = False,
    latency: float | None = None,
) -> Comparison:
    """The comparison with the original, whose metric is known already.

    Args:
        shop: the original.
        small: what was made of it.
        evaluate: the user's metric.
        dense: what it says of the original.
        quick: time torch alone.
        latency: share of the time that was allowed; what the search measured is shown.
    """
    score = None if evaluate is None else measure(evaluate, small)
    timed = None if latency is None or shop.watch is None else shop.watch.searched(shallow(small), latency)
    costs = compare(shop.original, small, None, shop.network.example, quick=quick, searched=timed)
    return replace(costs, score_before=dense, score_after=score)


def _search_drop(
    shop: Workshop, budget: Budget, evaluate: Evaluate, dense: Score, evaluations: int = 6, top: float = 32.0
) -> tuple[tuple[nn.Module, Plan], str | None]:
    """The smallest model on the path whose metric falls by at most `budget.drop`: bisection on log ratio."""
    floor = dense.value - (budget.drop or 0.0)
    caps = budget.limits(shop.network.cost)
    best: tuple[nn.Module, Plan] | None = None
    low, high, ratio = 1.0, top, 4.0
    for _ in range(evaluations):
        built = along_path(shop, ratio, caps)
        score = None if built is None else measure(evaluate, built[0])
        if built is not None and score is not None and score.value >= floor:
            best, low = built, ratio
        else:
            high = ratio
        ratio = (low * high) ** 0.5
    if best is not None:
        return best, None
    if not caps:
        return shop.unchanged(), None
    built, problem = meet(shop, caps)
    score = measure(evaluate, built[0])
    if problem is None and score.value < floor:
        problem = (
            f"No plan meets the budget drop <= {budget.drop} together with the other keys: {score.name} falls from "
            f"{dense.value:.4f} to {score.value:.4f}. Allow a larger drop, or a larger budget."
        )
    return built, problem

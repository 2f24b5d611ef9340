"""`compress`: the verbs in a row, until the budget holds on the final model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from taut.calls import Example, quiet
from taut.checkpoint import save
from taut.comparison import Comparison, compare
from taut.errors import BudgetError, CallError
from taut.exporting import Export, export
from taut.finetuning import Finetune, carry_out
from taut.measure.accuracy import Score, measure
from taut.planning import amount, describe, unmet
from taut.structure.surgery import clone
from taut.types import Budget, Cost, Method, Plan
from taut.workshop import Workshop

Evaluate = Callable[[nn.Module], Any]

TRIES = 4
"""Plans until the budget holds on the final model: more than one for file headers, roll-backs, and measured time."""

SPARE = 0.95
"""Below this share of every limit a model may grow again, where the limit is one of time."""

CLOSE = 0.98
"""Share of the allowed time that is aimed at: it is measured with noise."""


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
        seed: of everything random; the same seed gives the same bytes.

    Returns:
        Model, plan and comparison.

    Raises:
        BudgetError: the budget cannot be met; `.best` is the closest Result.
        CallError, DataError, ModelError: see `taut.errors`.
    """
    if not isinstance(budget, Budget):
        raise CallError(f"The budget must be a taut.Budget. Got {type(budget).__name__} instead.")
    if budget.drop is not None and evaluate is None:
        raise CallError("A budget of 'drop' needs evaluate=: a function of the model, on validation data.")
    if sensitivity and data is None:
        raise CallError("sensitivity=True measures on calibration data: give data=.")
    dense = None if evaluate is None else measure(evaluate, model)  # a faulty `evaluate` should cost no work
    with quiet(seed):
        shop = Workshop.open(
            model,
            example,
            data,
            methods,
            measured=sensitivity,
            align=align,
            latency=budget.latency,
        )
        if budget.drop is not None and evaluate is not None and dense is not None:
            built, problem = _search_drop(shop, budget, evaluate, dense)
        else:
            built, problem = meet(shop, budget.limits(shop.network.cost))
        if finetune is not None:
            tuned = _trained(shop, *built, finetune, seed)
            broken = None if problem else _broken(shop, tuned[0], budget, evaluate, dense)
            if broken is None:
                built = tuned
            else:
                warnings.warn(f"Training broke the budget of {broken}: the untrained result is kept.", stacklevel=2)
        result = finished(shop, *built, evaluate, dense)
    if problem is not None:
        raise BudgetError(problem, result)
    return result


def _broken(
    shop: Workshop, model: nn.Module, budget: Budget, evaluate: Evaluate | None, dense: Score | None
) -> str | None:
    """The first key of the budget that the final model does not hold."""
    cost = shop.cost(model)
    for key, limit in budget.limits(shop.network.cost).items():
        if key != "latency" and getattr(cost, key) > limit:  # training changes no shapes
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


def finished(shop: Workshop, small: nn.Module, plan: Plan, evaluate: Evaluate | None, dense: Score | None) -> Result:
    """The result with its comparison and the counted cost."""
    found = compared(shop, small, evaluate, dense)
    return Result(small, replace(plan, after=shop.cost(small)), found, shop.network.example)


def compared(
    shop: Workshop, small: nn.Module, evaluate: Evaluate | None, dense: Score | None, *, quick: bool = False
) -> Comparison:
    """The comparison with the original, whose metric is known already; `quick` times torch alone."""
    score = None if evaluate is None else measure(evaluate, small)
    costs = compare(shop.original, small, None, shop.network.example, quick=quick)
    return replace(costs, score_before=dense, score_after=score)


def meet(shop: Workshop, limits: Mapping[str, float]) -> tuple[tuple[nn.Module, Plan], str | None]:
    """A model whose counted and measured cost is within `limits`; with the reason where the closest one is not."""
    net = shop.stats.network
    if all(amount(shop.network, key) <= limit for key, limit in limits.items()):
        return unchanged(shop), None
    aims, best = {key: limit * CLOSE if key == "latency" else limit for key, limit in limits.items()}, None
    for _ in range(TRIES):
        built = shop.within(aims)
        if built is None:
            break
        found = shop.amounts(built[0], limits)
        if all(found[key] <= limit for key, limit in limits.items()):
            best = built
            if not _spares(found, limits):
                break
        aims = {key: _aim(key, aims[key], found[key], limit) for key, limit in limits.items()}
    if best is not None:
        return best, None
    return shop.closest(limits), unmet(net, shop.choices, limits, shop.pace)


def _spares(found: Mapping[str, float], limits: Mapping[str, float]) -> bool:
    """Whether the time is all that binds, and much of it is left: it was predicted, and may be spent."""
    tight = any(found[key] > SPARE * limit for key, limit in limits.items())
    return "latency" in limits and not tight


def _aim(key: str, aim: float, found: float, limit: float) -> float:
    """What to ask for next time, so that what is found is within the limit."""
    if key == "latency":
        return min(1.0, aim * limit / found * CLOSE)
    return max(1.0, aim - 1.02 * max(0.0, found - limit))


def unchanged(shop: Workshop) -> tuple[nn.Module, Plan]:
    """A bit-equal copy, or the exact steps alone where some were asked for."""
    plan = describe(shop.stats.network, shop.stats, shop.choices, [0] * len(shop.choices))
    return clone(shop.base), replace(plan, steps=shop.exact, before=shop.network.cost)


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
        return unchanged(shop)
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
        return unchanged(shop), None
    built, problem = meet(shop, caps)
    score = measure(evaluate, built[0])
    if problem is None and score.value < floor:
        problem = (
            f"No plan meets the budget drop <= {budget.drop} together with the other keys: {score.name} falls from "
            f"{dense.value:.4f} to {score.value:.4f}. Allow a larger drop, or a larger budget."
        )
    return built, problem

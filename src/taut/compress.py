"""`compress`: the verbs in a row, until the budget holds on the final model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from taut.applying import apply_plan
from taut.calls import Example, collect, quiet
from taut.checkpoint import save
from taut.comparison import Comparison, compare
from taut.errors import BudgetError, CallError
from taut.exporting import Export, export
from taut.finetuning import Finetune, carry_out
from taut.measure.accuracy import Score, measure
from taut.measure.counting import count as count_cost
from taut.methods import choose, settings
from taut.planning import Choice, closest, describe, solve, survey, unmet
from taut.recovery.refit import SAMPLES
from taut.sensitivity import sensitivity as measure_damage
from taut.structure.statistics import Statistics, observe
from taut.structure.surgery import clone, locate, shallow
from taut.structure.tracing import trace
from taut.types import Budget, Cost, Group, Method, Network, Plan, Step

Evaluate = Callable[[nn.Module], Any]

TRIES = 4
"""Plans until the budget holds on the counted model; the second is only needed for file headers and roll-backs."""


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


@dataclass(frozen=True)
class Workshop:
    """A model with everything that plans are made from; many plans can be cut from one.

    Attributes:
        original: the user's model. base: the same after exact steps (or itself).
        exact: those steps. stats: of `base`, with every decomposition made so far. choices: what can be done.
        data: calibration batches, read once.
    """

    original: nn.Module
    base: nn.Module
    network: Network
    exact: tuple[Step, ...]
    stats: Statistics
    choices: tuple[Choice, ...]
    data: list[tuple[Any, Any]] | None

    @classmethod
    def open(
        cls,
        model: nn.Module,
        example: Any,
        data: Any,
        methods: Iterable[str | Method] | None,
        *,
        measured: bool = False,
        align: int = 1,
    ) -> Workshop:
        """Trace, do what is exact, observe and decompose; `measured` damages take the place of predicted ones."""
        chosen = choose(methods)
        original = trace(model, example)
        batches = None if data is None else collect(original.example, data, SAMPLES)
        base, net, exact = _exact(model, original, [m for m in chosen if m.exact])
        stats = observe(net, base, batches)
        lossy = [m for m in chosen if not m.exact]
        if measured and batches is not None:
            stats = measure_damage(net, base, stats, batches, lossy)
        choices = survey(net, stats, lossy, align)
        return cls(model, base, original, exact, stats, tuple(choices), batches)

    def build(self, picks: list[int]) -> tuple[nn.Module, Plan]:
        """The model and the full plan for one option per choice."""
        plan = describe(self.stats.network, self.stats, self.choices, picks)
        small, done = apply_plan(self.base, plan, self.stats, self.data)
        renamed = tuple(_renamed(step, self.exact) for step in done.steps)
        return small, replace(done, steps=(*self.exact, *renamed), before=self.network.cost)

    def trained(self, plan: Plan, wish: Finetune, seed: int) -> tuple[nn.Module, Plan]:
        """The schedule of `wish` carried out from the base, where the exact steps are done already."""
        done = len(self.exact)
        stages = tuple(
            replace(stage, steps=tuple(place - done for place in stage.steps if place >= done))
            for stage in wish.schedule or ()  # type: ignore[union-attr] # resolved by the caller
            if not stage.steps or max(stage.steps) >= done
        )
        inner = replace(plan, steps=tuple(_inside(self.base, step) for step in plan.steps[done:]))
        wish = replace(wish, schedule=stages)
        model, found = carry_out(self.base, inner, self.stats, wish, teacher=self.original, seed=seed)
        steps = () if found is None else found.steps
        return model, replace(found or plan, steps=(*self.exact, *(_renamed(step, self.exact) for step in steps)))

    def cost(self, model: nn.Module) -> Cost:
        """Counted cost of a built model."""
        return count_cost(shallow(model), self.network.example)


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
        shop = Workshop.open(model, example, data, methods, measured=sensitivity, align=align)
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
        if getattr(cost, key) > limit:
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


def meet(shop: Workshop, limits: dict[str, int]) -> tuple[tuple[nn.Module, Plan], str | None]:
    """A model whose counted cost is within `limits`; with the reason where the closest one is not."""
    if all(getattr(shop.network.cost, key) <= limit for key, limit in limits.items()):
        return unchanged(shop), None
    net, aims = shop.stats.network, {key: float(limit) for key, limit in limits.items()}
    for _ in range(TRIES):
        picks = solve(net, shop.choices, aims)
        if picks is None:
            break
        built = shop.build(picks)
        cost = shop.cost(built[0])
        over = {key: getattr(cost, key) - limit for key, limit in limits.items() if getattr(cost, key) > limit}
        if not over:
            return built, None
        aims = {key: max(1.0, aim - 1.02 * over.get(key, 0)) for key, aim in aims.items()}
    built = shop.build(closest(net, shop.choices, limits))
    return built, unmet(net, shop.choices, limits)


def unchanged(shop: Workshop) -> tuple[nn.Module, Plan]:
    """A bit-equal copy, or the exact steps alone where some were asked for."""
    plan = describe(shop.stats.network, shop.stats, shop.choices, [0] * len(shop.choices))
    return clone(shop.base), replace(plan, steps=shop.exact, before=shop.network.cost)


def path_limits(shop: Workshop, ratio: float) -> dict[str, float]:
    """Ceilings on params and MACs that make the compressible part of the network `ratio` times smaller."""
    cost = shop.stats.network.cost
    movable = sum((choice.options[0].cost for choice in shop.choices), Cost())
    keys = [key for key in ("params", "macs") if getattr(movable, key)]
    return {key: getattr(cost, key) - getattr(movable, key) * (1 - 1 / ratio) for key in keys}


def along_path(shop: Workshop, ratio: float, caps: dict[str, int] | None = None) -> tuple[nn.Module, Plan] | None:
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
        picks = solve(shop.stats.network, shop.choices, limits)
        if picks is None:
            return None
        built = shop.build(picks)
        cost = shop.cost(built[0])
        over = {key: getattr(cost, key) - cap for key, cap in (caps or {}).items() if getattr(cost, key) > cap}
        if not over:
            return built
        limits = {key: max(1.0, limit - 1.02 * over.get(key, 0)) for key, limit in limits.items()}
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


def _exact(model: nn.Module, net: Network, methods: list[Method]) -> tuple[nn.Module, Network, tuple[Step, ...]]:
    """Do every exact rewrite that makes something smaller, and trace again."""
    steps = []
    for layer in net.layers:
        group = Group((layer,))
        for method in methods:
            if layer.skip is None and method.refuses(group) is None:
                steps += [
                    Step(group.names, m.name, settings(m), group, reason="exact", damage=0.0)
                    for m in method.candidates(group, None)
                ]
    if not steps:
        return model, net, ()
    done, plan = apply_plan(model, Plan(tuple(steps)), observe(net, model))
    return done, trace(done, net.example), plan.steps


def _inside(base: nn.Module, step: Step) -> Step:
    """The step by the names that its layers have in the base: what `_renamed` undid."""
    if step.group is None:
        return step
    layers = tuple(replace(layer, name=locate(base, layer)) for layer in step.group.layers)
    return replace(step, layers=tuple(layer.name for layer in layers), group=Group(layers))


def _renamed(step: Step, exact: tuple[Step, ...]) -> Step:
    """The step by original names: "conv.1", left inside by an exact step, is "conv" to the user."""
    names = {name for done in exact for name in done.layers}

    def original(name: str) -> str:
        return next((known for known in names if name == known or name.startswith(f"{known}.")), name)

    if step.group is None:
        return step
    layers = tuple(replace(layer, name=original(layer.name)) for layer in step.group.layers)
    return replace(step, layers=tuple(original(name) for name in step.layers), group=Group(layers))

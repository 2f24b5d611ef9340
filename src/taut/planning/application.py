"""`apply`: a plan turned into a new model of plain layers; the input model is untouched."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from torch import nn

from taut.artifact.provenance import history, remember
from taut.artifact.rebuild import with_sides
from taut.core.arguments import expect
from taut.core.data import collect
from taut.core.modes import quietly
from taut.errors import CallError, ModelError, TautError
from taut.methods import resolve
from taut.planning.execution import Check, Left, carry_all, kept_of
from taut.planning.step_checks import without_form
from taut.recovery.refit import recover
from taut.recovery.samples import SAMPLES
from taut.recovery.targets import Noted
from taut.structure.coverage import covering
from taut.structure.observation import observe
from taut.structure.outputs import Outputs
from taut.structure.reordering import fold
from taut.structure.statistics import Statistics
from taut.structure.surgery import clone
from taut.structure.tracing import trace
from taut.structure.wrappers import unwrapped
from taut.types import Looking, Network, Plan, Restoring, Step


@quietly
def apply(model: nn.Module, plan: Plan, stats: Statistics, data: Any = None) -> nn.Module:
    """A new model with every step of `plan` done.

    Args:
        model: the ORIGINAL model; it is not changed.
        plan: steps by original layer names.
        stats: what `observe` found in this model.
        data: calibration batches for the closed-form refit and the batch-norm re-estimation; None leaves them out.

    Returns:
        The new model, with train flags, hooks, dtypes, devices and ties as in the original.

    Raises:
        CallError: a step names an unknown layer, method or setting, or would grow its layer.
    """
    expect(plan, Plan, "taut.plan(net, stats, budget)")
    expect(stats, Statistics, "taut.observe(net, model, data)")
    if data is not None and not isinstance(data, Noted):
        data = collect(stats.network.example, data, SAMPLES)
        covering(unwrapped(model), stats.network.example, data)
    small = apply_plan(model, plan, stats, data)[0]
    warn_of_training(stats.outputs(unwrapped(model)), small)
    return small


def warn_of_training(outputs: Outputs, small: nn.Module) -> None:
    """Warn where the result no longer trains: code that runs only then may read what is gone."""
    reason = outputs.differ_in_training(small)
    if reason is not None:
        warnings.warn(f"The result works in eval mode alone. In train mode {reason}", stacklevel=3)


def apply_plan(model: nn.Module, plan: Plan, stats: Statistics, data: Any = None) -> tuple[nn.Module, Plan]:
    """The new model, and the plan as it was really carried out: settings resolved, failed steps moved to `kept`."""
    model = unwrapped(model)
    if first := _forms_in_front(model, plan):
        return _apply_behind(model, plan, first, stats, data)
    _check_names(model, plan)
    plan.check_kept()
    stats = stats.leaving(plan.shares)
    outputs = stats.outputs(model)
    trial = None
    if data is not None or len(plan.steps) != 1:
        with suppress(TautError, RuntimeError):  # what a step made of the model may be no model for the next one
            trial = _tried(model, plan, stats, data, Check(outputs, each=False))
    if trial is None or trial.reason is not None:
        trial = _tried(model, plan, stats, data, Check(outputs))  # which step
    if trial.reason is not None:
        trial = _tried(model, plan, stats, data, Check(outputs, None))  # on which path
    if trial.reason is not None and data is not None:
        warnings.warn(f"The refit is left out: with it {trial.reason}.", stacklevel=3)
        trial = _tried(model, plan, stats, None, Check(outputs, None))
    for text in trial.told:
        warnings.warn(text, stacklevel=3)
    remember(trial.small, trial.plan, history(model))
    return trial.small, trial.plan


@dataclass(frozen=True, eq=False)
class Trial:
    """A plan carried out.

    Attributes:
        small: the new model. plan: as it was carried out.
        told: what the user has to hear of steps that were not.
        reason: how the outputs depart from the original's on any path; None where they do not.
    """

    small: nn.Module
    plan: Plan
    told: Sequence[str]
    reason: str | None


def _tried(model: nn.Module, plan: Plan, stats: Statistics, data: Any, check: Check) -> Trial:
    """Carry the plan out, and hold what comes of it against the original."""
    late = _late(plan.steps)
    left = Left(list(plan.kept))
    small = clone(model, without=frozenset(name for step in plan.steps[:late] for name in step.layers))
    done, stats, cuts = carry_all(small, plan.steps[:late], stats, left, check)
    failed = None
    if data is not None and any(not resolve(step).exact for step in done):
        try:
            recover(model, small, done, stats, data, cuts)
        except ModelError as error:
            failed = f"the model fails: {error}"
    done, folded = _fold(small, done, stats.network)
    done += carry_all(small, plan.steps[late:], stats, left, check)[0]
    tried = data is None and not folded and check.seen_all(done)
    failed = failed or _doubt(plan, left, done, check)
    reason = failed or (None if tried else Check(check.outputs, None)(small))
    return Trial(small, replace(plan, steps=tuple(done), kept=tuple(left.kept)), left.told, reason)


def _doubt(plan: Plan, left: Left, done: Sequence[Step], check: Check) -> str | None:
    """Why steps must be tried one by one: one that was undone may have met what another had broken before it."""
    undone = any(kept.code == "rolled back" for kept in left.kept[len(plan.kept) :])
    inexact = any(not resolve(step).exact for step in done)
    return "a step was rolled back behind others" if undone and inexact and not check.each else None


def _late(steps: tuple[Step, ...]) -> int:
    """Where the steps at the end begin that see the whole network and keep its function: recovery comes before them."""
    late = len(steps)
    while late and isinstance(method := resolve(steps[late - 1]), Looking) and method.exact:
        late -= 1
    return late


def _fold(small: nn.Module, done: list[Step], net: Network) -> tuple[list[Step], bool]:
    """Let neighbouring layers take over channel orders: the steps, with the orders that are left, and whether any."""
    if not any(step.settings.get("reorders") for step in done):
        return done, False
    fold(small, net.example, net.kept)
    return [with_sides(small, step) for step in done], True


def _forms_in_front(model: nn.Module, plan: Plan) -> int:
    """How many steps give layers their plain form before one that names what came of them; 0 where none does."""
    named = {name for step in plan.steps for name in step.layers}
    if named <= _names(model):
        return 0
    forms = takewhile(lambda step: isinstance(resolve(step), Restoring), plan.steps)
    return sum(1 for _ in forms)


def _apply_behind(model: nn.Module, plan: Plan, first: int, stats: Statistics, data: Any) -> tuple[nn.Module, Plan]:
    """`apply_plan` in two parts: what the first steps make is traced and observed before the others are carried out.

    Args:
        model: the original.
        plan: of it.
        first: steps that give layers their plain form.
        stats: of the original.
        data: calibration batches; None: of the new layers the weights alone decide.
    """
    base, forms = apply_plan(model, replace(plan, steps=plan.steps[:first], kept=()), stats)
    net = trace(base, stats.network.example).leaving_as(stats.network)
    verdicts = [(step, without_form(step, forms)) for step in plan.steps[first:]]
    asked = replace(plan, steps=tuple(step for step, why in verdicts if why is None))
    small, rest = apply_plan(base, asked, observe(net, base, data), data)
    lost = (one for step, why in verdicts if why for one in kept_of(step, why, "rolled back"))
    done = replace(rest, steps=(*forms.steps, *rest.steps), kept=(*forms.kept, *lost, *rest.kept))
    remember(small, done, history(model))
    return small, done


def _names(model: nn.Module) -> set[str]:
    """What a step may name: modules, and parameters that may become some."""
    return {name for name, _ in (*model.named_modules(), *model.named_parameters(remove_duplicate=False))}


def _check_names(model: nn.Module, plan: Plan) -> None:
    if missing := sorted({name for step in plan.steps for name in step.layers} - _names(model)):
        raise CallError(f"The plan names a layer that the model does not have: '{missing[0]}'.")

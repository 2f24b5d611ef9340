"""`apply`: a plan turned into a new model of plain layers; the input model is untouched."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from taut.calls import Example, evaluating, quietly, tensors
from taut.errors import CallError, ModelError
from taut.methods import resolve, settings
from taut.progress import track
from taut.recovery.refit import recover
from taut.replaying import with_sides
from taut.structure.reordering import fold
from taut.structure.statistics import Statistics
from taut.structure.surgery import clone, locate, shallow
from taut.structure.surgery import replace as put
from taut.types import Group, Kept, Looking, Method, Plan, Step


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
    return apply_plan(model, plan, stats, data)[0]


def apply_plan(model: nn.Module, plan: Plan, stats: Statistics, data: Any = None) -> tuple[nn.Module, Plan]:
    """The new model, and the plan as it was really carried out: settings resolved, failed steps moved to `kept`."""
    names = frozenset(name for step in plan.steps for name in step.layers)
    small = clone(model, without=_present(model, names))
    done: list[Step] = []
    kept = list(plan.kept)
    for step in track(plan.steps, "rewriting"):
        reason, resolved = _carry_out(small, step, stats)
        if reason is None:
            done.append(resolved)
        else:
            warnings.warn(f"Layer '{', '.join(step.layers)}' is left as it was: {reason}", stacklevel=2)
            kept += [Kept(name, reason, step.before or Group(()).cost) for name in step.layers]
    if data is not None and any(not resolve(step).exact for step in done):
        recover(model, small, done, stats, data)
    done = _fold(small, done, stats.network.example)
    return small, replace(plan, steps=tuple(done), kept=tuple(kept))


def _fold(small: nn.Module, done: list[Step], example: Example) -> list[Step]:
    """Let neighbouring layers take over channel orders, and note in the steps which ones are left."""
    if not any(step.settings.get("reorders") for step in done):
        return done
    fold(small, example)
    return [with_sides(small, step) for step in done]


def _present(model: nn.Module, names: frozenset[str]) -> frozenset[str]:
    known = dict(model.named_modules())
    missing = sorted(names - set(known))
    if missing:
        raise CallError(f"The plan names a layer that the model does not have: '{missing[0]}'.")
    return names


def _carry_out(small: nn.Module, step: Step, stats: Statistics) -> tuple[str | None, Step]:
    """Do one step in place; on failure undo it and give the reason."""
    method = resolve(step)
    group = step.group or stats.network.group(step.layers)
    refused = method.refuses(group)
    if refused:
        raise CallError(f"{step.method} does not apply to layer '{step.layers[0]}': {refused}.")
    places = {layer.name: locate(small, layer) for layer in group.layers}
    modules = {name: small.get_submodule(place) for name, place in places.items()}
    method.cost(group)  # refuses settings outside their range
    looked: tuple[Method, Any] | None = None
    if isinstance(method, Looking):
        looked = method.look(small, stats.network.example, places)
        method = looked[0]
    cost = method.cost(group)
    if not step.allow_growth and not cost.lowers(group.cost):
        raise CallError(
            f"{step.method} with {_short(step.settings)} would not shrink layer '{step.layers[0]}': "
            f"{method.cost(group).params} parameters and {method.cost(group).macs} MACs instead of "
            f"{group.cost.params} and {group.cost.macs}. Lower the rank, or set allow_growth on the step."
        )
    rewrite = method.rewrite(modules, _factors(stats, group, method, modules) if looked is None else looked[1])
    before = None if not method.exact else _output(small, stats.network.example)
    for name, place in places.items():
        put(small, place, rewrite.modules[name])
    reason = _check(small, stats.network.example, before)
    if reason is not None:
        for name, place in places.items():
            put(small, place, copy.deepcopy(modules[name]))  # until now it shared the original's weights
        return f"rolled back: {reason}", step
    resolved = rewrite.resolved
    return None, replace(step, settings=settings(resolved), group=group, before=group.cost, after=resolved.cost(group))


def _factors(stats: Statistics, group: Group, method: Method, modules: Mapping[str, nn.Module]) -> Any:
    """The cached decomposition of the original layers; of the present ones where an earlier step changed them."""
    if all(stats.modules.get(name) is not None and _same(stats.modules[name], m) for name, m in modules.items()):
        return stats.factors(group, method)
    return method.factor(modules, {})


def _same(original: nn.Module, present: nn.Module) -> bool:
    return original.weight is present.weight or original.weight.shape == present.weight.shape


def _short(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items() if key != "metric")


def _output(model: nn.Module, example: Example) -> list[torch.Tensor]:
    copied = shallow(model)  # code that writes to buffers in forward writes to the copy's
    with evaluating(copied):
        return tensors(example.run(copied))


def _check(model: nn.Module, example: Example, exact: list[torch.Tensor] | None) -> str | None:
    """One forward pass on the example; for an exact step the output must not have moved."""
    try:
        found = _output(model, example)
    except ModelError as error:
        return str(error)
    if exact is None:
        return None
    close = all(torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-4) for a, b in zip(exact, found, strict=True))
    return None if close else "the output on the example changed although the method is exact"

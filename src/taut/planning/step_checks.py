"""What a step is held against: what has to stay of a layer, what it costs, and what the model gave before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from taut.core.tensors import all_tensors
from taut.errors import CallError, ModelError
from taut.methods.channels.sight import OUTSIDE
from taut.structure.outputs import Outputs
from taut.structure.patches import weight_of
from taut.structure.sameness import BY_FUSED_KERNELS, IN_OTHER_LAYERS, outputs_match
from taut.types import Group, Kept, Method, Network, Plan, Rewrite, Slimming, Step
from taut.types.method import costs_by_layer

NAMED = 4
"""Layers that a message names at most."""


def listed(names: Sequence[str]) -> str:
    """Names in a message, few of many."""
    return f"'{', '.join(names[:NAMED])}'" + (f" (of {len(names)})" if len(names) > NAMED else "")


def below_floor(net: Network, group: Group, rewrite: Rewrite, modules: Mapping[str, nn.Module]) -> str | None:
    """Why a step may not be carried out: it would leave less of a layer than the user wants to stay."""
    method = rewrite.resolved
    for layer in group.layers if net.floors else ():
        inside = () if layer.block is None else (name for name in layer.block.layers if name in net.floors)
        if (held := next(iter(inside), None)) is not None:
            return f"{net.floors[held].share:.0%} of '{held}' has to stay, as asked, which stands in it"
        floor = net.floors.get(layer.name)
        if floor is None:
            continue
        if method.masks:
            left, was = (_weights(found[layer.name]) for found in (rewrite.modules, modules))
            fits = left >= min(floor.weights, was)
        elif isinstance(method, Slimming):
            left = next(math.prod(now.weight) for now in method.after(group) if now.name == layer.name)
            fits = left >= min(floor.weights, math.prod(layer.weight))
        else:
            fits = floor.allows(costs_by_layer(method, group)[layer.name])
        if not fits:
            return f"{floor.share:.0%} of '{layer.name}' has to stay, as asked, and {method.name} would leave less"
    return None


def _weights(module: nn.Module) -> int:
    return int(weight_of(module).count_nonzero())


def growth(step: Step, method: Method, group: Group) -> CallError:
    """The error of a step after which its layers would cost no less."""
    if method.masks:
        return CallError(
            f"{step.method} with {shown_settings(step.settings)} would prune nothing of layer '{step.layers[0]}' and "
            "those with it: raise the sparsity, spare less, or set allow_growth on the step."
        )
    cost = method.cost(group)
    return CallError(
        f"{step.method} with {shown_settings(step.settings)} would not shrink layer '{step.layers[0]}': {cost.params} "
        f"parameters and {cost.macs} MACs instead of {group.cost.params} and {group.cost.macs}. Lower the rank, or set "
        "allow_growth on the step."
    )


def shown_settings(values: Mapping[str, Any]) -> str:
    """Settings as a message shows them."""
    return ", ".join(f"{key}={value}" for key, value in values.items() if key != "metric")


def departs(outputs: Outputs, most: int | None, model: nn.Module, exact: nn.Module | None = None) -> str | None:
    """How a model's outputs are of another form than the original's; for an exact step, how they moved at all.

    Args:
        outputs: the original's.
        most: inputs that are tried; None: all.
        model: what was made of it.
        exact: the model before the step.
    """
    try:
        present = outputs.run(model, most)
    except ModelError as error:
        return str(error)
    reason = outputs.differ(present)
    if reason is not None or exact is None:
        return reason
    before = outputs.run(exact, most)
    same = outputs_match(all_tensors(before), all_tensors(present), IN_OTHER_LAYERS)
    if same or _same_unfused(outputs, most, exact, before, model, present):
        return None
    return "the output on the example changed although the method is exact"


def _same_unfused(
    outputs: Outputs, most: int | None, exact: nn.Module, before: Any, model: nn.Module, present: Any
) -> bool:
    """Whether torch's encoders give the same layer by layer, and as their user runs them but for fused kernels.

    Args:
        outputs: the original's.
        most: inputs that are tried; None: all.
        exact: the model before the step.
        before: its outputs.
        model: what was made of it.
        present: its outputs.
    """
    if not any(isinstance(module, nn.TransformerEncoder) for module in exact.modules()):
        return False
    if not outputs_match(all_tensors(before), all_tensors(present), BY_FUSED_KERNELS):
        return False
    one, other = (all_tensors(outputs.run(run, most, fused=False)) for run in (exact, model))
    return outputs_match(one, other, IN_OTHER_LAYERS)


def without_form(step: Step, forms: Plan) -> str | None:
    """Why there is nothing that a step could do: a layer of it is made by one that was rolled back."""
    for kept in forms.kept:
        if any(name.startswith(f"{kept.layer}.") for name in step.layers):
            return f"'{kept.layer}' has no plain form: {kept.reason}"
    return None


def staying_in(step: Step, stays: Mapping[str, str], net: Network) -> list[Kept]:
    """Layers that a step could not make narrower, and why."""
    layers = () if step.group is None else step.group.layers
    asked = {OUTSIDE.format(name=name): f"they also belong to '{name}', which is kept as asked" for name in net.kept}
    reasons = {name: asked.get(reason, reason) for name, reason in stays.items()}
    return [Kept(layer.name, reasons[layer.name], layer.cost) for layer in layers if layer.name in reasons]

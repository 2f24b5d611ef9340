"""Layers in their plain form, before anything else is done to a network: no output changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from torch import nn

from taut.methods import METHODS, resolve
from taut.methods.plain_form import PlainForm
from taut.planning.application import apply_plan
from taut.structure.observation import observe
from taut.structure.support import ATTENTION, COMPUTED, CONVOLUTION, LINEAR, MULTIPLIED, RECURRENT
from taut.structure.surgery import clone
from taut.structure.tracing import trace
from taut.types import Group, Kept, Layer, Network, Plan, Step

PLAIN_FORMS = {
    COMPUTED: "bake",
    LINEAR: "as_linear",
    CONVOLUTION: "as_conv",
    ATTENTION: "as_attention",
    RECURRENT: "as_recurrent",
    MULTIPLIED: "as_layer",
}
"""Why a layer is left alone -> the method that does away with it."""


def in_plain_form(model: nn.Module, net: Network) -> tuple[nn.Module, Network, tuple[Step, ...]]:
    """Give every layer that has one its plain form: weights that are computed, linear layers of other classes.

    Args:
        model: is not changed.
        net: what `trace` found in it.

    Returns:
        The model, its network, and the steps that were done.
    """
    steps = [
        Step((layer.name,), PLAIN_FORMS[layer.skip], {}, Group((layer,)), reason="exact", damage=0.0)
        for layer in net.layers
        if layer.skip in PLAIN_FORMS and METHODS[PLAIN_FORMS[layer.skip]]().refuses(Group((layer,))) is None
    ]
    return carry_exact(model, net, steps)


def carry_exact(model: nn.Module, net: Network, steps: Sequence[Step]) -> tuple[nn.Module, Network, tuple[Step, ...]]:
    """Carry out exact steps, and trace again.

    Args:
        model: is not changed.
        net: what `trace` found in it.
        steps: none of them changes an output.

    Returns:
        The model, its network, and the steps that were done; layers that were to get
        their plain form, and could not, have the reason for it.
    """
    if not steps:
        return model, net, ()
    done, plan = apply_plan(model, Plan(tuple(steps)), observe(net, model))
    failed = {one.layer: one.reason for one in plan.kept}
    traced = trace(done, net.example)
    layers = tuple(
        replace(layer, skip=failed.get(layer.name, layer.skip)) if layer.skip in PLAIN_FORMS else layer
        for layer in traced.layers
    )
    return done, replace(traced, layers=layers).leaving_as(net), plan.steps


def idle_forms(small: nn.Module, base: nn.Module, exact: Sequence[Step], steps: Sequence[Step]) -> tuple[Step, ...]:
    """The exact steps that give layers a plain form which nothing else needs: no other step is about these layers.

    Args:
        small: what all steps made.
        base: what the exact ones made.
        exact: these.
        steps: all others.
    """

    def idle(step: Step) -> bool:
        others = [name for other in (*exact, *steps) if other is not step for name in other.layers]
        return (
            step.method in PLAIN_FORMS.values()
            and not any(f"{name}.".startswith(f"{own}.") for name in others for own in step.layers)
            and step.group is not None
            and all(_untouched(small, base, step, layer) for layer in step.group.layers)
        )

    return tuple(step for step in exact if idle(step))


def in_own_form(model: nn.Module, original: nn.Module, steps: Sequence[Step]) -> nn.Module:
    """A copy of a model in which the layers of these steps are the original's again."""
    copied = clone(model)
    for step in steps:
        for layer in step.group.layers if step.group is not None else ():
            _form_of(step).give_back(copied, original, layer)
    return copied


def kept_whole(kept: Sequence[Kept], idle: Sequence[Step], net: Network) -> tuple[Kept, ...]:
    """What stays, with modules in the place of the layers that they became where they are as they were in the end.

    Args:
        kept: as a plan of the plain forms has it.
        idle: the steps that gave plain forms that nothing needs.
        net: the original.
    """
    modules = {
        la.name: la for step in idle if step.group is not None for la in step.group.layers if not la.weight or la.summed
    }
    if not modules:
        return tuple(kept)

    def whole(name: str) -> str:
        return next((module for module in modules if name.startswith(f"{module}.")), name)

    merged: dict[str, Kept] = {}
    for one in kept:
        name = whole(one.layer)
        merged.setdefault(name, one if name == one.layer else Kept(name, one.reason, modules[name].cost, one.code))
    inside = (la for la in net.layers if whole(la.name) != la.name)
    return (*merged.values(), *(Kept(la.name, str(la.skip), la.cost, "skipped") for la in inside))


def _form_of(step: Step) -> PlainForm:
    return cast(PlainForm, resolve(step))


def _untouched(small: nn.Module, base: nn.Module, step: Step, layer: Layer) -> bool:
    """Whether a layer is in both what its plain form was."""
    try:
        now, before = (model.get_submodule(layer.name) for model in (small, base))
    except AttributeError:
        return False
    return _form_of(step).untouched(now, before, layer)

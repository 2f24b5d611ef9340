"""Layers in their plain form, before anything else is done to a network: no output changes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from taut.methods import METHODS
from taut.planning.application import apply_plan
from taut.structure.observation import observe
from taut.structure.support import COMPUTED, LINEAR
from taut.structure.tracing import trace
from taut.types import Group, Network, Plan, Step

PLAIN_FORMS = {COMPUTED: "bake", LINEAR: "as_linear"}
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
        The model, its network, and the steps that were done.
    """
    if not steps:
        return model, net, ()
    done, plan = apply_plan(model, Plan(tuple(steps)), observe(net, model))
    return done, trace(done, net.example).leaving_as(net), plan.steps

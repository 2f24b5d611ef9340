"""What a step of channels leaves of a network, and what is known of that: nothing recovered, nothing observed anew.

The weights that make up for what goes are the exact solution for the observed inputs, and what was observed of the
channels that stay is a part of what was observed of all: ranks can be chosen behind it at the price of decompositions.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import nn

from taut.errors import CallError
from taut.methods import resolve, settings
from taut.planning.execution import looked_at
from taut.planning.step_checks import listed, staying_in
from taut.structure.statistics import Statistics
from taut.structure.surgery import answering, clone, locate, part
from taut.structure.surgery import replace as put
from taut.types import Group, Kept, Looking, NothingToDo, Slimming, Step


@dataclass(frozen=True, eq=False)
class Narrower:
    """A network from which channels went.

    Attributes:
        model: with narrower layers.
        step: resolved, with its predicted damage. kept: layers of which channels stay, and why.
        stats: of the narrower layers; of tables and the like that lost channels nothing is known any more.
    """

    model: nn.Module
    step: Step
    kept: Sequence[Kept]
    stats: Statistics


def narrow(model: nn.Module, step: Step, stats: Statistics) -> Narrower | None:
    """The network that a step of channels leaves; None where no widths meet what it asks.

    Args:
        model: it is not changed.
        step: of a method that takes out channels.
        stats: of the model.
    """
    method, group = resolve(step), step.group or Group(())
    if not isinstance(method, Looking) or not isinstance(method, Slimming):
        raise CallError(f"{step.method} takes out no channels.")
    small = clone(model, without=frozenset(step.layers))
    places = {layer.name: locate(small, layer) for layer in group.layers}
    seen = {name: stats.seen(name) for name in places if name in stats.modules or name in stats.asides}
    try:
        looked = looked_at(
            method, small, stats.network.example, places, {"stats": seen} if method.uses_statistics else {}
        )
    except CallError:
        return None  # no widths meet it
    if isinstance(looked, NothingToDo):
        if looked.warns:
            warnings.warn(f"Layer {listed(step.layers)} is left as it was: {looked.reason}", stacklevel=3)
        return None
    resolved, found = cast(tuple[Any, Any], looked)
    modules = resolved.rewrite({name: part(small, place) for name, place in places.items()}, found).modules
    for layer in group.layers:
        put(small, places[layer.name], answering(modules[layer.name], layer))
    cost, damage = resolved.cost(group), resolved.damage(found)
    done = replace(step, settings=settings(resolved), before=group.cost, after=cost, damage=damage)
    lost = {name: (cut.outputs, cut.inputs) for name, cut in found.cuts.items()}
    left = stats.narrowed(small, resolved.after(group), lost)
    return Narrower(small, done, staying_in(step, found.stays, stats.network), left)

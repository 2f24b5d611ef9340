"""What a step of channels leaves of a network, and what is known of that: nothing recovered, nothing observed anew.

The weights that make up for what goes are the exact solution for the observed inputs, and what was observed of the
channels that stay is a part of what was observed of all: ranks can be chosen behind it at the price of decompositions.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from torch import nn

from taut.errors import CallError
from taut.measure.counting import count
from taut.methods import resolve, settings
from taut.planning.execution import looked_at
from taut.planning.step_checks import listed, staying_in
from taut.structure.statistics import Statistics
from taut.structure.surgery import answering, clone, locate, part, renumber, shallow
from taut.structure.surgery import replace as put
from taut.types import Group, Kept, Looking, NothingToDo, Renumbering, Slimming, Step

REMEMBERED = 4
"""Networks that are remembered: each is as large as what is left of the model, and of its statistics."""


@dataclass(frozen=True, eq=False)
class Made:
    """What is left of a network.

    Attributes:
        model: with narrower layers.
        stats: of the narrower layers; the network's MACs are counted.
        found: what is found out about it.
    """

    model: nn.Module
    stats: Statistics
    found: dict[Any, Any] = field(default_factory=dict, repr=False)


class Latest(dict[Any, Made]):
    """By the channels that are left, the networks that were made of one model last: limits that differ share them."""

    def __setitem__(self, key: Any, made: Made) -> None:
        """Add one; the oldest goes."""
        super().__setitem__(key, made)
        while len(self) > REMEMBERED:
            del self[next(iter(self))]


@dataclass(frozen=True, eq=False)
class Narrower:
    """A network from which channels went.

    Attributes:
        made: the network.
        step: resolved, with its predicted damage. kept: layers of which channels stay, and why.
    """

    made: Made
    step: Step
    kept: Sequence[Kept]

    @property
    def model(self) -> nn.Module:
        """With narrower layers."""
        return self.made.model

    @property
    def stats(self) -> Statistics:
        """Of the narrower layers."""
        return self.made.stats


def narrow(
    model: nn.Module, step: Step, stats: Statistics, latest: Latest | None = None, *, tell: bool = True
) -> Narrower | None:
    """The network that a step of channels leaves; None where no widths meet what it asks.

    Args:
        model: it is not changed.
        step: of a method that takes out channels.
        stats: of the model.
        latest: made of this very model before; what is new is added. None: nothing is remembered.
        tell: whether the user hears why no channels can go.
    """
    method, group = resolve(step), step.group or Group(())
    if not isinstance(method, Looking) or not isinstance(method, Slimming):
        raise CallError(f"{step.method} takes out no channels.")
    small = clone(model, without=frozenset(step.layers))
    places = {layer.name: locate(small, layer) for layer in group.layers}
    seen = {name: stats.seen(name) for name in places if name in stats.modules or name in stats.asides}
    try:
        looked = looked_at(method, small, stats, places, seen)
    except CallError:
        return None  # no widths meet it
    if isinstance(looked, NothingToDo):
        if looked.warns and tell:
            warnings.warn(f"Layer {listed(step.layers)} is left as it was: {looked.reason}", stacklevel=3)
        return None
    resolved, found = cast(tuple[Any, Any], looked)
    cost, damage = resolved.cost(group), resolved.damage(found)
    done = replace(step, settings=settings(resolved), before=group.cost, after=cost, damage=damage)
    lost = {name: (cut.outputs, cut.inputs) for name, cut in found.cuts.items()}
    key = tuple((name, *(tuple(index.tolist()) for index in kept)) for name, kept in lost.items())
    latest = Latest() if latest is None else latest
    if not getattr(method, "remembers", False) or key not in latest:
        modules = resolved.rewrite({name: part(small, place) for name, place in places.items()}, found).modules
        for layer in group.layers:
            put(small, places[layer.name], answering(modules[layer.name], layer))
        renumber(small, resolved.renumbered() if isinstance(resolved, Renumbering) else {})
        left = stats.narrowed(small, resolved.after(group), lost)
        # what no layer counts (products of queries and keys) falls with the channels, too
        macs = count(shallow(small), stats.network.example).macs
        network = replace(left.network, cost=replace(left.network.cost, macs=macs))
        latest[key] = Made(small, replace(left, network=network))
    return Narrower(latest[key], done, staying_in(step, found.stays, stats.network))

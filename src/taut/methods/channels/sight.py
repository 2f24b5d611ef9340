"""What filter pruning sees of a network before it is asked for anything: seen once, as long as nothing changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from taut.core.example import Example
from taut.methods.channels.heads import with_heads
from taut.methods.channels.importance import curves_of, orders
from taut.methods.channels.verification import failing
from taut.methods.channels.widths import Curve
from taut.methods.narrow_layers import described
from taut.structure.channels.groups import ChannelGroup, Coupling, coupled, hidden_alone
from taut.types import Layer

OUTSIDE = "they also belong to '{name}', which is none of the step's layers"


@dataclass(frozen=True, eq=False)
class Sight:
    """A network whose channels may go.

    Attributes:
        groups: of the step's layers. curves: in which order their channels go, and what that costs.
        layers: as they are. stays: layer -> why (some of) its channels stay.
    """

    groups: Sequence[ChannelGroup]
    curves: Sequence[Curve]
    layers: Sequence[Layer]
    stays: Mapping[str, str]
    _failing: dict[Any, Mapping[int, str]] = field(default_factory=dict, repr=False)

    def failing(self, model: nn.Module, example: Example, gone: Sequence[Tensor]) -> Mapping[int, str]:
        """The groups without whose channels the network fails, with the reason (`verification.failing`)."""
        key = tuple(tuple(index.tolist()) for index in gone)
        if key not in self._failing:
            self._failing[key] = dict(failing(model, example, self.groups, gone))
        return self._failing[key]


def seen_at(
    model: nn.Module,
    example: Example,
    places: Mapping[str, str],
    stats: Mapping[str, Any],
    wish: tuple[str, bool, frozenset[str] | None],
    seen: dict[Any, Any] | None,
) -> Sight:
    """What is seen of `model`, or was when it was looked at before.

    Args:
        model: is not changed.
        example: how it is called.
        places: the step's layers -> where they stand.
        stats: of them.
        wish: the criterion, whether hidden units alone may go, and which whole numbers of modules may fall with heads
            (`with_heads`).
        seen: of this very model before; what is new is added. None: it may have been another one.
    """
    key = wish, tuple(places.items()), len(example.paths)
    if seen is not None and key in seen:
        known: Sight = seen[key]
        return known
    names, (criterion, hidden, numbers) = {place: name for name, place in places.items()}, wish
    ranked = orders(model, stats, criterion, names)
    coupling = coupled(model, example, ranked) if hidden else with_heads(model, example, ranked, numbers)
    groups, stays = _within(hidden_alone(coupling, model) if hidden else coupling, names)
    layers, curves = described(model, example, names), curves_of(model, groups, stats, criterion, names)
    found = Sight(groups, curves, layers, stays)
    if seen is not None:
        seen[key] = found
        resolved = frozenset(number.key for group in groups for number in group.numbers)
        seen[(criterion, hidden, resolved), *key[1:]] = found  # as a step that was resolved on it asks for it
    return found


def _within(coupling: Coupling, names: Mapping[str, str]) -> tuple[list[ChannelGroup], dict[str, str]]:
    """The groups that lie within the step's layers, and why channels of these layers stay."""
    groups = []
    stays = {names[place]: reason for place, reason in coupling.stays.items() if place in names}
    for group in coupling.groups:
        outside = next((m.layer for m in group.members if m.layer not in names), None)
        if outside is None:
            groups.append(group)
        else:
            given = [m.layer for m in group.of("out") if m.layer in names]
            stays |= {names[place]: OUTSIDE.format(name=outside) for place in given}
    return groups, stays

"""Which channels of which layers go together: found by running the network with labelled channels.

Channels that meet in a sum are one class, and so are those that grouped layers or reshaping code can only lose
together.
Channels that reach the output, or meet what has a width of its own, stay.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from taut.core.example import Example
from taut.core.text import some
from taut.nn import StateLinear
from taut.structure.channels.heads import Number, Split, Splits
from taut.structure.channels.mentions import named_in_code
from taut.structure.channels.recurrent_rules import pair_units, stacked
from taut.structure.channels.runs import End, LabelledRuns, run_labelled

UNREAD = "no layer reads them"
ALONE = "no others go the same way, and one of them has to stay"


@dataclass(frozen=True, eq=False)
class Member:
    """A side of a layer that loses channels with a group.

    Attributes:
        layer: its name. end: which side.
        index: (n, m), the m indices on this side of each of the group's n channels.
        width: of the whole side, other groups' channels and those that stay included.
    """

    layer: str
    end: End
    index: Tensor
    width: int


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels with the same members everywhere: any of them may go, in all members at once.

    Attributes:
        name: of the first layer that gives them.
        members: in the order of the model.
        rules: names of what these channels go through that a rule of the user's describes.
        numbers: what modules hold as whole numbers, and what becomes smaller with each of them.
    """

    name: str
    members: tuple[Member, ...]
    rules: tuple[str, ...] = ()
    numbers: tuple[Number, ...] = ()

    @property
    def size(self) -> int:
        """How many channels may go."""
        return len(self.members[0].index)

    def of(self, *ends: End) -> tuple[Member, ...]:
        """The members on some sides."""
        return tuple(member for member in self.members if member.end in ends)


@dataclass(frozen=True, eq=False)
class Coupling:
    """All that can be narrowed.

    Attributes:
        groups: in the order of the model.
        stays: layer that gives channels -> why (some of) these stay.
        foreign: layers that read channels times, or plus, something that comes neither from a layer nor from the
            model's own tensors (a mask): what it is in another run is not known.
        unreached: layers that code may use and the example does not reach, so that all channels stay.
        splits: views that split channels, where these were asked for, with the places of the groups that their channels
            are, and whether all of them are those of one group.
    """

    groups: tuple[ChannelGroup, ...]
    stays: Mapping[str, str] = field(default_factory=dict)
    foreign: frozenset[str] = frozenset()
    unreached: tuple[str, ...] = ()
    splits: tuple[tuple[Split, frozenset[int], bool], ...] = ()


Orders = Callable[[Sequence["ChannelGroup"]], Sequence[Any]]
"""Groups -> the channels of each in the order in which they should go."""


def coupled(model: nn.Module, example: Example, orders: Orders | None = None, splits: Splits | None = None) -> Coupling:
    """The groups of channels that can be taken out of `model`.

    Args:
        model: any module; it is not changed.
        example: how it is called; it is run on a few of its samples, and on noise where it takes numbers.
        orders: which hidden units of the layers and directions of one recurrent layer go together: the first of each,
            and so on. None: by the weights that read them.
        splits: where views that split channels are noted, and of which modules whole heads go; None: nowhere, of none.

    Raises:
        ModelError: the model cannot be run.
    """
    runs = run_labelled(model, example, splits=splits)
    unreached = named_in_code(runs.copied, runs.unreached())
    if runs.blind:
        _pin_all(runs, "the model returns no tensor that could be compared")
    if unreached:
        remedy = "give an input that does, or remove them"
        _pin_all(runs, f"the example does not reach {some(unreached)}, which may read or give any channels: {remedy}")
    pair_units(runs.copied, runs.sides, runs.labels, {} if orders is None else _ranks(runs, orders))
    sharing, read = runs.sharing(), runs.read_elsewhere()
    for (name, _), side in runs.sides.items():
        if name in sharing:
            runs.labels.atoms.pin(side, f"'{name}' shares a parameter with another layer")
        if name in read:
            runs.labels.atoms.pin(side, f"other code uses a parameter of '{name}'")
    sides, pinned = runs.classes(), runs.labels.atoms.pinned()
    groups, left = _grouped(sides, pinned, runs)
    seen = () if splits is None else _within(splits.settled(runs.labels), groups, sides)
    return Coupling(groups, _reasons(sides, pinned | left), frozenset(runs.foreign), unreached, seen)


def hidden_alone(coupling: Coupling, model: nn.Module) -> Coupling:
    """The hidden units of recurrent layers, and why some of these stay; as if there were no other channels."""
    inner = {name for name, module in model.named_modules() if isinstance(module, StateLinear)}
    groups = tuple(group for group in coupling.groups if any(member.layer in inner for member in group.members))
    return replace(coupling, groups=groups, stays={n: reason for n, reason in coupling.stays.items() if n in inner})


def _ranks(runs: LabelledRuns, orders: Orders) -> dict[str, Tensor]:
    """When the hidden units of every layer and direction should go, where several stay equally wide."""
    several = {f"{name}.states.{i}" for name, m in runs.copied.named_modules() for i in stacked(m)}
    groups, _ = _grouped(runs.classes(), runs.labels.atoms.pinned(), runs) if several else ((), {})
    groups = tuple(group for group in groups if any(member.layer in several for member in group.members))
    ranks: dict[str, Tensor] = {}
    for group, order in zip(groups, orders(groups) if groups else (), strict=True):
        rank = torch.empty(group.size, dtype=torch.float64)
        rank[torch.as_tensor(order)] = torch.arange(group.size, dtype=torch.float64)
        for member in group.of("in"):
            if member.layer in several:
                known = ranks.setdefault(member.layer, torch.full((member.width,), torch.inf, dtype=torch.float64))
                known[member.index[:, 0]] = rank
    return ranks


def _pin_all(runs: LabelledRuns, reason: str) -> None:
    for atoms in runs.sides.values():
        runs.labels.atoms.pin(atoms, reason)


def _grouped(
    sides: Mapping[tuple[str, End], Tensor], pinned: Mapping[int, str], runs: LabelledRuns
) -> tuple[tuple[ChannelGroup, ...], dict[int, str]]:
    """Classes with the same sides, and as many indices on each, as one group; and why others are in none."""
    places: dict[int, dict[tuple[str, End], list[int]]] = defaultdict(dict)
    for side, classes in sides.items():
        for index, number in enumerate(classes.tolist()):
            if number not in pinned:
                places[number].setdefault(side, []).append(index)
    alike: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for number, found in places.items():
        alike[tuple((side, len(index)) for side, index in found.items())].append(number)
    rank, ruled = {name: i for i, (name, _) in enumerate(runs.copied.named_modules())}, runs.ruled_classes()
    groups: list[ChannelGroup] = []
    left: dict[int, str] = {}
    for signature, numbers in alike.items():
        members = [
            Member(side[0], side[1], torch.tensor([places[n][side] for n in numbers]), len(sides[side]))
            for side, _ in signature
        ]
        members.sort(key=lambda m: (rank[m.layer], m.end))
        if len(numbers) > 1 and any(m.end == "in" for m in members):
            rules = set().union(*(ruled.get(number, ()) for number in numbers))
            name = next(m.layer for m in members if m.end == "out")
            groups.append(ChannelGroup(name, tuple(members), tuple(sorted(rules))))
        else:
            left |= dict.fromkeys(numbers, ALONE if len(numbers) == 1 else UNREAD)
    return tuple(sorted(groups, key=lambda group: rank[group.name])), left


def _within(
    splits: Sequence[Split], groups: Sequence[ChannelGroup], sides: Mapping[tuple[str, End], Tensor]
) -> tuple[tuple[Split, frozenset[int], bool], ...]:
    """Views with the groups of their channels: see `Coupling`."""
    owner: dict[int, int] = {}
    for place, group in enumerate(groups):
        first = group.members[0]
        owner.update(dict.fromkeys(sides[first.layer, first.end][first.index[:, 0]].tolist(), place))
    found = []
    for split in splits:
        times = Counter(split.rows.tolist())
        places = {owner.get(number) for number in times}
        known = frozenset(place for place in places if place is not None)
        whole = len(places) == 1 == len(known) and len(times) == groups[min(known)].size
        found.append((split, known, whole and len({*times.values()}) == 1))
    return tuple(found)


def _reasons(sides: Mapping[tuple[str, End], Tensor], pinned: Mapping[int, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for (name, end), classes in sides.items():
        if end == "out":
            reason = next((pinned[number] for number in classes.tolist() if number in pinned), None)
            if reason is not None:
                found[name] = reason
    return found

"""Which channels of which layers go together: found by running the network with labelled channels.

Every layer that gives channels labels them anew; the labels travel with the tensors through all operations that are
executed (`op_rules`), whatever code calls them; where they arrive at a layer that reads, its columns are noted.
Channels that meet in a sum are one class, and so are those that grouped layers or reshaping code can only lose
together.
Channels that reach the output, or meet what has a width of its own, stay.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from taut.core.example import Example
from taut.core.modes import evaluating, generator
from taut.core.tensors import all_tensors, map_tensors, tensors
from taut.errors import ModelError
from taut.structure.channels.classes import Atoms
from taut.structure.channels.labels import Labels
from taut.structure.channels.layer_rules import OPAQUE, Sides, narrowable, passes
from taut.structure.channels.op_rules import note
from taut.structure.sameness import few
from taut.structure.surgery import shallow

End = Literal["out", "in", "through"]
"""A layer's rows, its columns, or the values that it holds per channel between others."""

OUTPUT = "they reach the model's output"
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
    """

    name: str
    members: tuple[Member, ...]

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
    """

    groups: tuple[ChannelGroup, ...]
    stays: Mapping[str, str] = field(default_factory=dict)


def coupled(model: torch.nn.Module, example: Example) -> Coupling:
    """The groups of channels that can be taken out of `model`.

    Args:
        model: any module; it is not changed.
        example: how it is called; it is run on a few of its samples, and on noise where it takes numbers.

    Raises:
        ModelError: the model cannot be run.
    """
    copied = shallow(model)
    tracing = _Tracing(copied)
    _run(tracing, example)
    if tracing.blind:
        tracing.pin_all("the model returns no tensor that could be compared")
    unused = tracing.unused()
    if unused:
        told = ", ".join(f"'{name}'" for name in unused[:3]) + (", ..." if len(unused) > 3 else "")
        why = f"the example does not reach {told}, which may read any channels: remove them, or give an input that does"
        tracing.pin_all(why)
    return tracing.coupling()


def _run(tracing: _Tracing, example: Example) -> None:
    """On the first samples, or on all where the model does not run on few; on what takes other paths; on noise.

    Other inputs may take other branches; the negative is tried where some layer was not reached so far.
    """
    for part in dict.fromkeys((few(example), example)):
        try:
            tracing.run(part, part.value)
            break
        except ModelError:
            if part is example:
                raise
    for witness in example.paths[1:]:  # the first is the example's
        tracing.run(part, witness)
    random = generator(0)
    noise = map_tensors(
        lambda t: torch.randn(t.shape, generator=random).to(t) if t.is_floating_point() else t, part.value
    )
    for probe in (noise, map_tensors(lambda t: -t if t.is_floating_point() else t, noise)):
        if probe is noise or tracing.unused():
            with suppress(ModelError):
                tracing.run(part, probe)


class _Dispatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Labels what the operations outside of known layers make."""

    def __init__(self, tracing: _Tracing) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracing = tracing

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it, and note it."""
        given = kwargs or {}
        output = func(*args, **given)
        if not self.tracing.depth:
            self.tracing.used.update(id(t) for t in tensors((args, given)) if id(t) in self.tracing.owners)
            note(self.tracing.labels, func, args, given, output)
        return output


class _Tracing:
    """One or several runs of a copy of the model."""

    def __init__(self, copied: torch.nn.Module) -> None:
        self.copied = copied
        self.labels = Labels(Atoms())
        self.depth = 0
        self.blind = False
        self.used: set[int] = set()
        self.called: set[str] = set()
        self.owners: dict[int, list[str]] = defaultdict(list)
        self.names: dict[str, torch.nn.Module] = {}
        self.sides: dict[tuple[str, End], Tensor] = {}
        for name, module in copied.named_modules():
            for parameter in module.parameters(recurse=False):
                self.owners[id(parameter)].append(name)
        inside: list[str] = []
        for name, module in copied.named_modules():
            if any(name.startswith(f"{outer}.") for outer in inside):
                continue
            if narrowable(module) or isinstance(module, OPAQUE):
                self.names[name] = module
                inside.append(name) if name else None

    def run(self, example: Example, value: Any) -> None:
        """One run; what reaches the output stays."""
        handles = []
        for name, module in self.names.items():
            handles += [
                module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True),
                module.register_forward_hook(self._leave(name), prepend=True, with_kwargs=True),
            ]
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        self.depth = 0
        try:
            with evaluating(self.copied), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _Dispatch(self):
                output = example.run(self.copied, value)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for handle in handles:
                handle.remove()
        made = all_tensors(output)
        self.labels.pin(made, OUTPUT)
        self.blind |= not made

    def _enter(self, *_: Any) -> None:
        self.depth += 1

    def _leave(self, name: str) -> Any:
        def hook(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.depth -= 1
            if self.depth:
                return
            self.called.add(name)
            if not narrowable(module) or not args or len(tensors(args)) != 1 or not isinstance(output, Tensor):
                kind = type(module).__name__
                self.labels.pin((args, kwargs), f"they are read by '{name}', a {kind}, which is not made narrower")
                for t in tensors(output):
                    self.labels.put(t, None)
                return
            passes(module, Sides(self.labels, self.sides, name), args[0], output)

        return hook

    def unused(self) -> list[str]:
        """Layers with parameters that the runs neither called nor used otherwise."""
        read = {name for number in self.used for name in self.owners[number]}
        opaque = [name for name, module in self.names.items() if not narrowable(module)]
        found = []
        for name, module in self.copied.named_modules():
            if not any(True for _ in module.parameters(recurse=False)) or name in self.called | read:
                continue
            if not any(name.startswith(f"{outer}.") for outer in (*opaque, *self.called)):
                found.append(name)
        return found

    def pin_all(self, reason: str) -> None:
        """Everything stays."""
        for atoms in self.sides.values():
            self.labels.atoms.pin(atoms, reason)

    def coupling(self) -> Coupling:
        """What the runs found."""
        shared = {name for names in self.owners.values() if len(names) > 1 for name in names}
        read = {name for number in self.used for name in self.owners[number]}
        for (name, _), side in self.sides.items():
            if name in shared:
                self.labels.atoms.pin(side, f"'{name}' shares a parameter with another layer")
            if name in read:
                self.labels.atoms.pin(side, f"other code uses a parameter of '{name}'")
        atoms, pinned = self.labels.atoms, self.labels.atoms.pinned()
        sides = {side: atoms.roots(found) for side, found in self.sides.items()}
        groups, left = _grouped(sides, pinned, list(self.names))
        return Coupling(groups, _reasons(sides, pinned | left))


def _grouped(
    sides: Mapping[tuple[str, End], Tensor], pinned: Mapping[int, str], order: Sequence[str]
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
    rank = {name: place for place, name in enumerate(order)}
    groups: list[ChannelGroup] = []
    left: dict[int, str] = {}
    for signature, numbers in alike.items():
        members = [
            Member(side[0], side[1], torch.tensor([places[n][side] for n in numbers]), len(sides[side]))
            for side, _ in signature
        ]
        members.sort(key=lambda m: (rank[m.layer], m.end))
        if len(numbers) > 1 and any(m.end == "in" for m in members):
            groups.append(ChannelGroup(next(m.layer for m in members if m.end == "out"), tuple(members)))
        else:
            left |= dict.fromkeys(numbers, ALONE if len(numbers) == 1 else UNREAD)
    return tuple(sorted(groups, key=lambda group: rank[group.name])), left


def _reasons(sides: Mapping[tuple[str, End], Tensor], pinned: Mapping[int, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for (name, end), classes in sides.items():
        if end == "out":
            reason = next((pinned[number] for number in classes.tolist() if number in pinned), None)
            if reason is not None:
                found[name] = reason
    return found

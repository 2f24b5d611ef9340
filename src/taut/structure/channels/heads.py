"""Heads: where the code of a module splits channels into as many parts as it holds a whole number for.

`q.view(batch, -1, self.num_heads, self.head_dim)` says how many heads there are by an attribute of the module. Such a
view is noted with the classes of its channels, so that whoever tries can find out which attributes have to change when
whole heads go.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from taut.structure.channels.labels import Labels

Held = Mapping[str, Mapping[str, int]]
"""Module -> its attributes that are whole numbers."""

WIDTHS = ("dim", "size", "width", "channel", "feature")
"""What a name of an attribute that counts heads does not have in it."""


class Number(NamedTuple):
    """A whole number that a module holds, and that becomes smaller with a group of channels.

    Attributes:
        module, attribute: where it stands. step: by how much it falls with every channel of the group.
    """

    module: str
    attribute: str
    step: int

    @property
    def key(self) -> str:
        """By which a plan knows it."""
        return f"{self.module}.{self.attribute}" if self.module else self.attribute


@dataclass(frozen=True, eq=False)
class Split:
    """Channels of one axis that came to lie on several, in the code of a module that holds whole numbers.

    Attributes:
        module: its name.
        lengths: of these axes.
        free: the place of the one that may become shorter.
        rows: the class of every index of that axis.
    """

    module: str
    lengths: tuple[int, ...]
    free: int
    rows: Tensor

    @property
    def length(self) -> int:
        """Of the axis that may become shorter."""
        return self.lengths[self.free]

    @property
    def totals(self) -> set[int]:
        """Lengths of axes that hold these heads with all of their width, and with others beside them."""
        *rest, width = [n for place, n in enumerate(self.lengths) if place != self.free]
        sizes = (n for count in range(len(rest) + 1) for n in itertools.combinations(rest, count))
        return {self.length * width * math.prod(beside) for beside in sizes}


def whole_numbers(model: nn.Module, only: Collection[str] | None = None) -> dict[str, Mapping[str, int]]:
    """The whole numbers above 1 that modules hold as attributes of their own; those of torch and taut are known.

    Args:
        model: any module.
        only: the keys of those that count (`Number.key`); None: all.
    """
    found: dict[str, Mapping[str, int]] = {}
    for name, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if type(value) is int and value > 1}
        if only is not None:
            own = {key: value for key, value in own.items() if Number(name, key, 0).key in only}
        if own and not type(module).__module__.startswith(("torch.nn.", "taut.nn")):
            found[name] = own
    return found


def counts_heads(attribute: str) -> bool:
    """Whether a name says that it is of how many heads there are."""
    return "head" in attribute and not any(word in attribute for word in WIDTHS) and not attribute.startswith("d_")


@dataclass(eq=False)
class Splits:
    """What is noted of views while a network runs.

    Attributes:
        held: see `whole_numbers`.
        ways: modules of which heads become fewer, and not narrower -> which of the axes that may hold the heads does.
        running: modules that hold numbers, and whose forward runs; the innermost comes last.
        noted: what was seen.
        several: modules in whose views more than one axis may hold the heads.
    """

    held: Held
    ways: Mapping[str, int] = field(default_factory=dict)
    running: list[str] = field(default_factory=list)
    noted: list[Split] = field(default_factory=list)
    several: set[str] = field(default_factory=set)

    def hooked(self, model: nn.Module) -> list[Any]:
        """Hooks that say which module runs."""
        handles = []
        for name in self.held:
            module = model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(self._enter(name)))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        return handles

    def _enter(self, name: str) -> Any:
        return lambda *_: self.running.append(name)

    def _leave(self, *_: Any) -> None:
        self.running.pop()

    def axis(self, lengths: Mapping[int, int]) -> int | None:
        """The axis on which the heads lie that become fewer; None where the module that runs has none.

        Args:
            lengths: axis -> length, of those on which the channels come to lie.
        """
        module = self.running[-1] if self.running else ""
        if module not in self.ways or not self.running:
            return None
        named: dict[int, bool] = {}
        for attribute, value in self.held[module].items():
            named[value] = named.get(value, False) or counts_heads(attribute)
        *others, _ = lengths  # the last one is the width of the heads, or what lies beside that
        fitting = sorted(
            (axis for axis in others if lengths[axis] in named),
            key=lambda axis: (named[lengths[axis]], axis),
            reverse=True,
        )
        self.several |= {module} if len(fitting) > 1 else set()
        return fitting[min(self.ways[module], len(fitting) - 1)] if fitting else None

    def note(self, label: Tensor, lengths: Mapping[int, int], free: int, labels: Labels) -> None:
        """Note a view; heads that a module splits by the same number go together."""
        if not self.running:
            return
        module = self.running[-1]
        index: list[Any] = [0] * label.ndim
        index[free] = slice(None)
        rows = label[tuple(index)]
        split = Split(module, tuple(lengths.values()), list(lengths).index(free), rows)
        if module in self.ways and split.length in self.held[module].values():
            other = next((s for s in self.noted if s.module == module and s.length == split.length), None)
            if other is not None:
                labels.tie(rows, other.rows)
        self.noted.append(split)

    def settled(self, labels: Labels) -> tuple[Split, ...]:
        """The views with the classes as they are now, each once."""
        found: dict[Any, Split] = {}
        for split in self.noted:
            rows = labels.atoms.roots(split.rows)
            key = split.module, split.lengths, split.free, tuple(rows.tolist())
            found[key] = Split(split.module, split.lengths, split.free, rows)
        return tuple(found.values())


def candidates(split: Split, held: Mapping[str, int], size: int) -> list[Number]:
    """The numbers that may fall with the heads of a view: first those named after heads, then counts, then widths.

    Args:
        split: the view.
        held: what its module holds.
        size: channels of the group that the heads are.
    """
    module, share = split.module, split.length // size
    counts = [Number(module, key, share) for key, value in held.items() if value == split.length]
    widths = [Number(module, key, value // size) for key, value in held.items() if value in split.totals]
    return [*sorted(counts, key=lambda number: not counts_heads(number.attribute)), *widths]


def attempts(found: Sequence[Number], most: int) -> Iterable[tuple[Number, ...]]:
    """Which of the numbers change, in the order in which that should be tried.

    A count that is named after heads falls with them, whether the example shows it or not; of the others as few as
    possible change.

    Args:
        found: see `candidates`.
        most: how many attempts are worth it.
    """
    named = [number for number in found if counts_heads(number.attribute)]
    rest = [number for number in found if number not in named]
    ways = [(*named, *some) for count in range(len(rest) + 1) for some in itertools.combinations(rest, count)]
    if named:
        ways += [some for count in range(len(found)) for some in itertools.combinations(found, count)]
    return itertools.islice(dict.fromkeys(ways), most)

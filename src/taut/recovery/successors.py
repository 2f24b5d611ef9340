"""What follows a layer in the original: a batch norm, a sum with another branch, a ReLU; each of them at most once.

A layer whose output is rectified has done enough where the original is negative and it is, too; a branch of a residual
sum can make up for what the other branch already lost. Both give a layer other outputs to aim at than its own old ones.
Only what is certain counts: a tensor that anything else reads as well has to stay what it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from taut.core.tensors import all_tensors, tensors

SUMS = frozenset(
    (
        torch.add,
        Tensor.add,
        Tensor.add_,
        Tensor.__add__,
        Tensor.__radd__,
        Tensor.__iadd__,
    )
)
RECTIFIERS = frozenset((torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, functional.relu))

UNREAD = frozenset(
    (
        *("__get__", "__len__", "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset"),
        *("element_size", "is_contiguous", "is_floating_point", "is_complex", "is_signed", "get_device", "type"),
    )
)
"""Functions that give no tensor and read no values."""

TINY = 0.05
"""Scales of a batch norm below this share of their mean are not divided by: such channels aim at what they gave."""

Place = tuple[str, str]
"""Where a tensor can be found in another model with these modules: ("in" or "out", module)."""


@dataclass(frozen=True)
class Follows:
    """The original makes  z = scale y + shift + other,  or max(z, 0), of a layer's output y.

    Attributes:
        scale, shift: (g, 1, o), of the batch norm, or 1 and 0.
        total: (g, n, o), z in the original at the chosen positions, where there is a sum; None where z is
            scale y + shift.
        partner: where the other summand is found, None where there is none or no module gives or takes it.
        rectified: whether only max(z, 0) is used.
    """

    scale: Tensor
    shift: Tensor
    total: Tensor | None
    partner: Place | None
    rectified: bool

    def aim(self, rows: Tensor, other: Tensor | None, present: Tensor | None = None) -> Tensor:
        """Outputs that a layer should give, (g, n, o).

        Without `present` those that make z what it was. With it, where z was negative: those that make z negative or
        leave it so. Each least squares fit to the latter lowers  sum over z > 0 of (z - z')^2 + sum over z <= 0 of
        max(z', 0)^2  (majorization; the error of max(z, 0) but for signs that fall, which are held back).

        Args:
            rows: (g, n, o), what the layer gave in the original.
            other: the other summand as it is now; None for as it was.
            present: what the layer gives now.
        """
        plain = self.scale * rows + self.shift
        total = plain if self.total is None else self.total
        if other is None:
            other = total - plain
        if present is not None and self.rectified:
            total = torch.where(total > 0, total, (self.scale * present + self.shift + other).clamp(max=0))
        fine = self.scale.abs() > TINY * self.scale.abs().mean()
        return torch.where(fine, (total - other - self.shift) / torch.where(fine, self.scale, 1.0), rows)

    def seen(self) -> Follows | None:
        """The same where what is negative is used, too; None where nothing else follows."""
        return None if self.total is None else replace(self, rectified=False)

    def narrowed(self, keep: Any) -> Follows:
        """For a layer of which only some outputs are left; `keep` picks them from (g, n, o)."""
        total = None if self.total is None else keep(self.total)
        return replace(self, scale=keep(self.scale), shift=keep(self.shift), total=total)


@dataclass
class _Tag:
    """A tensor on the way from a layer through its norm and its sum: of which layer, and how often it is read."""

    trail: Trail
    reads: int = 0


@dataclass
class Trail:
    """What was seen behind a layer.

    Attributes:
        layer: its name.
        norm: the batch norm directly behind it, or "".
        total: the sum, or None. partner: where its other summand is found.
        rectified: whether a ReLU came last.
        tags: of the tensors on the way.
    """

    layer: str
    norm: str = ""
    total: Any = None
    partner: Place | None = None
    rectified: bool = False
    tags: tuple[_Tag, ...] = ()

    @property
    def certain(self) -> tuple[bool, bool]:
        """Whether nothing else reads what comes before the sum, and what comes before the ReLU."""
        inner = self.tags if self.total is None else self.tags[:-1]
        alone = all(tag.reads <= 1 for tag in inner)
        return alone, alone and all(tag.reads <= 1 for tag in self.tags)


class Following(TorchFunctionMode):
    """Watches a network run and notes what follows its layers.

    Attributes:
        trails: by layer, in the order in which they ran.
    """

    def __init__(self, rows: Any) -> None:
        """`rows(layer, tensor)`: of a tensor shaped as the layer's output, at the layer's chosen positions."""
        super().__init__()
        self.rows = rows
        self.trails: dict[str, Trail] = {}
        self.runs: dict[Place, int] = {}
        self.aside = False
        self._tags: Any = WeakTensorKeyDictionary()
        self._places: Any = WeakTensorKeyDictionary()

    @contextmanager
    def looking_away(self) -> Iterator[None]:
        """What hooks of ours read does not count."""
        before, self.aside = self.aside, True
        try:
            yield
        finally:
            self.aside = before

    def enter(self, name: str, tensor: Tensor) -> None:
        """A module is about to read a tensor, which can be found there."""
        place = "in", name
        self.runs[place] = self.runs.get(place, 0) + 1
        if tensor not in self._places:
            self._places[tensor] = place

    def leave(self, name: str, tensor: Tensor) -> None:
        """A module gave a tensor."""
        place = "out", name
        self.runs[place] = self.runs.get(place, 0) + 1
        self._places[tensor] = place

    def layer(self, name: str, output: Tensor) -> None:
        """A layer gave its output."""
        self._put(Trail(name), output)

    def norm(self, name: str, given: Tensor, output: Tensor) -> None:
        """A batch norm made its output of what it was given."""
        tag = self._tags.get(given)
        if tag is not None and not tag.trail.norm and tag.trail.total is None:
            tag.trail.norm = name
            self._put(tag.trail, output)

    def returned(self, output: Any) -> None:
        """What the model gave is read by whoever called it."""
        for t in all_tensors(output):
            if (tag := self._tags.get(t)) is not None:
                tag.reads += 1

    def certain(self, name: str) -> tuple[Trail, bool] | None:
        """The trail of a layer if it leads to a sum or a ReLU, and whether only the rectified part of it is used."""
        trail = self.trails[name]
        alone, last = trail.certain
        rectified = trail.rectified and last
        if not alone or (trail.total is None and not rectified):
            return None
        if trail.partner is not None and self.runs[trail.partner] > 1:
            trail.partner = None  # one name, several tensors
        return trail, rectified

    def _put(self, trail: Trail, tensor: Tensor) -> None:
        tag = _Tag(trail)
        trail.tags += (tag,)
        self.trails[trail.layer] = trail
        self._tags[tensor] = tag

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and note which tensors on the way it reads."""
        before = _version(args)
        result = func(*args, **(kwargs or {}))
        unread = not tensors(result) and getattr(func, "__name__", "") in UNREAD
        same = bool(args) and result is args[0]
        if self.aside or unread or (same and before is not None and _version(args) == before):
            return result  # sizes, and what is handed through as it is, are no use of values
        read = {id(tag): tag for t in tensors((args, kwargs)) if (tag := self._tags.get(t)) is not None}
        for tag in read.values():
            tag.reads += 1
        if func in RECTIFIERS and args and (tag := self._tags.get(args[0])) is not None:
            tag.trail.rectified = True
            if same:
                del self._tags[result]  # in place: who reads it from now on reads what is rectified
        elif func in SUMS and read and not kwargs:
            self._sum(args[0], args[1], result)
        if same:
            self._places.pop(result, None)  # no longer what the module gave
        return result

    def _sum(self, a: Any, b: Any, result: Tensor) -> None:
        """The later layer of the two summands is the one that can make up for the other."""
        if not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape == result.shape):
            return
        order = {name: place for place, name in enumerate(self.trails)}
        known = [(tag.trail, o) for t, o in ((a, b), (b, a)) if (tag := self._tags.get(t)) and tag.trail.total is None]
        if not known or a is b:
            return
        trail, other = max(known, key=lambda pair: order[pair[0].layer])
        trail.partner = self._places.get(other)
        with self.looking_away():
            trail.total = self.rows(trail.layer, result)
        self._put(trail, result)


def _version(args: Any) -> int | None:
    """How often the first argument was changed in place; None where that is not counted."""
    first = args[0] if args else None
    return first._version if isinstance(first, Tensor) and not first.is_inference() else None

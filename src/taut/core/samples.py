"""Where the samples of an input are, and how inputs are cut and joined along them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from taut.core.nested import PLAIN, digest, lists_of, map_lists, map_numbers, rows_of
from taut.core.tensors import describe, map_tensors, placed, tensors
from taut.errors import DataError


@dataclass(frozen=True)
class Samples:
    """Where the samples of an input are.

    Attributes:
        axis: of the tensors whose size there is the leading tensor's: 0, or 1 for a model that takes time first.
        listed: whether the input is, or holds, lists with one item per sample, such as images of several sizes.
        lead: place of the tensor that counts the samples (`taut.core.tensors.placed`); "": the first.
        whole: places of those that hold no samples, such as a mask for all of them.
        rows: places of the lists of plain numbers that hold one for each sample, such as lengths, among all such lists.
    """

    axis: int = 0
    listed: bool = False
    lead: str = ""
    whole: frozenset[str] = frozenset()
    rows: frozenset[int] = frozenset()

    def size(self, inputs: Any) -> int:
        """How many samples inputs hold.

        Raises:
            DataError: they hold no leading tensor, or it is empty or has no such axis.
        """
        if self.listed:
            return len(lists_of(inputs)[0])
        lead = next(iter(self._leading(inputs) if self.lead else tensors(inputs)), None)
        if lead is None or lead.ndim <= self.axis or lead.numel() == 0:
            raise DataError(
                f"Inputs must hold at least one tensor with a batch dimension. Got {describe(inputs)} instead."
            )
        return int(lead.shape[self.axis])

    def part(self, value: Any, part: slice, size: int) -> Any:
        """Some samples of outputs or targets of `size` samples; tensors without such an axis stay whole."""
        if self.listed and any(len(items) == size for items in lists_of(value)):
            return map_lists(lambda items: items[part] if len(items) == size else items, value)
        return _sliced(value, part, size, 0 if self.listed else self.axis)

    def part_of_targets(self, targets: Any, part: slice, size: int) -> Any:
        """The same of targets, which may hold a number for each sample in a list."""
        return self.part(map_numbers(lambda row: row[part] if len(row) == size else row, targets), part, size)

    def cut(self, inputs: Any, part: slice, size: int) -> Any:
        """Some samples of inputs; what holds none in the example, or has no such axis, stays whole."""
        sliced = self.part(self._map_rows(lambda row: row[part], inputs), part, size)
        if not self.whole:
            return sliced
        pairs = zip(placed(inputs), tensors(sliced), strict=True)
        pieces = iter([old if place in self.whole else new for (place, old), new in pairs])
        return map_tensors(lambda _: next(pieces), sliced)

    def axis_of(self, t: Tensor, size: int) -> int | None:
        """The axis of a tensor of inputs on which its `size` samples lie; None where there is none."""
        return None if self.listed else _axis_of(t, size, self.axis)

    def joined(self, batches: Sequence[Any]) -> Any:
        """Inputs with the same `signature` as one."""
        if self.listed:
            merged_lists = iter([list(chain(*column)) for column in zip(*map(lists_of, batches), strict=True)])
            return map_lists(lambda _: next(merged_lists), batches[0])
        size = self.size(batches[0])
        columns = zip(self._marked_whole(batches[0]), zip(*map(tensors, batches), strict=True), strict=True)
        merged = iter([self._column(column, size, whole=whole) for whole, column in columns])
        rows = iter([list(chain(*column)) for column in zip(*map(self._rows, batches), strict=True)])
        return map_tensors(lambda _: next(merged), self._map_rows(lambda _: next(rows), batches[0]))

    def _map_rows(self, function: Callable[[list[Any]], Any], inputs: Any) -> Any:
        """Inputs with `function` applied to the lists of numbers that hold one for each sample."""
        places = count()
        return map_numbers(lambda row: function(row) if next(places) in self.rows else row, inputs)

    def _rows(self, inputs: Any) -> list[list[Any]]:
        return [row for place, row in enumerate(rows_of(inputs)) if place in self.rows]

    def _leading(self, inputs: Any) -> list[Tensor]:
        """The tensor that counts the samples; the first, where some other of these inputs does."""
        return [t for place, t in placed(inputs) if place == self.lead] or tensors(inputs)

    def _marked_whole(self, inputs: Any) -> list[bool]:
        """Of every tensor whether it holds no samples."""
        if not self.whole:
            return [False] * len(tensors(inputs))
        return [place in self.whole for place, _ in placed(inputs)]

    def _column(self, column: Sequence[Tensor], size: int, *, whole: bool) -> Tensor:
        axis = None if whole else _axis_of(column[0], size, self.axis)
        return column[0] if axis is None or len(column) == 1 else torch.cat(list(column), axis)

    def signature(self, inputs: Any) -> tuple[Any, ...]:
        """What inputs must have in common to be joined: all but the samples themselves."""
        if self.listed:
            return ("listed",)
        size = self.size(inputs)
        inputs = self._map_rows(lambda _: None, inputs)
        marked = iter(self._marked_whole(inputs))
        names = tuple(inputs) if isinstance(inputs, Mapping) else ()
        leaves = pytree.tree_leaves(inputs)
        return (
            names,
            *(self._mark(leaf, size, whole=isinstance(leaf, Tensor) and next(marked)) for leaf in leaves),
        )

    def _mark(self, leaf: Any, size: int, *, whole: bool) -> tuple[Any, ...]:
        if not isinstance(leaf, Tensor):
            return (repr(leaf) if isinstance(leaf, PLAIN) else id(leaf),)
        axis = None if whole else _axis_of(leaf, size, self.axis)
        if axis is None:  # the same for all samples of the batch
            return (leaf.dtype, tuple(leaf.shape), digest(leaf))
        return (leaf.dtype, axis, *leaf.shape[:axis], *leaf.shape[axis + 1 :])


def _axis_of(t: Tensor, size: int, axis: int) -> int | None:
    """The axis on which a tensor holds `size` samples: the one of the inputs, or the first; None without one."""
    return next((a for a in dict.fromkeys((axis, 0)) if t.ndim > a and t.shape[a] == size), None)


def _sliced(value: Any, part: slice, size: int, axis: int) -> Any:
    def cut(t: Tensor) -> Tensor:
        where = _axis_of(t, size, axis)
        return t if where is None else t[(slice(None),) * where + (part,)]

    return map_tensors(cut, value)

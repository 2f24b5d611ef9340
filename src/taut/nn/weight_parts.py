"""Parts of a weight that became a layer, as torch names them: all are ranges along its axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from taut.nn.weight_axes import CHOSEN, Axes, NoView, at_front, axis_at, cut, length, remembered

CUTS = frozenset("chunk split split_with_sizes unbind select narrow index_select".split())  # noqa: SIM905
"""torch's names for parts of a weight."""


class Parted:
    """What is cut into parts by `part`, which takes an index as a tensor does."""

    shape: torch.Size
    ndim: int

    def part(self, index: Any) -> Any:
        """A part, by an index."""
        raise NotImplementedError

    def pieces(self, sizes: Sequence[int], dim: int = 0) -> tuple[Any, ...]:
        """Ranges along an axis, one behind the other."""
        ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]
        before = (slice(None),) * (axis_at(dim, self.ndim))
        return tuple(self.part((*before, slice(end - size, end))) for size, end in zip(sizes, ends, strict=True))

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Any, ...]:
        """As torch's."""
        return self.split(-(-self.shape[dim] // chunks), dim)

    def split(self, split_size: Any, dim: int = 0) -> tuple[Any, ...]:
        """As torch's."""
        whole = self.shape[dim]
        if isinstance(split_size, int):
            sizes = [min(split_size, whole - start) for start in range(0, whole, split_size)]
            return self.pieces(sizes, dim)
        if sum(split_size) != whole or min(split_size, default=0) < 0:
            raise RuntimeError(f"split: sizes of {list(split_size)} are not those of an axis of {whole}.")
        return self.pieces(list(split_size), dim)

    split_with_sizes = split

    def unbind(self, dim: int = 0) -> tuple[Any, ...]:
        """As torch's."""
        before = (slice(None),) * (axis_at(dim, self.ndim))
        return tuple(self.part((*before, k)) for k in range(self.shape[dim]))

    def select(self, dim: int, index: int) -> Any:
        """As torch's."""
        return self.part((*(slice(None),) * (axis_at(dim, self.ndim)), index))

    def narrow(self, dim: int, start: int, length: int) -> Any:
        """As torch's.

        Raises:
            RuntimeError: the range is not within the axis.
        """
        whole = self.shape[dim]
        first = start + whole * (start < 0)
        if length < 0 or not 0 <= first <= whole - length:
            raise RuntimeError(f"narrow: {length} from {start} on are not within an axis of {whole}.")
        return self.part((*(slice(None),) * (axis_at(dim, self.ndim)), slice(first, first + length)))


class Ranged(Parted):
    """Of a weight that became a layer (`taut.nn.weight_views`), what an index shows."""

    product: Any
    axes: Axes
    starts: tuple[int, ...]
    values: Tensor | None
    chosen: Tensor | None

    def other(self, name: str, args: Any = (), kwargs: Any = None) -> Any:
        """What needs values."""
        raise NotImplementedError

    def other_view(self, axes: Axes, starts: tuple[int, ...], values: Tensor | None, chosen: Tensor | None) -> Any:
        """Another view of the same weight."""
        raise NotImplementedError

    def index_select(self, dim: int, index: Tensor) -> Any:
        """As torch's: of the first axis the parts that a tensor chooses."""
        chooses = dim % self.ndim == 0 and self.ndim > 2 and index.ndim == 1
        if chooses and self.chosen is None and not any(self.starts):
            return self.part(index)
        return self.other("index_select", (dim, index))

    def part(self, index: Any) -> Any:
        """A range along some axes, or those parts of the first that a tensor of whole numbers chooses."""
        if type(index) is int and (one := remembered(at_front, (self.axes, index))) is not None:
            return self._one_at(index, *one)
        if isinstance(index, Tensor) and not index.is_floating_point() and index.dtype != torch.bool:
            if index.ndim == 0:
                return self.part(int(index))
            if index.ndim == 1 and self.chosen is None and self.ndim > 2 and not any(self.starts):
                return self._choice(index)
        items = list(index) if isinstance(index, tuple) else [index]
        named = sum(item is not None and item is not Ellipsis for item in items)
        if items.count(Ellipsis) > 1 or named > self.ndim:
            return self.other("__getitem__", (index,))
        at = items.index(Ellipsis) if Ellipsis in items else len(items)
        items[at : at + 1] = [slice(None)] * (self.ndim - named)
        axes, starts, dim = self.axes, list(self.starts), 0
        try:
            for item in items:
                axes, dim = self._cut(axes, starts, dim, item)
        except NoView:
            return self.other("__getitem__", (index,))
        if isinstance(items[0], int) and self.ndim > 2:
            self.product.note_stacked()
        values = None if self.values is None else self.values[index]
        return self.other_view(axes, tuple(starts), values, self.chosen)

    def _one_at(self, index: int, axes: Axes, moved: tuple[int, int] | None) -> Any:
        """One index of the first axis; `moved` says by how much along which axis of the weight."""
        starts = self.starts
        if moved is not None:
            starts = tuple([start + moved[1] * (axis == moved[0]) for axis, start in enumerate(starts)])
        if self.ndim > 2:
            self.product.note_stacked()
        return self.other_view(axes, starts, None if self.values is None else self.values[index], self.chosen)

    def _choice(self, index: Tensor) -> Any:
        """Chosen parts of the first axis."""
        if self.axes[0] != ((0, self.shape[0], 1),):
            return self.other("__getitem__", (index,))
        self.product.note_stacked()
        values = None if self.values is None else self.values[index]
        return self.choosing(index, index.shape[0], values)

    def choosing(self, index: Tensor, count: int, values: Tensor | None = None) -> Any:
        """The same with parts of its first axis in that axis's place, by number."""
        return self.other_view((((CHOSEN, count, 0),), *self.axes[1:]), self.starts, values, index)

    def one(self, dim: int, number: int) -> Any:
        """One part of the weight's first axis: the axis `dim`, along which there are several, is gone.

        Args:
            dim: which shows the weight's first axis, or parts of it.
            number: of the part.
        """
        axes = (*self.axes[:dim], *self.axes[dim + 1 :])
        return self.other_view(axes, (number, *self.starts[1:]), None, None)

    def _cut(self, axes: Axes, starts: list[int], dim: int, item: Any) -> tuple[Axes, int]:
        """One item of an index at one axis: the axes, and where the next item is."""
        if item is None:
            return (*axes[:dim], (), *axes[dim:]), dim + 1
        if isinstance(item, slice) and item.step in {None, 1}:
            axes, moved = cut(axes, dim, item.start or 0, length(axes[dim]) if item.stop is None else item.stop)
        elif type(item) is int and -length(axes[dim]) <= item < length(axes[dim]):
            first = item % length(axes[dim])
            axes, moved = cut(axes, dim, first, first + 1)
        else:
            raise NoView
        if moved is not None:
            starts[moved[0]] += moved[1]
        return (axes, dim + 1) if isinstance(item, slice) else ((*axes[:dim], *axes[dim + 1 :]), dim)

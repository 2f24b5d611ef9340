"""Parts of a weight that became a layer, as torch names them: all are ranges along its axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

CUTS = frozenset("chunk split split_with_sizes unbind select narrow".split())  # noqa: SIM905
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
        before = (slice(None),) * (dim % self.ndim)
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
        return self.pieces(list(split_size), dim)

    split_with_sizes = split

    def unbind(self, dim: int = 0) -> tuple[Any, ...]:
        """As torch's."""
        before = (slice(None),) * (dim % self.ndim)
        return tuple(self.part((*before, k)) for k in range(self.shape[dim]))

    def select(self, dim: int, index: int) -> Any:
        """As torch's."""
        return self.part((*(slice(None),) * (dim % self.ndim), index))

    def narrow(self, dim: int, start: int, length: int) -> Any:
        """As torch's."""
        return self.part((*(slice(None),) * (dim % self.ndim), slice(start, start + length)))

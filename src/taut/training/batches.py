"""Training and validation batches: read in order, divided among processes, and what the original says of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from torch import nn

from taut.calls import Example, evaluating, map_tensors, plain, tensors
from taut.errors import DataError

CACHE_BYTES = 1 << 28
"""Outputs of the original that are kept, where the same batches come again in every epoch."""


class Batches:
    """The user's batches as (inputs, targets), with the original's outputs where a teacher is given.

    A list or tuple is the same in every epoch: the original runs on it once.
    """

    def __init__(self, example: Example, data: Any, teacher: nn.Module | None, what: str) -> None:
        """Check that `data` can be read.

        Raises:
            DataError: it is no iterable of batches.
        """
        if not isinstance(data, Iterable) or isinstance(data, str | bytes | torch.Tensor):
            raise DataError(f"The {what} data must be an iterable of batches. Got {type(data).__name__} instead.")
        self.example, self.data, self.teacher, self.what = example, data, teacher, what
        self.fixed = isinstance(data, list | tuple)
        self.once = isinstance(data, Iterator)
        self.used = False
        self.outputs: dict[int, Any] = {}
        self.bytes = 0

    @property
    def length(self) -> int | None:
        """Batches in one pass, where that is known."""
        return len(self.data) if isinstance(self.data, Sized) else None

    def __iter__(self) -> Iterator[Any]:
        """One pass over the raw batches.

        Raises:
            DataError: the data can be read only once, and was.
        """
        if self.once and self.used:
            raise DataError(
                f"The {self.what} data is a {type(self.data).__name__}, which can be read only once: give a list or a "
                "DataLoader."
            )
        self.used = True
        return iter(self.data)

    def read(self, batch: Any) -> tuple[Any, Any]:
        """A raw batch as (inputs, targets).

        Raises:
            DataError: it has another structure.
        """
        return self.example.inputs_of(batch)

    def original(self, place: int, inputs: Any) -> Any:
        """The original's output on batch `place` of a pass."""
        if self.teacher is None:
            return None
        if place in self.outputs:
            return self.outputs[place]
        with torch.no_grad(), evaluating(self.teacher):
            output = self.example.run(self.teacher, inputs)
        size = sum(t.numel() * t.element_size() for t in tensors(output))
        if self.fixed and self.bytes + size <= CACHE_BYTES:
            self.outputs[place] = output
            self.bytes += size
        return output


def share(value: Any, size: int, index: int, count: int) -> Any:
    """Part `index` of `count` of every tensor whose leading dimension is the batch; never empty."""
    start, end = bounds(size, index, count)
    return map_tensors(lambda t: t[start:end] if t.ndim and t.shape[0] == size else t, plain(value))


def bounds(size: int, index: int, count: int) -> tuple[int, int]:
    """First and end of a part; where there are fewer samples than parts, the last sample serves again."""
    start, end = size * index // count, size * (index + 1) // count
    return (start, end) if end > start else (min(start, size - 1), min(start, size - 1) + 1)


def weight(size: int, index: int, count: int) -> float:
    """What makes the mean over parts of their means the mean over the batch; 0 for a sample that serves again."""
    return count * (size * (index + 1) // count - size * index // count) / size

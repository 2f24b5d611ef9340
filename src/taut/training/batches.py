"""Training and validation batches: read in order, divided among processes, and what the original says of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from taut.core.data import holds_samples, is_indexed, raw_batches, samples_together, together
from taut.core.example import Example
from taut.core.modes import evaluating
from taut.core.nested import fresh
from taut.core.samples import Samples
from taut.core.tensors import detached, plain, tensors
from taut.core.user_code import batches_of, named
from taut.errors import DataError

TRAINING = "training"
"""What data are called whose samples come in another order in every epoch."""

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
        readable = isinstance(data, Iterable) or is_indexed(data)
        if not readable or isinstance(data, str | bytes | torch.Tensor):
            raise DataError(f"The {what} data must be an iterable of batches. Got {type(data).__name__} instead.")
        with named(f"the {what} data"):
            single = holds_samples(example, data)
        if single:
            data = _Samples(example, data, shuffled=what == TRAINING)
        self.example, self.data, self.teacher, self.what = example, data, teacher, what
        self.fixed = isinstance(data, list | tuple)
        self.once = isinstance(data, Iterator)
        self.used = False
        self.outputs: dict[int, Any] = {}
        self.bytes = 0

    @property
    def length(self) -> int | None:
        """Batches in one pass, where that is known."""
        try:
            return len(self.data)
        except Exception:  # a generator; or a DataLoader over one, which has a length that it does not know
            return None

    def __iter__(self) -> Iterator[Any]:
        """One pass over the raw batches.

        Raises:
            DataError: the data can be read only once, and was.
        """
        if self.once and self.used:
            raise DataError(self.again)
        self.used = True
        batches = raw_batches(self.example, self.data, shuffled=False)
        return filter(self._holds_samples, batches_of(batches, f"the {self.what} data"))

    def _holds_samples(self, batch: Any) -> bool:
        """Whether a raw batch is more than the empty rest of a loader."""
        if all(t.numel() for t in tensors(plain(batch))):
            return True
        return not self.example.is_empty(self.example.inputs_of(batch)[0])

    @property
    def again(self) -> str:
        """What to say where a second pass is needed and cannot be had."""
        kind = type(self.data).__name__
        return f"The {self.what} data is a {kind}, which can be read only once: give a list or a DataLoader."

    def read(self, batch: Any) -> tuple[Any, Any]:
        """A raw batch as (inputs, targets).

        Raises:
            DataError: it has another structure.
        """
        inputs, targets = self.example.inputs_of(batch)
        return detached(inputs), fresh(detached(targets))  # a loss may write to its targets

    def reseed(self, seed: int, epoch: int) -> None:
        """Loaders with generators of their own draw the same in this epoch, whatever was drawn before."""
        for generator in self.generators():
            generator.manual_seed(seed)
        for owner in self._owners():
            if callable(getattr(owner, "set_epoch", None)):
                owner.set_epoch(epoch)

    def generators(self) -> list[torch.Generator]:
        """The loader's own generators."""
        found = [getattr(owner, "generator", None) for owner in self._owners()]
        return [generator for generator in found if isinstance(generator, torch.Generator)]

    def _owners(self) -> list[Any]:
        batch_sampler = getattr(self.data, "batch_sampler", None)
        owners = (
            self.data,
            getattr(self.data, "sampler", None),
            batch_sampler,
            getattr(batch_sampler, "sampler", None),
        )
        return list({id(owner): owner for owner in owners if owner is not None}.values())

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


class _Samples:
    """Batches made of single samples, in another order every time where they are shuffled.

    Attributes:
        generator: of the order.
    """

    def __init__(self, example: Example, data: Any, *, shuffled: bool) -> None:
        self.example, self.data = example, data
        self.generator = torch.Generator() if shuffled else None

    def __len__(self) -> int:
        """As many as there are where all samples are of one shape."""
        return math.ceil(len(self.data) / samples_together(self.example))

    def __iter__(self) -> Iterator[Any]:
        count = len(self.data)
        order = range(count) if self.generator is None else torch.randperm(count, generator=self.generator).tolist()
        return together(self.example, (self.data[index] for index in order))


def share(samples: Samples, batch: tuple[Any, Any], size: int, index: int, count: int) -> tuple[Any, Any]:
    """Part `index` of `count` of the samples of a batch, as (inputs, targets); never empty."""
    inputs, targets = map(plain, batch)
    if count == 1:
        return inputs, targets
    part = slice(*bounds(size, index, count))
    return samples.cut(inputs, part, size), samples.part_of_targets(targets, part, size)


def bounds(size: int, index: int, count: int) -> tuple[int, int]:
    """First and end of a part; where there are fewer samples than parts, the last sample serves again."""
    start, end = size * index // count, size * (index + 1) // count
    return (start, end) if end > start else (min(start, size - 1), min(start, size - 1) + 1)


def weight(size: int, index: int, count: int) -> float:
    """What makes the mean over parts of their means the mean over the batch; 0 for a sample that serves again."""
    return count * (size * (index + 1) // count - size * index // count) / size

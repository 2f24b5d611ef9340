"""Batches of the user's data: which there are, read once, cut to size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

from taut.core.example import Example
from taut.core.formats import grouped
from taut.core.nested import fresh
from taut.core.tensors import detached, plain, tensors
from taut.core.user_code import batches_of
from taut.errors import DataError


def collect(example: Example, data: Any, limit: int, max_bytes: int = 1 << 28) -> list[tuple[Any, Any]]:
    """The first batches of `data` as (inputs, targets), up to `limit` samples, read once and kept.

    Keeping them is what lets several passes see the SAME samples, also from a shuffled loader or a generator.

    Args:
        example: what a batch must look like.
        data: an iterable of batches, or one batch itself.
        limit: samples at most; the last batch is cut to it, where the model takes a part of a batch.
        max_bytes: stop after the batch with which the kept inputs reach this size; what is in memory already, in a
            list, counts nothing.

    Raises:
        DataError: no batch comes out of `data`, or one has the wrong structure.
    """
    batches: list[tuple[Any, Any]] = []
    seen = used = 0
    number = -1
    in_memory = isinstance(data, list | tuple) or bool(tensors(plain(data)))
    for number, batch in enumerate(batches_of(raw_batches(example, data), "the calibration data")):
        inputs, targets = (detached(part) for part in _read(example, batch, number))
        if example.is_empty(inputs):
            continue
        size = example.samples.size(inputs)
        if size > limit - seen and example.divisible:
            inputs, targets = (
                example.samples.cut(inputs, slice(limit - seen), size),
                example.samples.part_of_targets(targets, slice(limit - seen), size),
            )
        batches.append((inputs, targets) if in_memory else fresh((inputs, targets)))  # a loader may reuse its memory
        seen += min(size, limit - seen)
        used += 0 if in_memory else sum(t.numel() * t.element_size() for t in tensors(inputs))
        if seen >= limit or used >= max_bytes:
            break
    if not batches:
        kind = type(data).__name__
        if number >= 0:
            raise DataError(f"The calibration data ({kind}) hold no sample along the batch dimension of any batch.")
        raise DataError(
            f"The calibration data ({kind}) gave no batch. A generator can be read only once: pass a list or a "
            "DataLoader."
        )
    return batches


def _read(example: Example, batch: Any, number: int) -> tuple[Any, Any]:
    try:
        return example.inputs_of(batch)
    except DataError as error:
        raise DataError(f"{error} It is batch {number} of the data." if number else str(error)) from None


def raw_batches(example: Example, data: Any, *, shuffled: bool = True) -> Iterator[Any]:
    """The batches in data of any form, as they are.

    One batch; an iterable of batches, such as a DataLoader; a Dataset or an iterable of single samples, which are put
    together. A list of which every item is a batch is a list of batches, even where it has two.

    Args:
        example: what a batch must look like.
        data: the user's.
        shuffled: whether the samples of a Dataset come in a random order, the same each time: many are sorted.

    Raises:
        DataError: it is nothing of these.
    """
    if _is_one(example, data):
        return iter([data])
    if is_indexed(data):
        return _indexed(example, data, shuffled=shuffled)
    if not isinstance(data, Iterable) or isinstance(data, str | bytes):
        raise DataError(f"Calibration data must be an iterable of batches. Got {type(data).__name__} instead.")
    if isinstance(data, Mapping) and not tensors(plain(data)):
        raise DataError(f"The data are a {type(data).__name__} of {', '.join(map(str, data))}: give one of them.")
    return _iterated(example, data)


def _is_one(example: Example, data: Any) -> bool:
    """Whether data are one batch themselves.

    Raises:
        DataError: they look like one, and are not.
    """
    if isinstance(data, list | tuple):
        converted = plain(data)
        if not tensors(converted) or all(map(example.is_batch, converted)):
            return False
        if len(data) > 2 and all(map(example.is_batch, converted[:2])):
            return False
        if len(data) > 1 and example.is_batch(converted[0]) and _is_nothing(data):
            kind = "None" if data[1] is None else type(data[1]).__name__
            raise DataError(
                f"The data hold a batch and behind it {kind}, which is neither a batch nor targets: give a list of "
                "batches, such as [x], or (inputs, targets)."
            )
        return example.is_batch(converted) and not example.is_sample(converted[0])
    if tensors(plain(data)):
        example.inputs_of(data)
        return True
    return False


def _is_nothing(pair: Any) -> bool:
    """Whether what stands behind a batch says nothing that targets could; (inputs, None) says that there are none."""
    item = pair[1]
    if item is None:
        return type(pair) is list
    return isinstance(item, str | bytes) or (isinstance(item, list | tuple | Mapping) and not item)


def is_indexed(data: Any) -> bool:
    """Whether data are read by index, such as a Dataset or a list."""
    if isinstance(data, list | tuple):
        return True
    if isinstance(data, Mapping | str | bytes | IterableDataset) or not hasattr(data, "__getitem__"):
        return False
    if not hasattr(data, "__len__") or isinstance(data, Dataset) or not hasattr(data, "__iter__"):
        return hasattr(data, "__len__")
    try:
        data[0]
    except Exception:  # it is read in another way
        return False
    return True


def holds_samples(example: Example, data: Any) -> bool:
    """Whether data that are read by index hold single samples, to be put together."""
    return is_indexed(data) and len(data) > 0 and not _is_one(example, data) and example.is_sample(data[0])


def _indexed(example: Example, data: Any, *, shuffled: bool) -> Iterator[Any]:
    count = len(data)
    if not count or not example.is_sample(data[0]):
        yield from (data[index] for index in range(count))
        return
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist() if shuffled else range(count)
    yield from together(example, (data[index] for index in order))


def _iterated(example: Example, data: Iterable[Any]) -> Iterator[Any]:
    """What is iterated over: batches, or single samples, as the first is."""
    items = iter(data)
    first = next(items, items)
    if first is items:
        return
    whole = chain([first], items)
    yield from together(example, whole) if example.is_sample(first) else whole


BATCH = 32
"""Samples that are put together, where data come one by one."""


def samples_together(example: Example) -> int:
    """How many single samples make a batch."""
    return max(BATCH, example.batch) if example.divisible else example.batch


def together(example: Example, samples: Iterable[Any]) -> Iterator[Any]:
    """Batches of single samples; where the model takes no parts of batches, of one size, as far as there are any."""
    size = samples_together(example)
    batches = grouped(samples, size, example.batched)
    return batches if example.divisible else _of_one_size(example, batches, size)


def _of_one_size(example: Example, batches: Iterable[Any], size: int) -> Iterator[Any]:
    """The full batches; where there is none, all."""
    others: list[Any] = []
    full = False
    for batch in batches:
        if example.samples.size(example.inputs_of(batch)[0]) == size:
            full = True
            yield batch
        else:
            others.append(batch)
    yield from () if full else others


def chunks(example: Example, batches: Iterable[tuple[Any, Any]], size: int) -> Iterator[tuple[Any, Any]]:
    """The same samples in batches of at most `size`; as they come where the model takes no part of a batch."""
    for inputs, targets in batches:
        whole = example.samples.size(inputs)
        if size >= whole or not example.divisible:
            yield inputs, targets
            continue
        for start in range(0, whole, size):
            part = slice(start, start + size)
            yield example.samples.cut(inputs, part, whole), example.samples.part_of_targets(targets, part, whole)

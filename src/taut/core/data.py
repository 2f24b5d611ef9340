"""Batches of the user's data: which there are, read once, cut to size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from taut.core.example import Example
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
    in_memory = isinstance(data, list | tuple) or bool(tensors(plain(data)))
    for batch in batches_of(_batches(example, data), "the calibration data"):
        inputs, targets = (detached(part) for part in example.inputs_of(batch))
        size = example.samples.size(inputs)
        if size > limit - seen and example.divisible:
            inputs, targets = (
                example.samples.cut(inputs, slice(limit - seen), size),
                example.samples.part(targets, slice(limit - seen), size),
            )
        batches.append((inputs, targets) if in_memory else fresh((inputs, targets)))  # a loader may reuse its memory
        seen += min(size, limit - seen)
        used += 0 if in_memory else sum(t.numel() * t.element_size() for t in tensors(inputs))
        if seen >= limit or used >= max_bytes:
            break
    if not batches:
        raise DataError(
            f"The calibration data ({type(data).__name__}) gave no batch. A generator can be read only once: "
            "pass a list or a DataLoader."
        )
    return batches


def _batches(example: Example, data: Any) -> Iterator[Any]:
    """The batches in `data`; a list of which every item is a batch is a list of batches, even where it has two."""
    alone = bool(tensors(plain(data))) and not (
        isinstance(data, list | tuple) and all(_is_batch(example, item) for item in data)
    )
    if alone:
        example.inputs_of(data)
        return iter([data])
    if not isinstance(data, Iterable):
        raise DataError(f"Calibration data must be an iterable of batches. Got {type(data).__name__} instead.")
    return iter(data)


def _is_batch(example: Example, value: Any) -> bool:
    try:
        example.inputs_of(value)
    except DataError:
        return False
    return True


def chunks(example: Example, batches: Iterable[tuple[Any, Any]], size: int) -> Iterator[tuple[Any, Any]]:
    """The same samples in batches of at most `size`; as they come where the model takes no part of a batch."""
    for inputs, targets in batches:
        whole = example.samples.size(inputs)
        if size >= whole or not example.divisible:
            yield inputs, targets
            continue
        for start in range(0, whole, size):
            part = slice(start, start + size)
            yield example.samples.cut(inputs, part, whole), example.samples.part(targets, part, whole)

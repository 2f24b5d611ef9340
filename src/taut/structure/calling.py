"""Where the samples of an example are, and whether a model takes them apart: found by running it, not by its code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from taut.calls import Example, Samples, all_tensors, evaluating, quietly, tensors
from taut.errors import ModelError
from taut.nested import fresh
from taut.structure.surgery import shallow, unwrapped

ROUNDING = 1e-3
"""Difference, as a share of the largest output, that another batch size may make by other kernels and precisions."""


@quietly
def read_example(model: nn.Module, value: Any) -> Example:
    """How `model` is called with `value`, and where its samples are.

    A list of tensors is one sample each, if twice the list gives twice the outputs (detection networks); a model with
    layers that take time first has its samples on axis 1, if the steps on axis 0 depend on each other and the rows on
    axis 1 do not. Whether a part of a batch gives a part of the outputs is noted as `Example.divisible`.

    Args:
        model: is run a few times on a copy, in eval mode.
        value: an input, or an Example, which is returned as it is.

    Raises:
        DataError: the input holds no tensor, or an empty one.
        ModelError: the model cannot be run on it.
    """
    if isinstance(value, Example):
        return value
    model = unwrapped(model)
    example = Example(model, value)
    copied = shallow(model)
    with evaluating(copied):
        outputs = example.run(copied)
        example.samples = _samples(copied, example, outputs)
        example.batch = example.samples.size(example.value)
        example.divisible = _divisible(copied, example, outputs)
    return example


def _samples(model: nn.Module, example: Example, outputs: Any) -> Samples:
    value = example.value
    if isinstance(value, list) and len(tensors(value)) >= len(value) > 0:
        listed = Samples(listed=True)
        doubled = _ran(model, example, value + value)
        return listed if doubled is not None and _repeats(outputs, doubled, len(value)) else example.samples
    if _takes_time_first(model) and tensors(value)[0].ndim > 1:
        sides = [_independent(model, example, outputs, axis) for axis in (0, 1)]
        if sides[0] is False and sides[1] is not False:
            return Samples(axis=1)
    return example.samples


def _takes_time_first(model: nn.Module) -> bool:
    """Whether the model has layers that read (time, sample, features)."""
    return any(getattr(module, "batch_first", None) is False for module in model.modules())


def _ran(model: nn.Module, example: Example, inputs: Any) -> Any:
    """The outputs, or None where the model does not run on these inputs."""
    try:
        return example.run(model, inputs)
    except ModelError:
        return None


def _repeats(once: Any, twice: Any, count: int) -> bool:
    """Whether outputs of a doubled list are those of the list, twice: as a list, or along the first axis."""
    if isinstance(once, list | tuple) and isinstance(twice, list | tuple) and len(twice) == 2 * len(once) == 2 * count:
        return all(close(once, half) for half in (list(twice[:count]), list(twice[count:])))
    parts = all_tensors(once), all_tensors(twice)
    if not parts[0] or len(parts[0]) != len(parts[1]):
        return False
    return all(
        a.ndim and a.shape[0] == count and b.shape[0] == 2 * count and close([a, a], [b[:count], b[count:]])
        for a, b in zip(*parts, strict=True)
    )


def _independent(model: nn.Module, example: Example, outputs: Any, axis: int) -> bool | None:
    """Whether neither end of an axis has a say in the outputs elsewhere on it; None where it has one index alone.

    One end takes the values of the other: every output must stay the same but there, on some axis as long.
    """
    size = tensors(example.value)[0].shape[axis]
    if size < 2:
        return None
    return all(_unmoved(model, example, outputs, axis, ends) for ends in ((0, size - 1), (size - 1, 0)))


def _unmoved(model: nn.Module, example: Example, outputs: Any, axis: int, ends: tuple[int, int]) -> bool:
    changed, size = fresh(example.value), max(ends) + 1
    for t in tensors(changed):
        if t.ndim > axis and t.shape[axis] == size:
            t.select(axis, ends[0]).copy_(t.select(axis, ends[1]).clone())
    moved = _ran(model, example, changed)
    pairs = all_tensors(outputs), all_tensors(moved)
    if moved is None or len(pairs[0]) != len(pairs[1]):
        return False
    start = int(ends[0] == 0)
    return all(_same_but(a, b, start, size) for a, b in zip(*pairs, strict=True))


def _same_but(a: Tensor, b: Tensor, start: int, size: int) -> bool:
    """Whether two outputs agree on all but one end of an axis of this size."""
    if a.shape != b.shape:
        return False
    axes = [axis for axis, length in enumerate(a.shape) if length == size]
    kept = [tuple(t.narrow(axis, start, size - 1) for t in (a, b)) for axis in axes] or [(a, b)]
    return any(close([one], [two]) for one, two in kept)


def _divisible(model: nn.Module, example: Example, outputs: Any) -> bool:
    """Whether the first samples alone give the first outputs; of a single sample, whether two give its output twice."""
    samples, size = example.samples, example.batch
    if size > 1:
        part = slice(size // 2)
        mine = _ran(model, example, samples.part(example.value, part, size))
        return mine is not None and close(samples.part(outputs, part, size), mine)
    double = _ran(model, example, samples.joined([example.value, example.value]))
    return double is not None and all(close(outputs, half) for half in _halves(samples, double))


def _halves(samples: Samples, double: Any) -> Iterator[Any]:
    for part in (slice(1), slice(1, 2)):
        yield samples.part(double, part, 2)


def close(a: Any, b: Any) -> bool:
    """Whether two outputs agree in number, shapes and dtypes of their tensors, and up to rounding in values."""
    pairs = all_tensors(a), all_tensors(b)
    if len(pairs[0]) != len(pairs[1]):
        return False
    return all(_close(one, two) for one, two in zip(*pairs, strict=True))


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point() and not a.is_complex():
        return bool(torch.equal(a, b))
    finite = torch.isfinite(a)
    if not torch.equal(finite, torch.isfinite(b)):
        return False
    gap = torch.where(finite, a - b, 0).abs().double()
    scale = torch.where(finite, a, 0).abs().double()
    return not a.numel() or float(gap.max()) <= ROUNDING * float(scale.max()) + 1e-7

"""Inputs that between them take every path through a model's code that the calibration data take.

A path is the set of steps from one operation to the next, module by module, so that a longer loop is no new one. It
depends on shapes alone unless code reads values; only then every batch is run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from taut.calls import Example, chunks, evaluating, tensors
from taut.errors import ModelError
from taut.randomness import own_states, seed_globals
from taut.structure.surgery import shallow

UNREAD = frozenset(
    (
        *("__get__", "__len__", "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset"),
        *("element_size", "is_contiguous", "is_floating_point", "is_complex", "is_signed", "get_device", "type"),
    )
)
"""Functions that give no tensor and read no values."""

SIZED_BY_VALUES = frozenset(("nonzero", "argwhere", "unique", "unique_consecutive", "masked_select"))
"""Functions of which the size of the result depends on values."""

FEW = 2
"""Samples to which an input is cut where these take the same path."""

SHAPES = 8
"""Inputs that are kept for their shapes alone, at most; those on new paths are kept in any number."""

PASSING = 64
"""Samples that pass through the model at once, where it takes a part of a batch."""

Step = tuple[str, str, str]


@dataclass
class _Path(TorchFunctionMode):
    """What a run did.

    Attributes:
        steps: module, operation, next operation.
        reads: whether code looked at values.
    """

    steps: set[Step] = field(default_factory=set)
    reads: bool = False

    def __post_init__(self) -> None:
        super().__init__()
        self.inside: list[str] = [""]
        self.last = ""

    def add(self, step: str) -> None:
        """The run goes on to an operation, or into a module."""
        self.steps.add((self.inside[-1], self.last, step))
        self.last = step

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", repr(func))
        self.add(name)
        if name not in UNREAD:
            masked = name == "__getitem__" and any(t.dtype == torch.bool for t in tensors(args[1:]))
            self.reads |= masked or name in SIZED_BY_VALUES or not tensors(result)
        return result


@contextmanager
def seeded() -> Iterator[None]:
    """Runs of random models draw the same numbers; the states are put back."""
    with own_states():
        seed_globals(0)
        yield


def _path(model: nn.Module, example: Example, inputs: Any) -> _Path:
    """Raises ModelError where the model cannot be run."""
    copied, path = shallow(model), _Path()

    def enter(name: str) -> Any:
        def hook(*_: Any) -> None:
            path.add(f">{name}")
            path.inside.append(name)

        return hook

    def leave(*_: Any) -> None:
        path.inside.pop()

    for name, module in copied.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            module.register_forward_pre_hook(enter(name), prepend=True)
            module.register_forward_hook(leave)
    with evaluating(copied), seeded(), path:
        example.run(copied, inputs)
    return path


def covering(model: nn.Module, example: Example, batches: Iterable[tuple[Any, Any]] = ()) -> tuple[Any, ...]:
    """The example, one batch of every shape and one for every other path that the data take, each as small as possible.

    Args:
        model: is run on a copy.
        example: how it is called.
        batches: (inputs, targets).

    Raises:
        ModelError: the model cannot be run on a batch.
    """
    path = _path(model, example, example.value)
    kept = [_cut(model, example, example.value, path.steps)]
    steps, reads = set(path.steps), path.reads
    marks = {_mark(example, example.value)}
    for inputs, _ in chunks(example, batches, max(PASSING, example.batch)):
        mark = _mark(example, inputs)
        if not reads and mark in marks:
            continue
        path = _path(model, example, inputs)
        new = path.steps - steps
        if new or (mark not in marks and len(marks) <= SHAPES):
            kept.append(_cut(model, example, inputs, new))
        steps, reads = steps | path.steps, reads or path.reads
        marks.add(mark)
    return tuple(kept)


def _mark(example: Example, inputs: Any) -> Any:
    shapes = tuple(tuple(t.shape) for t in tensors(inputs)) if example.samples.listed else ()
    return example.samples.signature(inputs), example.samples.size(inputs), shapes


def _cut(model: nn.Module, example: Example, inputs: Any, steps: set[Step]) -> Any:
    """The first samples alone, where they take these steps, too."""
    size = example.samples.size(inputs)
    if size <= FEW or not example.divisible:
        return inputs
    part = example.samples.part(inputs, slice(FEW), size)
    try:
        return part if steps <= _path(model, example, part).steps else inputs
    except ModelError:
        return inputs


def finite(outputs: Iterable[Tensor]) -> bool:
    """Whether all values of all tensors are."""
    return all(bool(torch.isfinite(t).all()) for t in outputs if t.is_floating_point() or t.is_complex())

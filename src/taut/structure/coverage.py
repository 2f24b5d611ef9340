"""Inputs that between them take every path through a model's code that the calibration data take.

A path is the set of steps from one operation to the next, module by module, so that a longer loop is no new one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from taut.core.data import chunks
from taut.core.example import Example
from taut.core.modes import evaluating, generator
from taut.core.nested import digest
from taut.core.randomness import own_states, seed_globals
from taut.core.tensors import map_tensors, tensors
from taut.errors import ModelError
from taut.structure.surgery import shallow

FEW = 2
"""Samples to which an input is cut where these take the same path."""

SHAPES = 8
"""Shapes of which an input is kept at most, for every data set; those on new paths are kept in any number."""

PASSING = 512
"""Samples that pass through the model at once, where it takes a part of a batch: loaders seldom give more."""

Step = tuple[str, str, str]


class _Path(TorchFunctionMode):
    """What a run did.

    Attributes:
        steps: module, operation, next operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: set[Step] = set()
        self.inside: list[str] = [""]
        self.last = ""

    def add(self, step: str) -> None:
        """The run goes on to an operation, or into a module."""
        self.steps.add((self.inside[-1], self.last, step))
        self.last = step

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and note it."""
        result = func(*args, **(kwargs or {}))
        self.add(getattr(func, "__name__", repr(func)))
        return result


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Runs of random models draw the same numbers; the states are put back."""
    with own_states():
        seed_globals(seed)
        yield


def _path(model: nn.Module, example: Example, inputs: Any) -> tuple[set[Step], Any]:
    """The steps, and the outputs; raises ModelError where the model cannot be run."""
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
        output = example.run(copied, inputs)
    return path.steps, output


def covering(
    model: nn.Module,
    example: Example,
    batches: Iterable[tuple[Any, Any]] = (),
    on_batch: Callable[[Any, Any], None] | None = None,
) -> None:
    """Note as `Example.witnesses` inputs that take every path that the example and the data take.

    The example, noise like it, the first batch, batches of other shapes (up to SHAPES, from the smallest to the
    largest), and every batch that takes a step which none before it took; each as small as it may be. Every batch is
    run once, whatever verb it is given to.

    Args:
        model: is run on a copy.
        example: how it is called.
        batches: (inputs, targets).
        on_batch: is given the inputs and the outputs of each batch that is run.

    Raises:
        ModelError: the model cannot be run on a batch.
    """
    if not example.steps:
        _note(model, example, example.value, keep=True)
        with suppress(ModelError):  # a model need not run on noise
            _note(model, example, noise_like(example), keep=True)
    parts = list(chunks(example, batches, max(PASSING, example.batch)))
    shapes = _spread({mark: inputs for inputs, _ in parts if (mark := _mark(example, inputs)) not in example.marks})
    for inputs, _ in parts:
        identity = tuple((digest(t), tuple(t.shape)) for t in tensors(inputs))
        if identity not in example.covered:
            first, mark = not example.covered, _mark(example, inputs)
            keep = first or (mark in shapes and mark not in example.marks)
            _note(model, example, inputs, keep=keep, on_batch=on_batch)
            example.covered.add(identity)


def _spread(inputs: Mapping[Any, Any]) -> set[Any]:
    """Some of the shapes, from the smallest to the largest."""
    ordered = sorted(inputs, key=lambda mark: sum(t.numel() for t in tensors(inputs[mark])))
    picks = {round(place * (len(ordered) - 1) / (SHAPES - 1)) for place in range(SHAPES)} if ordered else set()
    return {ordered[pick] for pick in picks}


def _note(
    model: nn.Module, example: Example, inputs: Any, *, keep: bool, on_batch: Callable[[Any, Any], None] | None = None
) -> None:
    (steps, output), mark = _path(model, example, inputs), _mark(example, inputs)
    if on_batch is not None:
        on_batch(inputs, output)
    new = steps - example.steps
    if keep or new:
        witness = _cut(model, example, inputs, steps if keep else new)
        example.witnesses = (*example.witnesses, witness)
        if new or mark not in example.marks:
            example.paths = (*example.paths, witness)
    example.steps |= steps
    example.marks.add(mark)


def noise_like(example: Example) -> Any:
    """Random numbers of the mean and deviation of the example's; whole numbers as they are.

    What is not finite, or as good as infinite, is a mark (of a mask, of a missing value) and stays.
    """
    random = generator(3)

    def like(t: Tensor) -> Tensor:
        if not t.is_floating_point() or not t.numel():
            return t
        if t.layout != torch.strided:
            return t
        wide = t.double()
        marks = ~(wide.abs() < torch.finfo(t.dtype).max / 2)
        values = wide[~marks]
        spread = float(values.std()) if values.numel() > 1 else 0.0
        mean = float(values.mean()) if values.numel() else 0.0
        noise = torch.randn(t.shape, generator=random) * (spread or 1.0) + mean
        return torch.where(marks, wide, noise.to(wide)).to(t.dtype)

    return map_tensors(like, example.value)


def _mark(example: Example, inputs: Any) -> Any:
    shapes = tuple(tuple(t.shape) for t in tensors(inputs)) if example.samples.listed else ()
    return example.samples.signature(inputs), example.samples.size(inputs), shapes


def _cut(model: nn.Module, example: Example, inputs: Any, steps: set[Step]) -> Any:
    """The first samples alone, where they take these steps, too."""
    size = example.samples.size(inputs)
    if size <= FEW or not example.divisible:
        return inputs
    part = example.samples.cut(inputs, slice(FEW), size)
    try:
        return part if steps <= _path(model, example, part)[0] else inputs
    except ModelError:
        return inputs

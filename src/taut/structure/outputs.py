"""What a model returns, but for its values: containers, shapes, dtypes, and whether it is finite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from taut.core.example import Example
from taut.core.modes import evaluating
from taut.core.nested import attributes_of
from taut.core.tensors import all_values, is_cache
from taut.errors import ModelError
from taut.structure.coverage import seeded
from taut.structure.surgery import clone, shallow

DEPTH = 6
"""How deep attributes of objects are looked into."""

DISTURBED = 0.05
"""Relative change of every weight, to learn which shapes depend on values."""


@dataclass(frozen=True)
class Form:
    """What an output is but for its values.

    Attributes:
        kind: class of a container or object; dtype of a tensor.
        shape: of a tensor; None for all else.
        parts: what is inside, by key or position.
    """

    kind: str
    shape: tuple[int, ...] | None = None
    parts: tuple[tuple[str, Form], ...] = ()

    def __str__(self) -> str:
        """As messages show it: `list of 3`, `float32[2, 5]`."""
        if self.shape is not None:
            return f"{self.kind}{list(self.shape)}"
        if not self.parts:
            return self.kind
        return f"a {self.kind} of {len(self.parts)}: {', '.join(str(part) for _, part in self.parts[:SHOWN])}" + (
            ", ..." if len(self.parts) > SHOWN else ""
        )

    @property
    def loose(self) -> Form:
        """Without lengths, for where these depend on values."""
        if self.shape is not None:
            return Form(self.kind, (len(self.shape),))
        inner = {repr(part.loose): part.loose for _, part in self.parts}
        return Form(self.kind, None, tuple(("", inner[key]) for key in sorted(inner)))


SHOWN = 3
"""Parts of a container that a message shows."""


def form_of(output: Any, depth: int = DEPTH) -> Form:
    """Containers and their keys, kinds of objects, and of every tensor dtype and shape; of a cache its kind alone."""
    if isinstance(output, Tensor):
        return Form(str(output.dtype).removeprefix("torch."), tuple(output.shape))
    kind = type(output).__name__
    if is_cache(output):  # as long and wide as what the model puts into it, and read by the model alone
        return Form(kind)
    if isinstance(output, np.ndarray):
        return Form(f"array of {output.dtype}", tuple(output.shape))
    return Form(kind, None, tuple((key, form_of(item, less)) for key, item, less in _parts(output, depth)))


def _parts(output: Any, depth: int) -> Iterator[tuple[str, Any, int]]:
    """What is inside of a container or object, under its key or position, and how deep it may be looked into."""
    if isinstance(output, Mapping):
        yield from ((str(key), item, depth) for key, item in output.items())
    elif isinstance(output, list | tuple):
        yield from ((str(number), item, depth) for number, item in enumerate(output))
    elif depth and not callable(output) and not isinstance(output, nn.Module | type):
        held = ((key, value, depth - 1) for key, value in attributes_of(output).items())
        yield from (part for part in held if all_values(part[1]))


class Outputs:
    """The outputs of a model on the inputs that cover its paths, against which what is made of it is held."""

    def __init__(self, model: nn.Module, example: Example) -> None:
        """Run the model.

        Raises:
            ModelError: it cannot be run, or gives nothing but NaN and infinities.
        """
        self.model, self.example = model, example
        self.inputs = example.witnesses or (example.value,)
        outputs = self.run(model)
        for number, t in enumerate(all_values(outputs[0])):
            if t.is_floating_point() and t.numel() and not bool(torch.isfinite(t).any()):
                which = f" (tensor {number} of it)" if number else ""
                raise ModelError(
                    f"The model's output{which} on the example is not finite: check its weights and the example."
                )
        self._forms = [form_of(output) for output in outputs]
        self._finite = [[torch.isfinite(t) for t in all_values(output)] for output in outputs]
        self._sized_by_values: bool | None = None

    def run(self, model: nn.Module, most: int | None = None, *, fused: bool = True) -> list[Any]:
        """A model's outputs on the first `most` inputs; code that writes to buffers in forward writes to a copy's.

        Fused, as its user runs it; or what it is made of one after the other.
        """
        copied, outputs = shallow(model), []
        for inputs in self.inputs[:most]:
            with evaluating(copied), seeded():
                outputs.append(self.example.run(copied, inputs, fused=fused))
        return outputs

    def differ(self, outputs: Sequence[Any]) -> str | None:
        """How outputs on the first inputs are of another form, or not finite where the model's are; None if neither."""
        for wanted, masks, inputs, output in zip(self._forms, self._finite, self.inputs, outputs, strict=False):
            form = form_of(output)
            if form != wanted and not (form.loose == wanted.loose and self._changes_size()):
                return f"the output would be {form} instead of {wanted}{self._which(inputs)}"
            held = all_values(output)
            same = [t.shape for t in held] == [mask.shape for mask in masks]
            if same and any(bool((mask & ~torch.isfinite(t)).any()) for mask, t in zip(masks, held, strict=True)):
                return f"the output would not be finite{self._which(inputs)}"
            if not same and any(bool(torch.isnan(t).any()) for t in held if t.is_floating_point()):
                return f"the output would not be finite{self._which(inputs)}"
        return None

    def differ_in_training(self, model: nn.Module) -> str | None:
        """How a model's output on the example departs in form from the original's while both train; None if not."""
        wanted = self._form_in_training
        if wanted is None:
            return None
        try:
            form = form_of(self._trained(model))
        except ModelError as error:
            return str(error)
        return None if form.loose == wanted.loose else f"the output would be {form} instead of {wanted}"

    @cached_property
    def _form_in_training(self) -> Form | None:
        """Of the original's output on the example; None where it cannot be trained on it."""
        try:
            return form_of(self._trained(self.model))
        except ModelError:
            return None

    def _trained(self, model: nn.Module) -> Any:
        copied = shallow(model).train()
        with seeded(), torch.no_grad():
            return self.example.run(copied, self.inputs[0])

    def _which(self, inputs: Any) -> str:
        return "" if inputs is self.inputs[0] else " on another input than the example"

    def _changes_size(self) -> bool:
        """Whether slightly other weights of the model itself change the form of its outputs."""
        if self._sized_by_values is None:
            disturbed, noise = clone(self.model), torch.Generator().manual_seed(0)
            for parameter in disturbed.parameters():
                if parameter.is_floating_point():
                    factor = 1 + DISTURBED * torch.randn(parameter.shape, generator=noise)
                    parameter.data = parameter.data * factor.to(parameter)
            self._sized_by_values = [form_of(output) for output in self.run(disturbed)] != self._forms
        return self._sized_by_values

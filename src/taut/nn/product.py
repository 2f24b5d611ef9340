"""A layer where a network's code multiplies by a weight: `x @ self.w`, `F.linear(x, self.qkv.weight)`, einsum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taut.nn.grouped import of_all
from taut.nn.product_forms import Contraction
from taut.nn.product_parts import at_once, by_parts, stack_of
from taut.nn.product_uses import use_of
from taut.nn.weight_axes import axes_of
from taut.nn.weight_values import dense
from taut.nn.weight_views import Multiplied, View, asked


class Product(Multiplied, nn.Module):
    """Layers in the place of a weight: the product of a tensor and the weight is what these layers give for the tensor.

    The weight is a matrix W (outputs, inputs): its axes in `summed` are the inputs, in their order, the others the
    outputs. Where its rows are used in parts, every part is a layer of its own. All else that code does with the weight
    gets values that are computed from the layers; what would write into them is an error.

    Args:
        sizes: the shape of the weight.
        summed: those of its axes that products sum over.
        layers: one for each part of the rows, from first to last; without a bias.
        stacked: whether the first axis counts matrices that are multiplied by all at once, as of experts in a batch:
            there is one layer then, with a group for each (`taut.nn.GroupedLinear`).
    """

    def __init__(
        self, sizes: Sequence[int], summed: Sequence[int], layers: Sequence[nn.Module], *, stacked: bool = False
    ) -> None:
        """See the class."""
        super().__init__()
        self.sizes, self.summed, self.stacked = tuple(sizes), tuple(summed), stacked
        for number, layer in enumerate(layers):
            self.add_module(str(number), layer)

    def seen(self) -> View:
        """The weight as it is."""
        view = View(self, axes_of(self.present_sizes()), (0,) * len(self.sizes))
        if len(self.sizes) == 2 and len(self.summed) == 1:
            view.inputs = self.summed[0]
        return view

    def like(self) -> Tensor:
        """A tensor of the weight's kind, on its device."""
        return next(t for t in self.parameters() if t.is_floating_point())

    def dense(self, number: int | None = None) -> Tensor | None:
        """The weight's values, computed from the layers; None where these have only a part of them.

        Args:
            number: of a stack that is one layer the matrix that is wanted, as a stack of one; None: all are.
        """
        count = self.sizes[0] if self.stacked else 1
        return dense(self._modules.values(), self.present_sizes(), self.summed, count, number)

    def note(self, name: str) -> None:
        """Nothing: uses are noted before there is a layer."""

    def note_stacked(self, *, whole: bool = False) -> None:
        """Nothing, likewise."""

    def present_sizes(self) -> tuple[int, ...]:
        """The shape of the weight; of an axis alone on its side as many as the layers have by now."""
        if self.stacked:
            return self.sizes  # of these no channels go
        layers = list(self._modules.values())
        outputs = [axis for axis in range(len(self.sizes)) if axis not in self.summed]
        sizes = list(self.sizes)
        if len(outputs) == 1:
            sizes[outputs[0]] = sum(self._rows())
        if len(self.summed) == 1:
            sizes[self.summed[0]] = _width(layers[0], "in_features", sizes[self.summed[0]])
        return tuple(sizes)

    def _rows(self) -> list[int]:
        """How many outputs each layer has."""
        layers = list(self._modules.values())
        whole = 1
        for axis, size in enumerate(self.sizes):
            whole *= 1 if axis in self.summed else size
        return [_width(layer, "out_features", whole // len(layers)) for layer in layers]

    def forward(self, x: Tensor) -> Tensor:
        """The product of the last axis of x and all of the weight."""
        layers: list[Any] = list(self._modules.values())
        if self.stacked:
            return of_all(layers[0], x.expand(self.sizes[0], *x.shape)).movedim(0, -2).flatten(-2)
        parts = [layer(x) for layer in layers]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def multiplied(self, form: Contraction) -> Tensor | None:
        """The product by the layers; None where it is not one of the weight as the layers have it."""
        layers: list[Any] = list(self._modules.values())
        stack = stack_of(form)
        if self.stacked:
            return None if stack is None else at_once(form, stack, self.summed, layers[0])
        if stack is not None:
            return by_parts(form, stack, self.multiplied)
        sizes = self.present_sizes()
        use = use_of(form, sizes)
        if use is None or use.summed != tuple(axis for axis in self.summed if sizes[axis] != 1):
            return None
        output = self._rows_of(use.given(form.x), use.rows)
        return None if output is None else use.handed(output)

    def _rows_of(self, x: Tensor, rows: tuple[int, int]) -> Tensor | None:
        """The outputs first <= o < last; None where a layer has only some of them."""
        ends = [0]
        for size in self._rows():
            ends.append(ends[-1] + size)
        if rows[0] not in ends or rows[1] not in ends:
            return None
        layers = list(self._modules.values())[ends.index(rows[0]) : ends.index(rows[1])]
        parts = [layer(x) for layer in layers]  # type: ignore[misc] # None is no child
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def __getattr__(self, name: str) -> Any:
        """A layer by its name, or what a tensor would answer."""
        modules = self.__dict__.get("_modules", {})
        if name in modules:
            return modules[name]
        if name.startswith("_") or name.isdigit() or "summed" not in self.__dict__:
            return nn.Module.__getattr__(self, name)
        return asked(self, name)

    def extra_repr(self) -> str:
        """The weight's shape, and what is summed over."""
        return f"{tuple(self.sizes)}, summed={self.summed}"


def _width(layer: Any, key: str, otherwise: int) -> int:
    """The inputs or outputs of a layer, or of the first or last of those in a row."""
    if key in layer.__dict__:
        width: int = layer.__dict__[key]
        return width
    widths = [m.__dict__[key] for m in layer.modules() if key in m.__dict__]
    return otherwise if not widths else widths[0 if key == "in_features" else -1]

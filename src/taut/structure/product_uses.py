"""What a network's code does with weights, noted while it runs; and layers that do the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from taut.core.example import Example
from taut.core.modes import evaluating
from taut.errors import ModelError
from taut.nn import GroupedLinear, Product
from taut.nn.product_forms import Contraction
from taut.nn.product_parts import by_parts, stack_of
from taut.nn.product_uses import use_of
from taut.nn.weight_axes import axes_of
from taut.nn.weight_views import View
from taut.structure.coverage import seeded
from taut.structure.surgery import hold, part, shallow
from taut.types import Invocation

Where = Mapping[str, str]
"""A layer's name -> the name of the parameter that it is about."""


@dataclass
class Uses:
    """What a network's code does with a weight.

    Attributes:
        summed: axes that products sum over, for every way in which there are products.
        rows: ranges of rows that they use. calls: the matrix products.
        others: torch's names for all else that needs values.
        stacked: whether parts of the first axis are used by number, as experts are: any of them may be, then.
        at_once: whether there are products with all of them at once. apart: whether there are others.
    """

    summed: set[tuple[int, ...]] = field(default_factory=set)
    rows: set[tuple[int, int]] = field(default_factory=set)
    calls: list[Invocation] = field(default_factory=list)
    others: set[str] = field(default_factory=set)
    stacked: bool = False
    at_once: bool = False
    apart: bool = False


@dataclass(frozen=True)
class Multiplied:
    """A weight that is used in products alone, all of one matrix.

    Attributes:
        summed: the axes that they sum over. rows: how many rows go together; () where all do.
        calls: the matrix products in one run of the example.
        stacked: whether all products are with all parts of the first axis at once.
    """

    summed: tuple[int, ...]
    rows: tuple[int, ...]
    calls: tuple[Invocation, ...] = ()
    stacked: bool = False


def matrix_of(weight: Tensor, summed: Sequence[int]) -> Tensor:
    """The weight as (outputs, inputs); the axes in `summed` are the inputs."""
    outputs = [axis for axis in range(weight.ndim) if axis not in summed]
    inputs = math.prod(weight.shape[axis] for axis in summed)
    return weight.permute(*outputs, *summed).reshape(-1, inputs)


class WithoutValues(Product):
    """Layers that never give the weight's values: what needs them fails."""

    def dense(self, number: int | None = None) -> None:
        """None."""
        del number


def as_product(
    weight: Tensor, summed: Sequence[int], rows: Sequence[int], *, stacked: bool = False, trial: bool = False
) -> Product:
    """Layers in the place of a weight.

    Args:
        weight: the parameter.
        summed: the axes that products sum over.
        rows: how many rows go together, from first to last; () where all do.
        stacked: whether the parts of the first axis are multiplied by all at once.
        trial: whether they are layers to try, and to forget: they stay on the weight's memory, and give no values.
    """
    matrix, layers = matrix_of(weight.detach(), summed), list[nn.Module]()
    kind = WithoutValues if trial else Product
    if stacked:
        count, (outputs, inputs) = weight.shape[0], matrix.shape
        layer = GroupedLinear(count * inputs, outputs, groups=count, bias=False, device="meta", dtype=matrix.dtype)
        values = (matrix if trial else matrix.clone())[..., None]
        layer.weight = nn.Parameter(values, requires_grad=weight.requires_grad)
        return kind(tuple(weight.shape), tuple(summed), [layer], stacked=True)
    for values in torch.split(matrix, list(rows) or [len(matrix)]):
        part = nn.Linear(values.shape[1], values.shape[0], bias=False, device="meta", dtype=values.dtype)
        part.weight = nn.Parameter(values if trial else values.clone(), requires_grad=weight.requires_grad)
        layers.append(part)
    return kind(tuple(weight.shape), tuple(summed), layers)


class _Noted(Product):
    """Stands where a weight is, answers with its values, and notes what is done with it."""

    def __init__(self, weight: Tensor, uses: Uses) -> None:
        super().__init__(tuple(weight.shape), (), ())
        self.values, self.uses = [weight], uses

    def seen(self) -> View:
        return View(self, axes_of(self.sizes), (0,) * len(self.sizes), self.values[0])

    def present_sizes(self) -> tuple[int, ...]:
        return self.sizes

    def note(self, name: str) -> None:
        self.uses.others.add(name)

    def like(self) -> Tensor:
        return self.values[0]

    def note_stacked(self, *, whole: bool = False) -> None:
        self.uses.stacked = True
        self.uses.at_once |= whole
        self.uses.apart |= not whole

    def multiplied(self, form: Contraction) -> Tensor | None:
        if (stack := stack_of(form)) is not None:
            return by_parts(form, stack, self._by_one)
        self.uses.apart = True
        return self._by_one(form)

    def _by_one(self, form: Contraction) -> Tensor | None:
        """The product by one matrix."""
        use = use_of(form, self.sizes)
        if use is None:
            return None
        x = use.given(form.x)
        output = functional.linear(x, self._matrix(use.summed, *use.rows))
        self.uses.summed.add(use.summed)
        self.uses.rows.add(use.rows)
        self.uses.calls.append(Invocation(tuple(x.shape), tuple(output.shape)))
        product: Tensor = use.handed(output)
        return product

    def _matrix(self, summed: tuple[int, ...], first: int, last: int) -> Tensor:
        """Some rows of the matrix: of a stack only that one of its matrices is put together in which they are."""
        weight = self.values[0]
        if weight.ndim > 2 and 0 not in summed:
            each = weight[0].numel() // math.prod(weight.shape[axis] for axis in summed)
            number = first // each
            if last <= (number + 1) * each:
                matrix = matrix_of(weight[number], [axis - 1 for axis in summed])
                return matrix[first - number * each : last - number * each]
        return matrix_of(weight, summed)[first:last]


def uses_of(
    model: nn.Module, example: Example, where: Where, inputs: Any, *, training: bool = False
) -> dict[str, Uses]:
    """What code does with weights in one run; nothing of those that it cannot do with when they are watched.

    Args:
        model: the network.
        example: how it is called.
        where: the parameters.
        inputs: to run it on.
        training: whether in train mode.
    """
    copied = shallow(model)
    uses = {name: Uses() for name in where}
    for name, parameter in where.items():
        weight: Any = part(copied, parameter).weight
        hold(copied, parameter, _Noted(weight, uses[name]))
    try:
        with evaluating(copied, training=training), seeded():
            example.run(copied, inputs)
        return uses
    except ModelError:
        names = list(where)
    if len(names) == 1:
        return {}
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    parts = [uses_of(model, example, {n: where[n] for n in half}, inputs, training=training) for half in halves]
    return {**parts[0], **parts[1]}

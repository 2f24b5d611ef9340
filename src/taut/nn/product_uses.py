"""A product of a tensor and a weight as a layer has it: what is summed over, and how axes go in and come out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from taut.nn.product_forms import Contraction, in_order, merged_last, split_last
from taut.nn.weight_axes import REPEATED, Atom, Axis, dense, length


class Use:
    """A product as the layers have it: what is summed over, which rows are used, and how axes go in and come out.

    Attributes:
        summed: axes of the weight, ascending, without those of length 1.
        rows: first <= row < last.
    """

    def __init__(
        self, summed: tuple[int, ...], rows: tuple[int, int], given: Callable[[Tensor], Tensor], handed: Any
    ) -> None:
        """`given` makes of the tensor what goes into the layers; `handed` of what they give the product."""
        self.summed, self.rows, self.given, self.handed = summed, rows, given, handed


def use_of(form: Contraction, sizes: Sequence[int]) -> Use | None:
    """How a product uses a weight of a shape; None where that is not what a layer does."""
    view = form.weight.seen()
    pairs = list(zip(form.of_weight, view.axes, strict=True))
    met = [(n, axis) for n, axis in pairs if n in form.of_x and n not in form.of_output]
    left = [(n, axis) for n, axis in pairs if n not in form.of_x]
    both = [(n, axis) for n, axis in pairs if n in form.of_x and n in form.of_output]
    rest = [n for n in form.of_x if n not in dict(met)]
    inner, outer = _atoms(met), _atoms(left)
    repeats = any(atom[0] == REPEATED for atom in (*inner, *outer))
    if repeats or any(atom[0] != REPEATED for _, axis in both for atom in axis) or not inner:
        return None
    if any(length(axis) not in {1, form.x.shape[form.of_x.index(n)]} for n, axis in both):
        return None  # what is repeated makes the tensor longer there, which no layer does
    if {*rest, *dict(left)} != set(form.of_output) or len(form.of_output) != len(rest) + len(left):
        return None
    summed = tuple(dict.fromkeys(atom[0] for atom in sorted(inner)))
    rows = _rows(outer, summed, view.starts, sizes)
    whole = all(dense([a for a in inner if a[0] == axis]) == sizes[axis] for axis in summed)
    if rows is None or not whole or any(view.starts[axis] for axis in summed):
        return None

    def given(x: Tensor) -> Tensor:
        x = in_order(x, [form.of_x.index(n) for n in (*rest, *dict(met))])
        return _sorted_in(x, [axis for _, axis in met])

    def handed(output: Tensor) -> Tensor:
        output = _sorted_out(output, [axis for _, axis in left])
        names = [*rest, *dict(left)]
        return in_order(output, [names.index(n) for n in form.of_output])

    return Use(summed, rows, given, handed)


def _atoms(pairs: Sequence[tuple[Any, Axis]]) -> list[Atom]:
    return [atom for _, axis in pairs for atom in axis]


def _order(atoms: Sequence[Atom]) -> list[int]:
    """Where atoms come from that are sorted as they lie in memory."""
    return sorted(range(len(atoms)), key=lambda k: (atoms[k][0], -atoms[k][2]))


def _rows(
    atoms: Sequence[Atom], summed: tuple[int, ...], starts: Sequence[int], sizes: Sequence[int]
) -> tuple[int, int] | None:
    """The rows of the matrix that the atoms of the outputs cover, if they are neighbours."""
    first = None
    count = start = 1
    outputs = [axis for axis, size in enumerate(sizes) if axis not in summed and size != 1]
    for axis in outputs:
        covered = dense([atom for atom in atoms if atom[0] == axis])
        if covered is None or (first is not None and covered != sizes[axis]):
            return None
        if first is None:
            first, start, count = axis, starts[axis], covered
        else:
            start, count = start * sizes[axis], count * sizes[axis]
    if {atom[0] for atom in atoms} - set(outputs):
        return None
    return (0, 1) if first is None else (start, start + count)


def _sorted_in(x: Tensor, axes: Sequence[Axis]) -> Tensor:
    """The last axes of a tensor, which meet these of a weight, as one, in the order of the weight."""
    atoms = [atom for axis in axes for atom in axis]
    order, rest = _order(atoms), x.ndim - len(axes)
    if order == list(range(len(atoms))):
        return merged_last(x, len(axes))
    x = x.reshape([*x.shape[:rest], *[atom[1] for atom in atoms]])
    return merged_last(in_order(x, [*range(rest), *[rest + k for k in order]]), len(atoms))


def _sorted_out(output: Tensor, axes: Sequence[Axis]) -> Tensor:
    """The last axis, in the order of the weight, as these of its axes."""
    atoms = [atom for axis in axes for atom in axis]
    if len(axes) == 1 and _order(atoms) == list(range(len(atoms))):
        return output
    if not axes:
        return output.squeeze(-1)
    order, rest = _order(atoms), output.ndim - 1
    output = split_last(output, [atoms[k][1] for k in order]) if atoms else output
    if atoms:
        output = in_order(output, [*range(rest), *[rest + order.index(k) for k in range(len(atoms))]])
    return output.reshape([*output.shape[:rest], *[length(axis) for axis in axes]])

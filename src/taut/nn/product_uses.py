"""A product of a tensor and a weight as a layer has it: what is summed over, and how axes go in and come out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from taut.nn.product_forms import Contraction, Labels, in_order, merged_last, split_last
from taut.nn.weight_axes import REPEATED, Atom, Axes, Axis, dense, length, remembered


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


class _Key(NamedTuple):
    """All that decides how a product uses a weight: names and atoms of axes, sizes, and lengths of shared axes."""

    of_x: Labels
    of_weight: Labels
    of_output: Labels
    axes: Axes
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    shared: tuple[int, ...]


def use_of(form: Contraction, sizes: Sequence[int]) -> Use | None:
    """How a product uses a weight of a shape; None where that is not what a layer does."""
    view, of_x = form.weight.seen(), form.of_x
    shared = tuple([form.x.shape[of_x.index(n)] for n in form.of_weight if n in of_x and n in form.of_output])
    key = _Key(of_x, form.of_weight, form.of_output, view.axes, view.starts, tuple(sizes), shared)
    return remembered(_use_of, key)


def _use_of(key: _Key) -> Use | None:
    pairs = list(zip(key.of_weight, key.axes, strict=True))
    met = [(n, axis) for n, axis in pairs if n in key.of_x and n not in key.of_output]
    left = [(n, axis) for n, axis in pairs if n not in key.of_x]
    both = [axis for n, axis in pairs if n in key.of_x and n in key.of_output]
    rest = [n for n in key.of_x if n not in dict(met)]
    inner, outer = _atoms(met), _atoms(left)
    repeats = any(atom[0] == REPEATED for atom in (*inner, *outer))
    if repeats or any(atom[0] != REPEATED for axis in both for atom in axis) or not inner:
        return None
    if any(length(axis) not in {1, size} for axis, size in zip(both, key.shared, strict=True)):
        return None  # what is repeated makes the tensor longer there, which no layer does
    if {*rest, *dict(left)} != set(key.of_output) or len(key.of_output) != len(rest) + len(left):
        return None
    summed = tuple(dict.fromkeys(atom[0] for atom in sorted(inner)))
    rows = _rows(outer, summed, key.starts, key.sizes)
    whole = all(dense([a for a in inner if a[0] == axis]) == key.sizes[axis] for axis in summed)
    if rows is None or not whole or any(key.starts[axis] for axis in summed):
        return None
    order_in, names = [key.of_x.index(n) for n in (*rest, *dict(met))], [*rest, *dict(left)]
    order_out = [names.index(n) for n in key.of_output]
    sorted_in, sorted_out = _sorted_in([axis for _, axis in met]), _sorted_out([axis for _, axis in left])
    return Use(summed, rows, _both(_moved(order_in), sorted_in), _both(sorted_out, _moved(order_out)))


Step = Callable[[Tensor], Tensor] | None
"""What is done to a tensor; None: nothing."""


def _both(first: Step, second: Step) -> Callable[[Tensor], Tensor]:
    """One after the other."""
    if first is None:
        return second or (lambda x: x)
    return first if second is None else lambda x: second(first(x))


def _moved(order: Sequence[int]) -> Step:
    """Axes in another order, where it is another one."""
    return None if list(order) == list(range(len(order))) else lambda x: x.permute(*order)


def _atoms(pairs: Sequence[tuple[Any, Axis]]) -> list[Atom]:
    return _atoms_of([axis for _, axis in pairs])


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


def _sorted_in(axes: Sequence[Axis]) -> Step:
    """The last axes of a tensor, which meet these of a weight, as one, in the order of the weight."""
    atoms, count = _atoms_of(axes), len(axes)
    order = _order(atoms)
    if order == list(range(len(atoms))):
        return None if count == 1 else lambda x: merged_last(x, count)

    def turned(x: Tensor) -> Tensor:
        rest = x.ndim - count
        x = x.reshape([*x.shape[:rest], *[atom[1] for atom in atoms]])
        return merged_last(in_order(x, [*range(rest), *[rest + k for k in order]]), len(atoms))

    return turned


def _sorted_out(axes: Sequence[Axis]) -> Step:
    """The last axis, in the order of the weight, as these of its axes."""
    atoms = _atoms_of(axes)
    order, lengths = _order(atoms), [length(axis) for axis in axes]
    if len(axes) == 1 and order == list(range(len(atoms))):
        return None
    if not axes:
        return lambda output: output.squeeze(-1)

    def turned(output: Tensor) -> Tensor:
        rest = output.ndim - 1
        if atoms:
            output = split_last(output, [atoms[k][1] for k in order])
            output = in_order(output, [*range(rest), *[rest + order.index(k) for k in range(len(atoms))]])
        return output.reshape([*output.shape[:rest], *lengths])

    return turned


def _atoms_of(axes: Sequence[Axis]) -> list[Atom]:
    return [atom for axis in axes for atom in axis]

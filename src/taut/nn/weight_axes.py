"""What views of a weight show of it, axis by axis: bookkeeping on sizes, without values.

An axis of a view is a tuple of atoms (axis of the weight, length, step): those indices of that axis of the weight which
are `step` apart. So (1, 8, 1) is an axis of 8 as it is, and its view as (2, 4) has the atoms (1, 2, 4) and (1, 4, 1).
Lengths of 1 have no atom. An atom of axis `REPEATED` shows the same again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

K = TypeVar("K")
R = TypeVar("R")

Atom = tuple[int, int, int]

Axis = tuple[Atom, ...]

Axes = tuple[Axis, ...]

REPEATED = -1
"""The weight's axis of an atom that repeats what is there once."""


CHOSEN = -2
"""The weight's axis of an atom that shows chosen parts of its first axis, one behind the other."""


MOST_REMEMBERED = 4096
"""Answers that are kept: a network asks the same few again and again."""

_REMEMBERED: dict[Any, Any] = {}


def remembered(answer: Callable[[K], R], key: K) -> R:
    """What a function says to plain data, computed once: code asks the same of a weight at every call."""
    if torch.compiler.is_compiling():
        return answer(key)
    try:
        known: R = _REMEMBERED[answer, key]
        return known
    except KeyError:
        made = answer(key)
    except TypeError:  # sizes that stand for any, as while a graph is made
        return answer(key)
    if len(_REMEMBERED) >= MOST_REMEMBERED:
        _REMEMBERED.clear()
    _REMEMBERED[answer, key] = made
    return made


class NoView(Exception):  # noqa: N818 - caught where it is raised for, never seen by users
    """What is asked of a weight is not one of its views."""


def axes_of(shape: Sequence[int]) -> Axes:
    """The axes of a weight as it is."""
    return tuple(((axis, size, 1),) if size != 1 else () for axis, size in enumerate(shape))


def length(axis: Axis) -> int:
    """How long an axis is."""
    return math.prod([atom[1] for atom in axis])


def axis_at(dim: int, count: int) -> int:
    """The number of an axis, counted from the front.

    Raises:
        IndexError: there is none of that number.
    """
    if not -count <= dim < count:
        raise IndexError(f"Dimension out of range: {dim} of {count} axes.")
    return dim % count


def permuted(axes: Axes, *order: Any) -> Axes:
    """The axes in another order, given as numbers or as one sequence of them."""
    order = tuple(order[0]) if len(order) == 1 and isinstance(order[0], tuple | list) else order
    if sorted(axis_at(i, len(axes)) for i in order) != list(range(len(axes))):
        raise NoView
    return tuple(axes[i] for i in order)


def transposed(axes: Axes, dim0: int, dim1: int) -> Axes:
    """Two axes in each other's place."""
    moved = list(axes)
    moved[dim0], moved[dim1] = axes[dim1], axes[dim0]
    return tuple(moved)


def turned(axes: Axes) -> Axes:
    """All axes the other way around."""
    return axes[::-1]


def flipped(axes: Axes) -> Axes:
    """Two axes at most, the other way around."""
    if len(axes) > 2:
        raise NoView
    return axes[::-1]


def matrix_turned(axes: Axes) -> Axes:
    """The last two axes in each other's place."""
    if len(axes) < 2:
        raise NoView
    return transposed(axes, -2, -1)


def moved(axes: Axes, source: Any, destination: Any) -> Axes:
    """Some axes at other places, as torch.movedim."""
    count = len(axes)
    sources = [source] if isinstance(source, int) else list(source)
    places = [destination] if isinstance(destination, int) else list(destination)
    fixed = dict(zip((axis_at(p, count) for p in places), (axis_at(s, count) for s in sources), strict=True))
    others = [i for i in range(count) if i not in fixed.values()]
    return tuple(axes[fixed[place] if place in fixed else others.pop(0)] for place in range(count))


def reshaped(axes: Axes, *shape: Any) -> Axes:
    """The axes merged and split into others.

    Raises:
        NoView: an atom would have to be split where its length does not divide.
    """
    wanted = list(shape[0]) if len(shape) == 1 and isinstance(shape[0], tuple | list) else list(shape)
    if wanted.count(-1) == 1:
        known = math.prod([size for size in wanted if size != -1])
        wanted[wanted.index(-1)] = math.prod([length(axis) for axis in axes]) // max(known, 1)
    atoms = [atom for axis in axes for atom in axis]
    made: list[Axis] = []
    for size in wanted:
        axis, left = [], size
        while left > 1:
            if not atoms:
                raise NoView
            weight_axis, count, step = atoms.pop(0)
            if count > left:
                if count % left:
                    raise NoView
                rest = count // left
                atoms.insert(0, (weight_axis, rest, step))
                count, step = left, step * rest
            if left % count:
                raise NoView
            axis.append((weight_axis, count, step))
            left //= count
        made.append(tuple(axis))
    if atoms:
        raise NoView
    return tuple(made)


def flattened(axes: Axes, start_dim: int = 0, end_dim: int = -1) -> Axes:
    """Neighbouring axes as one."""
    first, last = axis_at(start_dim, len(axes)), axis_at(end_dim, len(axes))
    return (*axes[:first], tuple(atom for axis in axes[first : last + 1] for atom in axis), *axes[last + 1 :])


def unflattened(axes: Axes, dim: int, sizes: Sequence[int]) -> Axes:
    """One axis as several."""
    dim = axis_at(dim, len(axes))
    return (*axes[:dim], *reshaped((axes[dim],), *sizes), *axes[dim + 1 :])


def unsqueezed(axes: Axes, dim: int) -> Axes:
    """One more axis, of length 1."""
    dim = axis_at(dim, len(axes) + 1)
    return (*axes[:dim], (), *axes[dim:])


def squeezed(axes: Axes, dim: Any = None) -> Axes:
    """Without axes of length 1: all of them, or those given."""
    chosen = range(len(axes)) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    gone = {axis_at(i, len(axes)) for i in chosen}
    return tuple(axis for i, axis in enumerate(axes) if i not in gone or axis)


def expanded(axes: Axes, *shape: Any) -> Axes:
    """The same again along new axes in front, and along those of length 1."""
    wanted = list(shape[0]) if len(shape) == 1 and isinstance(shape[0], tuple | list) else list(shape)
    whole = ((),) * (len(wanted) - len(axes)) + axes
    return tuple(
        axis if size in {-1, length(axis)} else _repeated(axis, size) for axis, size in zip(whole, wanted, strict=True)
    )


def _repeated(axis: Axis, size: int) -> Axis:
    if axis:
        raise NoView
    return ((REPEATED, size, 0),)


VIEWS: dict[str, Callable[..., Axes]] = {
    "permute": permuted,
    "transpose": transposed,
    "swapaxes": transposed,
    "swapdims": transposed,
    "t": flipped,
    "movedim": moved,
    "moveaxis": moved,
    "reshape": reshaped,
    "view": reshaped,
    "flatten": flattened,
    "unflatten": unflattened,
    "squeeze": squeezed,
    "unsqueeze": unsqueezed,
    "expand": expanded,
    "contiguous": lambda axes: axes,
    "T": turned,
    "mT": matrix_turned,
}
"""torch's name for a view -> the axes afterwards."""


def cut(axes: Axes, dim: int, first: int, last: int) -> tuple[Axes, tuple[int, int] | None]:
    """A range of one axis: the axes, and by how much its first index is further along which axis of the weight.

    Raises:
        NoView: the axis is made of several, and not all of it is wanted.
    """
    dim %= len(axes)
    whole = length(axes[dim])
    first, last, _ = slice(first, last).indices(whole)
    if axes[dim] and axes[dim][0][0] == CHOSEN:
        raise NoView
    if (first, last) == (0, whole):
        return axes, None
    if len(axes[dim]) != 1 or axes[dim][0][0] == REPEATED or first >= last:
        raise NoView
    weight_axis, _, step = axes[dim][0]
    kept: Axis = ((weight_axis, last - first, step),) if last - first > 1 else ()
    return (*axes[:dim], kept, *axes[dim + 1 :]), (weight_axis, first * step)


def at_front(key: tuple[Axes, int]) -> tuple[Axes, tuple[int, int] | None] | None:
    """One index of the first axis, as `cut`; None where it is none of a view."""
    axes, index = key
    if not axes or not -length(axes[0]) <= index < length(axes[0]):
        return None
    first = index % length(axes[0])
    try:
        kept, moved = cut(axes, 0, first, first + 1)
    except NoView:
        return None
    return kept[1:], moved


def dense(atoms: Sequence[Atom]) -> int | None:
    """How many neighbouring indices atoms of one axis of the weight cover together; None where there are gaps."""
    covered = 1
    for _, count, step in sorted(atoms, key=lambda atom: atom[2]):
        if step != covered:
            return None
        covered *= count
    return covered

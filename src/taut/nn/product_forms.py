"""How torch's functions multiply a tensor by a weight, as one form: which axes meet, are summed over, and remain."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Labels = tuple[Hashable, ...]
"""A name for every axis; axes of the same name meet."""


@dataclass(frozen=True)
class Contraction:
    """A product of a tensor and a weight.

    Attributes:
        weight: the weight, or a view of it. x: the tensor.
        of_x, of_weight, of_output: the names of their axes.
        finish: what is done with the product afterwards.
    """

    weight: Any
    x: Tensor
    of_x: Labels
    of_weight: Labels
    of_output: Labels
    finish: Callable[[Tensor], Tensor]


IsWeight = Callable[[Any], bool]


def _as_it_is(product: Tensor) -> Tensor:
    return product


def _linear(known: IsWeight, input: Any, weight: Any, bias: Any = None) -> Contraction | None:  # noqa: A002 - torch's names
    if known(input) or known(bias) or weight.ndim != 2 or not isinstance(input, Tensor) or not input.ndim:
        return None
    rest = tuple(range(input.ndim - 1))
    finish = _as_it_is if bias is None else lambda product: product + bias.to(product.dtype)
    return Contraction(weight, input, (*rest, "i"), ("o", "i"), (*rest, "o"), finish)


def _inner(known: IsWeight, input: Any, other: Any) -> Contraction | None:  # noqa: A002 - torch's names
    return _linear(known, input, other) if known(other) else None


def _matmul(known: IsWeight, input: Any, other: Any) -> Contraction | None:  # noqa: A002 - torch's names
    if known(input) == known(other):
        return None
    right = known(other)
    weight, x = (other, input) if right else (input, other)
    if weight.ndim < 2 or not isinstance(x, Tensor) or not x.ndim or (x.ndim == 1 and weight.ndim > 2):
        return None
    ends = ("i", "o") if right else ("o", "i")
    of_weight = (*_batch(weight.ndim), *ends)
    if x.ndim == 1:
        return Contraction(weight, x, ("i",), of_weight, ("o",), _as_it_is)
    batch = _batch(max(weight.ndim, x.ndim))
    of_x = (*_batch(x.ndim), *(("n", "i") if right else ("i", "n")))
    return Contraction(weight, x, of_x, of_weight, (*batch, *(("n", "o") if right else ("o", "n"))), _as_it_is)


def _batch(ndim: int) -> Labels:
    """Names of all axes but the last two, which are aligned from the right."""
    return tuple(range(ndim - 2))[::-1]


def _exactly(ndim: int) -> Callable[..., Contraction | None]:
    """The product of two tensors of so many axes."""

    def product(known: IsWeight, input: Any, other: Any) -> Contraction | None:  # noqa: A002 - torch's names
        return _matmul(known, input, other) if input.ndim == other.ndim == ndim else None

    return product


def _mv(known: IsWeight, input: Any, vec: Any) -> Contraction | None:  # noqa: A002 - torch's names
    return _matmul(known, input, vec) if known(input) and input.ndim == 2 else None


def _added(
    known: IsWeight,
    added: Any,
    first: Any,
    second: Any,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> Contraction | None:
    form = None if known(added) else _matmul(known, first, second)
    if form is None:
        return None

    def finish(product: Tensor) -> Tensor:
        product = product if alpha == 1 else product * alpha
        return product if beta == 0 else product + (added if beta == 1 else added * beta).to(product.dtype)

    return Contraction(form.weight, form.x, form.of_x, form.of_weight, form.of_output, finish)


def _addmm(known: IsWeight, input: Any, mat1: Any, mat2: Any, **factors: float) -> Contraction | None:  # noqa: A002
    return _added(known, input, mat1, mat2, **factors)


def _baddbmm(known: IsWeight, input: Any, batch1: Any, batch2: Any, **factors: float) -> Contraction | None:  # noqa: A002
    return _added(known, input, batch1, batch2, **factors)


def _einsum(known: IsWeight, equation: Any, *operands: Any) -> Contraction | None:
    if len(operands) == 1 and isinstance(operands[0], tuple | list):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or known(operands[0]) == known(operands[1]):
        return None
    terms, arrow, output = equation.replace(" ", "").partition("->")
    names = terms.split(",")
    if len(names) != 2 or "..." in names[int(known(operands[1]))]:
        return None
    which = int(known(operands[1]))
    weight, x = operands[which], operands[1 - which]
    if not arrow:
        once = sorted(c for c in set(terms) - {",", "."} if terms.count(c) == 1)
        output = ("..." if "..." in terms else "") + "".join(once)
    of_weight = tuple(names[which])
    hidden = x.ndim - len(names[1 - which].replace("...", ""))
    of_x, of_output = _spelled(names[1 - which], hidden), _spelled(output, hidden)
    if len(of_weight) != weight.ndim or len(of_x) != x.ndim or ("..." in names[1 - which]) != ("..." in output):
        return None
    return Contraction(weight, x, of_x, of_weight, of_output, _as_it_is)


def _spelled(letters: str, hidden: int) -> Labels:
    """Every axis of a term by name; those behind its dots by numbers."""
    before, dots, behind = letters.partition("...")
    return (*before, *(range(hidden) if dots else ()), *behind)


def _tensordot(known: IsWeight, a: Any, b: Any, dims: Any = 2, out: Any = None) -> Contraction | None:
    if known(a) == known(b) or out is not None or isinstance(dims, Tensor):
        return None
    first, second = (range(a.ndim - dims, a.ndim), range(dims)) if isinstance(dims, int) else dims
    met = dict(zip((i % a.ndim for i in first), (i % b.ndim for i in second), strict=True))
    names: list[Any] = [("b", axis) for axis in range(b.ndim)]
    of_a = tuple(("met", axis) if axis in met else ("a", axis) for axis in range(a.ndim))
    for axis, other in met.items():
        names[other] = ("met", axis)
    of_output = tuple(label for label in (*of_a, *names) if label[0] != "met")
    if known(a):
        return Contraction(a, b, tuple(names), of_a, of_output, _as_it_is)
    return Contraction(b, a, of_a, tuple(names), of_output, _as_it_is)


def _grouped_mm(known: IsWeight, mat_a: Any, mat_b: Any, offs: Any = None, **rest: Any) -> Contraction | None:
    """Rows of `mat_a` by matrices of `mat_b`, up to row offs[k] by the k-th."""
    plain = not known(mat_a) and not any(value is not None for value in rest.values())
    view = mat_b.seen() if known(mat_b) else None
    if not plain or view is None or offs is None or mat_a.ndim != 2 or view.axes[:1] != (((0, len(view), 1),),):
        return None
    view.product.note_stacked()
    index = torch.searchsorted(offs.long(), torch.arange(mat_a.shape[0], device=offs.device), right=True)
    return Contraction(view.choosing(index, mat_a.shape[0]), mat_a, ("b", "i"), ("b", "i", "o"), ("b", "o"), _as_it_is)


FORMS: dict[str, Callable[..., Contraction | None]] = {
    "linear": _linear,
    "inner": _inner,
    "matmul": _matmul,
    "__matmul__": _matmul,
    "linalg_matmul": _matmul,
    "mm": _exactly(2),
    "bmm": _exactly(3),
    "mv": _mv,
    "addmm": _addmm,
    "baddbmm": _baddbmm,
    "einsum": _einsum,
    "tensordot": _tensordot,
    "grouped_mm": _grouped_mm,
    "_grouped_mm": _grouped_mm,
}
"""torch's name for a product -> its form, or None where it is none of a tensor and a weight."""


def contraction_of(name: str, known: IsWeight, args: Sequence[Any], kwargs: dict[str, Any]) -> Contraction | None:
    """The form of a call of torch's function `name`; None where it is no product of one tensor and one weight.

    Args:
        name: torch's.
        known: whether an argument is the weight.
        args: of the call.
        kwargs: likewise.
    """
    if name not in FORMS:
        return None
    try:
        form = FORMS[name](known, *args, **kwargs)
    except (TypeError, ValueError, AttributeError):  # arguments of another kind, as `out=`
        return None
    if form is None or len(set(form.of_x)) < len(form.of_x) or len(set(form.of_weight)) < len(form.of_weight):
        return None
    return form


def in_order(t: Tensor, order: Sequence[int]) -> Tensor:
    """Axes in another order, where it is another one."""
    return t if list(order) == list(range(t.ndim)) else t.permute(*order)


def split_last(t: Tensor, sizes: Sequence[int]) -> Tensor:
    """The last axis as several."""
    return t if len(sizes) == 1 else torch.unflatten(t, -1, tuple(sizes) or (1,))


def merged_last(t: Tensor, count: int) -> Tensor:
    """The last axes as one."""
    return t.unsqueeze(-1) if not count else t if count == 1 else t.flatten(-count)

"""Products with a stack of matrices, as experts are: one matrix for every index of an axis, or for chosen ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from taut.nn.grouped import of_all
from taut.nn.product_forms import Contraction, Labels
from taut.nn.product_uses import use_of
from taut.nn.weight_axes import CHOSEN


def stack_of(form: Contraction) -> int | None:
    """The axis of a weight that has one matrix for each index of an axis of the tensor and of the product, if any."""
    for dim, (label, axis) in enumerate(zip(form.of_weight, form.weight.seen().axes, strict=True)):
        if label in form.of_x and label in form.of_output and len(axis) == 1 and axis[0][0] in {0, CHOSEN}:
            return dim
    return None


def by_parts(form: Contraction, stack: int, multiplied: Callable[[Contraction], Tensor | None]) -> Tensor | None:
    """The product, matrix by matrix; None where one of them is none of a layer.

    Args:
        form: the product.
        stack: the weight's axis along which there are several matrices.
        multiplied: gives the product by one of them.
    """
    view = form.weight.seen()
    if view.chosen is not None:
        return _chosen(form, stack, view.chosen, multiplied)
    label, count = form.of_weight[stack], view.shape[stack]
    at, out = form.of_x.index(label), form.of_output.index(label)
    whole = view.axes[stack] == ((0, view.product.sizes[0], 1),)
    if not whole or form.x.shape[at] not in {1, count}:
        return None
    view.product.note_stacked(whole=True)
    outputs = []
    for number in range(count):
        x = form.x.select(at, number if form.x.shape[at] > 1 else 0)
        outputs.append(multiplied(_one(form, stack, number, x, (*form.of_x[:at], *form.of_x[at + 1 :]), out)))
    return _joined(outputs, lambda parts: torch.stack(parts, out))


def at_once(form: Contraction, stack: int, summed: Sequence[int], layer: nn.Module) -> Tensor | None:
    """The product by all matrices, by one layer; None where it is none of the whole stack.

    Args:
        form: the product.
        stack: the weight's axis along which there are several matrices.
        summed: the axes of the weight that the layer sums over.
        layer: has a group for every matrix.
    """
    view = form.weight.seen()
    sizes = view.product.sizes
    label, at = form.of_weight[stack], form.of_x.index(form.of_weight[stack])
    if view.chosen is not None or view.axes[stack] != ((0, sizes[0], 1),) or form.x.shape[at] not in {1, sizes[0]}:
        return None
    one = _one(form, stack, 0, form.x, form.of_x, None)  # the axis of matrices is one of the tensor alone
    use = use_of(one, sizes)
    per_matrix = math.prod(sizes[1:]) // math.prod([sizes[axis] for axis in summed])
    if use is None or use.rows != (0, per_matrix) or use.summed != tuple(a for a in summed if sizes[a] != 1):
        return None
    x = form.x if form.x.shape[at] > 1 else form.x.expand(*_with(form.x.shape, at, sizes[0]))
    x = use.given(x)
    left = [name for name in form.of_x if name in form.of_output]
    place = left.index(label)
    output: Tensor = use.handed(of_all(layer, x.movedim(place, 0)).movedim(0, place))
    return output.contiguous()


def _one(form: Contraction, stack: int, number: int, x: Tensor, of_x: Labels, out: int | None) -> Contraction:
    """The product by one of the matrices; `out` is the axis of the product that is gone, if one is."""
    of_weight = (*form.of_weight[:stack], *form.of_weight[stack + 1 :])
    of_output = form.of_output if out is None else (*form.of_output[:out], *form.of_output[out + 1 :])
    return Contraction(form.weight.seen().one(stack, number), x, of_x, of_weight, of_output, form.finish)


def _joined(outputs: Sequence[Tensor | None], join: Callable[[list[Tensor]], Tensor]) -> Tensor | None:
    known = [output for output in outputs if output is not None]
    return join(known) if len(known) == len(outputs) else None


def _chosen(
    form: Contraction, stack: int, chosen: Tensor, multiplied: Callable[[Contraction], Tensor | None]
) -> Tensor | None:
    """Every row by the matrix that is chosen for it; rows for which there is none give zeros."""
    label, count = form.of_weight[stack], form.weight.seen().product.present_sizes()[0]
    at, out = form.of_x.index(label), form.of_output.index(label)
    x = form.x if form.x.shape[at] == chosen.shape[0] else form.x.expand(*_with(form.x.shape, at, chosen.shape[0]))
    chosen = chosen.to(x.device)
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return _masked(form, stack, chosen, x, multiplied)
    chosen = torch.where(chosen < 0, chosen + count, chosen)
    order = torch.argsort(chosen, stable=True)
    sizes = torch.bincount(chosen, minlength=count).tolist()
    rows = torch.split(x.index_select(at, order), sizes, at)
    used = [number for number, size in enumerate(sizes[:count]) if size] or [0]
    outputs = [multiplied(_one(form, stack, number, rows[number], form.of_x, None)) for number in used]

    def join(parts: list[Tensor]) -> Tensor:
        if len(sizes) > count:  # rows behind the last group
            parts = [*parts, parts[0].new_zeros(_with(parts[0].shape, out, sizes[count]))]
        return torch.cat(parts, out).index_select(out, torch.argsort(order))

    return _joined(outputs, join)


def _masked(
    form: Contraction, stack: int, chosen: Tensor, x: Tensor, multiplied: Callable[[Contraction], Tensor | None]
) -> Tensor | None:
    """The same where no number may be read, as while a graph is made: every row by all matrices."""
    out = form.of_output.index(form.of_weight[stack])
    count = form.weight.seen().product.present_sizes()[0]
    outputs = [multiplied(_one(form, stack, number, x, form.of_x, None)) for number in range(count)]

    def join(parts: list[Tensor]) -> Tensor:
        whole = torch.zeros_like(parts[0])
        for number, part in enumerate(parts):
            mask = (chosen == number) | (chosen == number - count)
            whole = torch.where(mask.reshape([-1 if k == out else 1 for k in range(part.ndim)]), part, whole)
        return whole

    return _joined(outputs, join)


def _with(shape: Sequence[int], dim: int, size: int) -> list[int]:
    return [size if k == dim else length for k, length in enumerate(shape)]

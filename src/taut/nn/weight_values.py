"""The values of a weight that became layers, computed from these where code asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taut.nn.grouped import GroupedLinear
from taut.nn.weight_axes import CHOSEN, REPEATED, Axes, length


def dense(
    layers: Any, sizes: tuple[int, ...], summed: tuple[int, ...], stack: int = 1, number: int | None = None
) -> Tensor | None:
    """The weight that layers stand for; None where they do not have all of it.

    Args:
        layers: one for each part of the rows, from first to last; without a bias.
        sizes: of the weight.
        summed: those of its axes that are the inputs of the layers.
        stack: how many matrices one layer holds.
        number: of the one that is wanted, as a stack of one; None: all are.
    """
    if stack > 1:
        inputs = torch.Size([sizes[axis] for axis in summed]).numel()
        parts = [_stack(layer, stack, inputs, number) for layer in layers]
        sizes = sizes if number is None else (1, *sizes[1:])
    else:
        parts = [matrix_of_layer(layer) for layer in layers]
    matrix = parts[0] if len(parts) == 1 else torch.cat(parts)
    outputs = [axis for axis in range(len(sizes)) if axis not in summed]
    order = [*outputs, *summed]
    if matrix.numel() != torch.Size(sizes).numel():
        return None
    back = [order.index(axis) for axis in range(len(sizes))]
    return matrix.reshape([sizes[axis] for axis in order]).permute(back)


def matrix_of_layer(layer: nn.Module) -> Tensor:
    """What a layer multiplies by, (outputs, inputs): its weights, or what it makes of every unit vector."""
    weights = _weights(layer, nn.Linear, nn.Linear.forward)
    if weights is not None:
        return _multiplied(weights)
    like = next(t for t in layer.parameters() if t.is_floating_point())
    width = next(int(m.__dict__["in_features"]) for m in layer.modules() if "in_features" in m.__dict__)
    with torch.autocast(like.device.type, enabled=False):
        given: Tensor = layer(torch.eye(width, dtype=like.dtype, device=like.device))
        if any(getattr(m, "bias", None) is not None for m in layer.modules()):
            given = given - layer(like.new_zeros(1, width))
    return given.t()


def _stack(layer: nn.Module, stack: int, inputs: int, number: int | None) -> Tensor:
    """The matrices of a layer in groups, one behind the other, or one of them."""
    wanted = slice(None) if number is None else slice(number, number + 1)
    weights = _weights(layer, GroupedLinear, GroupedLinear.forward)
    if weights is not None:
        return _multiplied([t.reshape(stack, -1, t.shape[1])[wanted] for t in weights]).flatten(0, 1)
    like = next(t for t in layer.parameters() if t.is_floating_point())
    units = torch.eye(inputs, dtype=like.dtype, device=like.device).repeat(stack, 1)
    with torch.autocast(like.device.type, enabled=False):
        given: Tensor = layer(units[None])
    return torch.unflatten(given[0], 0, (stack, -1))[wanted].flatten(0, 1)


def _weights(layer: nn.Module, kind: type[nn.Module], forward: Any) -> list[Tensor] | None:
    """The weights of a layer of a kind, or of several in a row; None where there is anything else."""
    parts = list(layer.children()) if type(layer).forward is nn.Sequential.forward else [layer]
    plain = all(isinstance(p, kind) and type(p).forward is forward and "forward" not in vars(p) for p in parts)
    return [part.weight for part in parts] if parts and plain else None  # type: ignore[misc] # they have one


def _multiplied(weights: Sequence[Tensor]) -> Tensor:
    """What layers in a row multiply by together; nobody who looks on is told."""
    matrix = weights[0]
    with torch.autocast(matrix.device.type, enabled=False):
        for weight in weights[1:]:
            matrix = weight @ matrix
    return matrix


def seen_of(weight: Tensor, axes: Axes, starts: tuple[int, ...], chosen: Tensor | None) -> Tensor:
    """What a view shows of a weight.

    Args:
        weight: all of it.
        axes: what of the weight is where (`taut.nn.weight_axes`).
        starts: the first index that is seen, along every axis of the weight.
        chosen: which parts of the first axis are seen.
    """
    weight = (weight if chosen is None else weight[chosen]).contiguous()
    strides = {REPEATED: 0, CHOSEN: weight.stride(0), **dict(enumerate(weight.stride()))}
    atoms = [atom for axis in axes for atom in axis]
    offset = sum(start * strides[axis] for axis, start in enumerate(starts))
    steps = [strides[axis] * (1 if axis == CHOSEN else step) for axis, _, step in atoms]
    seen = weight.as_strided([count for _, count, _ in atoms], steps, weight.storage_offset() + offset)
    return seen.reshape([length(axis) for axis in axes])

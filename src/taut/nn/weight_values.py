"""The values of a weight that became layers, computed from these where code asks for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from taut.nn.weight_axes import CHOSEN, REPEATED, Axes, length


def dense(layers: Any, sizes: tuple[int, ...], summed: tuple[int, ...], stack: int = 1) -> Tensor | None:
    """The weight that layers stand for; None where they do not have all of it.

    Args:
        layers: one for each part of the rows, from first to last; without a bias.
        sizes: of the weight.
        summed: those of its axes that are the inputs of the layers.
        stack: how many matrices one layer holds.
    """
    if stack > 1:
        inputs = torch.Size([sizes[axis] for axis in summed]).numel()
        parts = [_stack(layer, stack, inputs) for layer in layers]
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
    """What a layer multiplies by, (outputs, inputs): what it makes of every unit vector."""
    if type(layer).forward is nn.Linear.forward and isinstance(layer, nn.Linear):
        return layer.weight
    like = next(t for t in layer.parameters() if t.is_floating_point())
    width = next(int(m.__dict__["in_features"]) for m in layer.modules() if "in_features" in m.__dict__)
    with torch.autocast(like.device.type, enabled=False):
        given: Tensor = layer(torch.eye(width, dtype=like.dtype, device=like.device))
        if any(getattr(m, "bias", None) is not None for m in layer.modules()):
            given = given - layer(like.new_zeros(1, width))
    return given.t()


def _stack(layer: nn.Module, stack: int, inputs: int) -> Tensor:
    """The matrices of a layer in groups, one behind the other."""
    like = next(t for t in layer.parameters() if t.is_floating_point())
    units = torch.eye(inputs, dtype=like.dtype, device=like.device).repeat(stack, 1)
    with torch.autocast(like.device.type, enabled=False):
        given: Tensor = layer(units[None])
    return given[0]


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

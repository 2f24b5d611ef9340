"""Plain torch.nn layers from shapes, and what they cost: shared by the methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import nn

from taut.nn import GroupedLinear
from taut.types import Cost, Layer

CONVOLUTIONS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}

Pads = Sequence[tuple[int, int]]

GRID = (
    *range(1, 9),
    *range(10, 17, 2),
    *range(20, 33, 4),
    *range(40, 65, 8),
    *range(80, 129, 16),
    *range(160, 513, 32),
)
"""Ranks on offer: quarter octaves that fall on multiples of 16 above 64 and of 32 above 128, as kernels like them."""


def rank_grid(limit: int, most: int = 64) -> list[int]:
    """The ranks on offer up to `limit` (beyond 512 in steps of an eighth, multiples of 64), thinned to `most`."""
    grid = [r for r in GRID if r <= limit]
    rank = 576
    while rank <= limit:
        grid.append(rank)
        rank += max(64, rank // 8 // 64 * 64)
    if len(grid) <= most:
        return grid
    return [grid[round(i * (len(grid) - 1) / (most - 1))] for i in range(most)]


def linear(inputs: int, outputs: int, *, bias: bool) -> nn.Module:
    """A Linear with uninitialized weights."""
    return empty(nn.Linear, inputs, outputs, bias=bias)


def empty(kind: type[nn.Module], *sizes: int, **settings: Any) -> nn.Module:
    """A layer whose memory is allocated but not written: no random numbers are drawn."""
    made: nn.Module = _unset(cast(Any, kind))(*sizes, **settings, device="cpu")
    made.__class__ = kind
    return made


@cache
def _unset(kind: type[Any]) -> type[Any]:
    """Layers of a class that leave their weights as they are: a fifth of the time of `torch.nn.utils.skip_init`."""
    return type(kind.__name__, (kind,), {"reset_parameters": lambda _: None})


def conv(sizes: tuple[int, int], layer: Layer, axes: Sequence[int], *, groups: int, bias: bool) -> nn.Module:
    """A convolution with uninitialized weights that takes over the kernel `axes` of `layer`, 1 along the others.

    Args:
        sizes: channels in and out.
        layer: whose kernel size, stride, padding, dilation and padding mode are used along `axes`.
        axes: indices of kernel axes.
        groups: groups of the new convolution.
        bias: whether it has one.
    """
    if layer.kind == "GroupedLinear":
        return empty(GroupedLinear, *sizes, groups=groups, bias=bias)
    dims = len(layer.kernel)
    pads = [layer.padding[a] if a in axes else (0, 0) for a in range(dims)]
    settings: dict[str, Any] = {
        "kernel_size": tuple(layer.kernel[a] if a in axes else 1 for a in range(dims)),
        "stride": tuple(layer.stride[a] if a in axes else 1 for a in range(dims)),
        "dilation": tuple(layer.dilation[a] if a in axes else 1 for a in range(dims)),
        # only padding="same" with an even kernel pads unevenly
        "padding": "same" if any(left != right for left, right in pads) else tuple(left for left, _ in pads),
        "padding_mode": layer.padding_mode,
        "groups": groups,
        "bias": bias,
    }
    return empty(CONVOLUTIONS[dims], *sizes, **settings)


def chain_cost(layer: Layer, parts: Sequence[tuple[int, int]]) -> Cost:
    """Cost of layers in a row that replace `layer`: (weights, output positions in the example) of each.

    A bias of the original stays, on the last of them. Every weight meets every position of its layer once per
    output channel group, so MACs are weights times positions.
    """
    params = sum(weights for weights, _ in parts) + (layer.weight[0] if layer.bias else 0)
    macs = layer.per_sample(sum(weights * places for weights, places in parts))
    return Cost(params, params, macs, params * layer.itemsize)


def output_places(layer: Layer) -> int:
    """Output positions of all calls in the example."""
    return layer.positions


def input_places(layer: Layer) -> int:
    """Input positions of all calls in the example: where a 1 x 1 convolution before the kernel runs."""
    return sum(math.prod(call.input) for call in layer.calls) // (layer.weight[1] * layer.groups)


RECURRENT_WEIGHTS = (
    "recurrent weights are not factorized: torch's kernels take them whole, or, as proj_size of an LSTM, with outputs "
    "that are projected, too, for which ONNX has no form"
)
"""Why weights that are used at every step stay as they are."""


def refuse_layer(layer: Layer) -> str | None:
    """Why no factorization applies to a layer, or None."""
    if layer.skip is not None:
        return layer.skip
    if layer.kind == "StateLinear":
        return RECURRENT_WEIGHTS
    if layer.kind not in {"Linear", "GroupedLinear"} and not (layer.kind.startswith("Conv") and layer.kernel):
        return f"{layer.kind} is not factorized"
    return None


def dense_layer(layer: Layer) -> nn.Module:
    """A layer of the given shape and settings with uninitialized weights."""
    if layer.kind == "Linear":
        return linear(layer.weight[1], layer.weight[0], bias=layer.bias)
    sizes = (layer.weight[1] * layer.groups, layer.weight[0])
    return conv(sizes, layer, range(len(layer.kernel)), groups=layer.groups, bias=layer.bias)


def random_layer(layer: Layer) -> nn.Module:
    """A layer of the given shape and settings with seeded random weights, for exact cases."""
    built = dense_layer(layer)
    generator = torch.Generator().manual_seed(0)
    for parameter in built.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return built

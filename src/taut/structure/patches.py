"""Rows of a layer seen as a matrix product: the inputs of chosen output positions, and the outputs there."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvTransposeNd

from taut.core.modes import generator
from taut.decompose import linalg
from taut.errors import ModelError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d

SMALLEST, LARGEST = 1e-12, 1e12
"""Sizes of a layer's largest weight between which sums of squares are safe in float32."""

PIECE = 1 << 19
"""Numbers that are gathered at once, which a processor's cache holds."""

PAD_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a layer.

    Raises:
        ModelError: it has none.
    """
    if not isinstance(module.weight, Tensor):
        raise ModelError(f"A {type(module).__name__} without a weight tensor cannot be rewritten.")
    return module.weight


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias of a layer, if there is one."""
    return module.bias if isinstance(module.bias, Tensor) else None


def groups_of(module: nn.Module) -> int:
    """Groups of a convolution; 1 for a Linear."""
    groups = getattr(module, "groups", 1)
    return groups if isinstance(groups, int) else 1


def grouped_weight(module: nn.Module) -> Tensor:
    """The weight as (g, o, c, s): groups, outputs and inputs per group, kernel offsets; at least float32.

    In float64 where the squares of the largest weights leave the range of float32. Of a transposed convolution, too.
    """
    weight = weight_of(module).detach()
    weight = weight if weight.dtype == torch.float64 else weight.float()
    largest = float(torch.linalg.vector_norm(weight, torch.inf)) if weight.numel() else 1.0
    weight = weight.double() if not SMALLEST < largest < LARGEST and largest else weight
    groups = groups_of(module)
    grouped = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return grouped.transpose(1, 2) if isinstance(module, _ConvTransposeNd) else grouped


def positions(module: nn.Module, output: Tensor) -> int:
    """How many rows an output has: samples times output positions."""
    return output.numel() // weight_of(module).shape[0]


def choose(total: int, rows: int, seed: int) -> Tensor:
    """`rows` of `total` positions at random, ascending; all of them where there are no more."""
    if rows >= total:
        return torch.arange(total)
    random = generator(seed)
    if rows * 8 > total:
        return torch.randperm(total, generator=random)[:rows].sort().values
    return torch.randint(total, (rows,), generator=random).sort().values


def input_rows(module: nn.Module, x: Tensor, output: Tensor, index: Tensor) -> Tensor:
    """Unfolded inputs (g, rows, c s) of the output positions `index`; at least float32.

    Nothing is unfolded but the rows asked for, so memory is rows times fan-in, and the input's once more where it is
    padded or where many rows of overlapping windows are asked for.
    """
    x = x.detach()
    if not isinstance(module, CONVOLUTIONS):
        rows = x.reshape(-1, x.shape[-1])[index.to(x.device)]
        return _at_least_float(rows)[None]
    axes = weight_of(module).ndim - 2
    x = x if x.ndim == axes + 2 else x[None]
    if any(module._reversed_padding_repeated_twice):
        x = functional.pad(x, list(module._reversed_padding_repeated_twice), PAD_MODES[module.padding_mode])
    size = output.shape[2:] if output.ndim == axes + 2 else output.shape[1:]
    places = torch.unravel_index(index.to(x.device), (len(x), *size))
    taps = math.prod(weight_of(module).shape[2:])
    if taps > 1 and taps * len(index) > x[:, 0].numel():
        return _copied_by_taps(module, x, places).flatten(2)
    rows = _at_least_float(_copied_from_windows(module, x, places))
    groups, channels = groups_of(module), weight_of(module).shape[1]
    return rows.reshape(len(rows), groups, channels, taps).transpose(0, 1).flatten(2).contiguous()


def _copied_from_windows(module: Convolution, padded: Tensor, places: tuple[Tensor, ...]) -> Tensor:
    """Windows (rows, C, s) at output places (sample, *position), through a view (N, *out, C, *kernel)."""
    first, channel, *strides = padded.stride()
    moved = [step * stride for step, stride in zip(module.stride, strides, strict=True)]
    taps = [step * stride for step, stride in zip(module.dilation, strides, strict=True)]
    kernel = weight_of(module).shape[2:]
    spans = [step * (taps - 1) for step, taps in zip(module.dilation, kernel, strict=True)]
    size = [(n - span - 1) // step + 1 for n, span, step in zip(padded.shape[2:], spans, module.stride, strict=True)]
    view = padded.as_strided([len(padded), *size, padded.shape[1], *kernel], [first, *moved, channel, *taps])
    return view[places].flatten(2)


def _copied_by_taps(module: Convolution, padded: Tensor, places: tuple[Tensor, ...]) -> Tensor:
    """The same as (g, rows, c, s): all channels of one tap lie together, which copies several times faster."""
    start, offsets = places[0], torch.zeros(1, dtype=torch.long, device=padded.device)
    for axis, extent in enumerate(padded.shape[2:]):
        start = start * extent + places[axis + 1] * module.stride[axis]
        taps = torch.arange(weight_of(module).shape[axis + 2], device=padded.device) * module.dilation[axis]
        offsets = (offsets[:, None] * extent + taps).flatten()
    last, shape = padded.movedim(1, -1).flatten(0, -2), (len(offsets), groups_of(module), weight_of(module).shape[1])
    dtype = torch.float64 if padded.dtype == torch.float64 else torch.float32
    rows = padded.new_empty(shape[1], len(start), shape[2], shape[0], dtype=dtype)
    size = max(1, PIECE // math.prod(shape))
    for first in range(0, len(start), size):
        some = start[first : first + size, None] + offsets
        chosen = last.index_select(0, some.flatten()).reshape(len(some), *shape)
        rows[:, first : first + size] = chosen.permute(2, 0, 3, 1)
    return rows


def output_rows(module: nn.Module, output: Tensor, index: Tensor | None = None) -> Tensor:
    """Outputs (or their gradients) as (g, rows, o), at the positions `index` or at all; at least float32."""
    output = output.detach()
    if not isinstance(module, nn.Linear):
        axes = weight_of(module).ndim - 2
        output = output.movedim(-axes - 1, -1)
    rows = output.reshape(-1, output.shape[-1])
    rows = _at_least_float(rows if index is None else rows[index.to(rows.device)])
    groups = groups_of(module)
    return rows.reshape(len(rows), groups, -1).transpose(0, 1).contiguous()


def _at_least_float(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def row_budget(columns: int, total: int, per_column: int = 12, least: int = 8192, max_bytes: int = 1 << 28) -> int:
    """How many rows determine a second moment of `columns`: `per_column` times as many, within `max_bytes`."""
    return min(total, max(per_column * columns, least), max(256, max_bytes // (4 * max(columns, 1))))


def gram(rows: Tensor) -> Tensor:
    """rows^T rows per group, (g, k, k), in float64."""
    with torch.autocast(rows.device.type, enabled=False):  # a model may run under autocast: sums in half lose too much
        return linalg.gram(rows.mT).double()


def fan_in(module: nn.Module) -> int:
    """Columns of the unfolded input of one group."""
    return math.prod(weight_of(module).shape[1:])

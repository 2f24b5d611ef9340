"""The taps of a convolution's kernel that ever meet something else than zero padding."""

from __future__ import annotations

import torch
from torch import Tensor

from taut.types import Layer


def live_taps(layer: Layer, extents: list[Tensor] | None) -> tuple[tuple[int, int], ...]:
    """Per kernel axis the range of taps that some output position places on something else than zero padding."""
    if layer.skip is not None or not layer.kernel or not layer.calls:
        return ()
    ranges = []
    for axis, taps in enumerate(layer.kernel):
        sizes = {(call.input[axis - len(layer.kernel)], call.output[axis - len(layer.kernel)]) for call in layer.calls}
        mask = None if extents is None or len(sizes) > 1 else extents[axis]
        alive = [k for k in range(taps) if any(_sees(layer, axis, k, *size, mask) for size in sizes)]
        ranges.append((alive[0], alive[-1] + 1) if alive else (0, taps))
    return tuple(ranges)


def _sees(layer: Layer, axis: int, tap: int, size: int, outputs: int, mask: Tensor | None) -> bool:
    if layer.padding_mode != "zeros":
        return True
    offset = tap * layer.dilation[axis] - layer.padding[axis][0]
    places = torch.arange(outputs) * layer.stride[axis] + offset
    places = places[(places >= 0) & (places < size)]
    return bool(len(places)) and (mask is None or len(mask) != size or bool(mask[places.to(mask.device)].any()))

"""Which rows of a layer come from real positions of sequences, and not from padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taut.core.example import Example
from taut.core.padding import real_positions, real_rows
from taut.structure.patches import CONVOLUTIONS, weight_of
from taut.types import Layer


class Padding:
    """What of one batch is padding.

    Attributes:
        masks: (samples, positions), true where a position is real; none where all are.
    """

    def __init__(self, example: Example, inputs: Any) -> None:
        """Read the masks among `inputs`."""
        self.example = example
        self.masks = real_positions(example, inputs)

    def rows(self, module: nn.Module, output: Tensor) -> Tensor | None:
        """The numbers of a layer's output positions that are real, ascending; None where all are."""
        real = self.of(_sizes(module, output.shape)) if self.masks else None
        return None if real is None else real.nonzero()[:, 0]

    def of(self, sizes: Sequence[int]) -> Tensor | None:
        """Of positions along these axes, flat, whether each is real; None where all are."""
        return real_rows(self.example, self.masks, sizes) if self.masks else None

    def of_channels(self, x: Tensor) -> Tensor | None:
        """Of what a batch norm sees (sample, channel, ...), whether each position is real; None where all are."""
        sizes = (x.shape[0], *x.shape[2:])
        real = self.of(sizes)
        return None if real is None else real.reshape(sizes).to(x.device)


def _sizes(module: nn.Module, shape: Sequence[int]) -> Sequence[int]:
    """The axes of a layer's output but that of its channels."""
    if not isinstance(module, CONVOLUTIONS):
        return shape[:-1]
    axes = weight_of(module).ndim - 2
    return (shape[0], *shape[2:]) if len(shape) == axes + 2 else shape[1:]


def real_share(example: Example, batches: Sequence[tuple[Any, Any]]) -> Callable[[Layer], float]:
    """For a layer the real positions of all batches over those that it would have at the length of the example.

    1 for a layer whose positions are not those of the masks.
    """
    masks = _masks(example, example.value)
    if not masks:
        return lambda _: 1.0
    real = length = 0
    for inputs, _ in batches:
        mask = next(iter(_masks(example, inputs)), None)
        samples = example.samples.size(inputs)
        real += int(mask.sum()) if mask is not None else samples * masks[0][0].numel()
        length += samples * masks[0][0].numel()
    share = real / max(length, 1)

    def of(layer: Layer) -> float:
        calls = [call.output for call in layer.calls]
        sizes = [c[:-1] if len(layer.weight) == 2 else (c[0], *c[2:]) for c in calls if len(c) > 1]
        padded = bool(sizes) and all(real_rows(example, [torch.zeros_like(masks[0])], s) is not None for s in sizes)
        return share if padded else 1.0

    return of


def _masks(example: Example, inputs: Any) -> tuple[Tensor, ...]:
    return real_positions(example, inputs, always=True)

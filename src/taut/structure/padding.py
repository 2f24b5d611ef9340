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
        masks: by name, (samples, positions), true where a position is real; none where all are.
    """

    def __init__(self, example: Example, inputs: Any) -> None:
        """Read the masks among `inputs`."""
        self.example = example
        self.masks = real_positions(example, inputs)

    def rows(self, name: str, module: nn.Module, output: Tensor) -> Tensor | None:
        """The numbers of a layer's output positions that are real, ascending; None where all are."""
        real = self.of(name, sizes_of(module, output.shape)) if self.masks else None
        return None if real is None else real.nonzero()[:, 0]

    def of(self, name: str, sizes: Sequence[int]) -> Tensor | None:
        """Of a layer's positions along these axes, flat, whether each is real; None where all are."""
        return real_rows(self.example, self.masks, tuple(sizes), name) if self.masks else None

    def of_channels(self, name: str, x: Tensor) -> Tensor | None:
        """Of what a batch norm sees (sample, channel, ...), whether each position is real; None where all are."""
        sizes = (x.shape[0], *x.shape[2:])
        real = self.of(name, sizes)
        return None if real is None else real.reshape(sizes).to(x.device)


def sizes_of(module: nn.Module, shape: Sequence[int]) -> Sequence[int]:
    """The axes of a layer's output but that of its channels."""
    if not isinstance(module, CONVOLUTIONS):
        return shape[:-1]
    axes = weight_of(module).ndim - 2
    return (shape[0], *shape[2:]) if len(shape) == axes + 2 else shape[1:]


def real_share(example: Example, batches: Sequence[tuple[Any, Any]]) -> Callable[[Layer], float]:
    """For a layer the real positions of all batches over those that it would have at the length of the example.

    1 for a layer whose positions are not those of a mask; where several masks speak of it, the largest of their shares.
    """
    masks = _masks(example, example.value)
    shares = {key: real / max(length, 1) for key, (real, length) in counts(example, batches).items()}

    def of(layer: Layer) -> float:
        calls = [call.output for call in layer.calls]
        sizes = [c[:-1] if len(layer.weight) == 2 else (c[0], *c[2:]) for c in calls if len(c) > 1]
        spoken = [key for key, mask in masks.items() if sizes and all(_speaks(key, mask, s, layer.name) for s in sizes)]
        return max((shares[key] for key in spoken), default=1.0)

    def _speaks(key: str, mask: Tensor, sizes: tuple[int, ...], name: str) -> bool:
        return real_rows(example, {key: torch.zeros_like(mask)}, sizes, name) is not None

    return of


def counts(example: Example, batches: Sequence[tuple[Any, Any]]) -> dict[str, tuple[int, int]]:
    """For every mask of the example the real positions of all batches, and those that the example's length makes."""
    totals = dict.fromkeys(masks := _masks(example, example.value), (0, 0))
    for inputs, _ in batches if totals else ():
        held, samples = _masks(example, inputs), example.samples.size(inputs)
        for key, (real, length) in totals.items():
            whole = samples * masks[key][0].numel()
            totals[key] = (real + (int(held[key].sum()) if key in held else whole), length + whole)
    return totals


def tallied(example: Example, batches: Sequence[tuple[Any, Any]]) -> dict[str, tuple[int, int]]:
    """For every mask the real positions of all batches, and all that it speaks of; none where nothing is padding."""
    totals: dict[str, tuple[int, int]] = {}
    for inputs, _ in batches:
        for key, mask in _masks(example, inputs).items():
            real, whole = totals.get(key, (0, 0))
            totals[key] = (real + int(mask.sum()), whole + mask.numel())
    return {key: (real, whole) for key, (real, whole) in totals.items() if real < whole}


def _masks(example: Example, inputs: Any) -> dict[str, Tensor]:
    return real_positions(example, inputs, always=True)

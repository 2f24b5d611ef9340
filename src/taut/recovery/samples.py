"""How many samples a refit takes, and these as one batch."""

from __future__ import annotations

from typing import Any

import torch

from taut.calls import Example
from taut.types import Network

SAMPLES = 2048
"""Samples of a refit at most."""

ACTIVATION_BYTES = 400 << 20
"""Bytes that the inputs and outputs of the largest layer may take together; bounds the samples of a refit."""

FEW_ROWS = 1024
"""Output positions of that layer below which a sample tells little: then twice as many bytes are allowed."""

ROWS_PER_COLUMN = 40
"""Output positions that a refit uses for every input of a layer."""


def refit_samples(net: Network) -> int:
    """max(256, 40 K / T) over the layers, at most 2,048 and what the largest activation allows."""
    free = [layer for layer in net.layers if layer.skip is None and layer.positions]
    wanted, largest, room = 256, 1, ACTIVATION_BYTES
    for layer in free:
        fan = layer.params // max(layer.weight[0], 1)
        wanted = max(wanted, ROWS_PER_COLUMN * fan * layer.batch // layer.positions)
        sizes = [torch.Size(call.input).numel() + torch.Size(call.output).numel() for call in layer.calls]
        size = layer.itemsize * max(sizes) // layer.batch
        if size > largest:
            largest, room = size, ACTIVATION_BYTES * (2 if layer.positions < FEW_ROWS * layer.batch else 1)
    return max(8, min(wanted, SAMPLES, room // max(largest, 1)))


def joined(example: Example, batches: list[tuple[Any, Any]]) -> Any:
    """All batches that may be joined with the first, as one batch of inputs."""
    mark = example.samples.signature(batches[0][0])
    return example.samples.joined([b for b, _ in batches if example.samples.signature(b) == mark])

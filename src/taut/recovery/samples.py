"""How many samples a refit takes, and these in as few batches as the model takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from taut.core.data import collect
from taut.core.example import Example
from taut.core.modes import evaluating
from taut.core.tensors import opened, tensors
from taut.errors import ModelError
from taut.structure.sameness import IN_OTHER_BATCHES, outputs_match
from taut.structure.surgery import shallow
from taut.types import Network

SAMPLES = 2048
"""Samples of a refit at most."""

ACTIVATION_BYTES = 400 << 20
"""Bytes that the inputs and outputs of the largest layer may take together; bounds the samples of a refit."""

FEWEST = 8
"""Samples of a refit at least."""

FEW_ROWS = 1024
"""Output positions of that layer below which a sample tells little: then twice as many bytes are allowed."""

ROWS = 16_384
"""Output positions at most that are noted of a layer of large fan-in."""

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
    return max(FEWEST, min(wanted, SAMPLES, room // max(largest, 1)))


def affordable(example: Example, batches: Sequence[tuple[Any, Any]]) -> list[Any]:
    """The inputs of as many samples as take no more room than these would if they were of the example's size."""
    sizes = [_numel(inputs) / example.samples.size(inputs) for inputs, _ in batches]
    larger = max(1.0, max(sizes) / max(_numel(example.value) / example.batch, 1))
    total = sum(example.samples.size(inputs) for inputs, _ in batches)
    return [inputs for inputs, _ in collect(example, list(batches), max(FEWEST, int(total / larger)))]


def _numel(inputs: Any) -> int:
    return sum(t.numel() for t in tensors(inputs))


def joined(example: Example, model: nn.Module, batches: Sequence[Any]) -> list[Any]:
    """The same samples in as few batches as the model takes: joined where it then gives each the same.

    Args:
        example: how the model is called.
        model: is run on two batches of every kind, apart and joined.
        batches: inputs, of any sizes.
    """
    kinds: dict[Any, list[Any]] = defaultdict(list)
    for inputs in batches:
        kinds[example.samples.signature(inputs)].append(inputs)
    groups: list[Any] = []
    for alike in kinds.values():
        apart = len(alike) == 1 or not example.divisible or not _joinable(example, model, alike[:2])
        groups += alike if apart else [example.samples.joined(alike)]
    return groups


def _joinable(example: Example, model: nn.Module, pair: Sequence[Any]) -> bool:
    """Whether two batches give joined what they give apart."""
    copied, samples = shallow(model), example.samples
    sizes = [samples.size(inputs) for inputs in pair]
    try:
        with evaluating(copied):
            apart = [opened(example.run(copied, inputs)) for inputs in pair]
            both = opened(example.run(copied, samples.joined(pair)))
    except ModelError:
        return False
    whole, first = sum(sizes), sizes[0]
    halves = (samples.part(both, slice(first), whole), samples.part(both, slice(first, whole), whole))
    return all(outputs_match(one, half, IN_OTHER_BATCHES) for one, half in zip(apart, halves, strict=True))

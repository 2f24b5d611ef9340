"""Linear quantization: weights of eight bits, a scale per output channel."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from taut.decompose.quantization import LEVELS, rounded
from taut.methods.compact_weights.compact import Stored, dense_macs
from taut.methods.layer_factory import dense_layer, random_layer
from taut.nn.quantized import Int8Weight
from taut.structure.patches import grouped_weight, weight_of
from taut.structure.statistics import LayerStatistics
from taut.types import Cost, Group, Layer

SCALES = ("search", "max")


@dataclass(frozen=True)
class Int8(Stored):
    """W[o] ~ s[o] Q[o] with whole numbers of -127 ... 127: a quarter of the bytes of float32.

    It buys bytes, not milliseconds: inputs stay floating, and the weight is made floating at every call. Zeros stay
    zeros. `params` grows by the scales, so that its steps need `allow_growth`; which weights round to zero is not known
    before: `nonzero` of the cost counts them all.

    Source: symmetric linear quantization per channel, as in Krishnamoorthi 2018, quantizing deep convolutional networks
    for efficient inference.

    Attributes:
        scale: "search": of several clippings, with the best scale for each, the one of least error in the metric;
            "max": max |w| / 127.
        metric: "data" or "frobenius", of the search.
    """

    scale: str = "search"
    metric: str = "data"
    name: ClassVar[str] = "int8"

    def built(self, layer: Layer) -> Int8Weight:
        """Whole numbers that are all zero."""
        self.must("scale", self.scale in SCALES, f"one of {', '.join(SCALES)}", layer)
        values = torch.zeros(layer.weight, dtype=torch.int8)
        return Int8Weight(dense_layer(layer), values, nn.Parameter(torch.empty(layer.weight[0])))

    def tensors(self, module: nn.Module, stats: LayerStatistics) -> Mapping[str, Tensor]:
        """Whole numbers and scales."""
        values, scales = rounded(grouped_weight(module), stats.weighting, search=self.scale == "search")
        return {"values": values.reshape(weight_of(module).shape), "scales": scales.flatten()}

    def cost(self, group: Group) -> Cost:
        """A byte per weight, and the scales."""
        layer = group.layer
        self.must("scale", self.scale in SCALES, f"one of {', '.join(SCALES)}", layer)
        weights = math.prod(layer.weight)
        floating = layer.weight[0] * (2 if layer.bias else 1)
        params = weights + floating
        return Cost(params, params, dense_macs(layer), weights + floating * layer.itemsize)

    def exact_case(self, group: Group) -> tuple[Int8, nn.Module] | None:
        """Whole numbers over a power of two, the largest in every row."""
        if self.refuses(group):
            return None
        planted: Any = random_layer(group.layer)
        whole = (40 * planted.weight.data).round().clamp(-LEVELS, LEVELS)
        whole.flatten(1)[:, 0] = LEVELS
        planted.weight.data = whole / 64
        return self, planted

"""Hashed weights: a cheap hash of its place tells each weight which of a few values it has, and with which sign."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from taut.decompose.weighting import RIDGE
from taut.methods.compact_weights.compact import Stored, dense_macs
from taut.methods.factorization import input_rms
from taut.methods.layer_factory import dense_layer, random_layer
from taut.nn.hashed import Hashed as Module
from taut.nn.hashed import hashes
from taut.structure.patches import weight_of
from taut.structure.statistics import LayerStatistics
from taut.types import Cost, Group, Layer


@dataclass(frozen=True)
class Hashed(Stored):
    """W[i, j] = sign(i, j) w[h(i, j)]: weights share few values, at random.

    It buys bytes, not milliseconds: neither hash nor sign is stored, both are computed at every call and the dense
    weight is multiplied. The start is the least-squares one, the mean of the signed weights of every bucket, each
    weighted by the mean square of the input that it meets where calibration data are known. Weights that share a value
    have nothing in common, so that it needs training: the start keeps about `share` of what the layer does.

    Source: Chen, Wilson, Tyree, Weinberger and Chen 2015, compressing neural networks with the hashing trick.

    Attributes:
        share: of the weights that is stored, in (0, 1]; at least one value.
        metric: "data" or "frobenius", of the start.
        seed: of the hash.
    """

    share: float = 0.1
    metric: str = "data"
    seed: int = 0
    name: ClassVar[str] = "hashed"

    def built(self, layer: Layer) -> Module:
        """Values that are not initialized."""
        return Module(dense_layer(layer), nn.Parameter(torch.empty(self._buckets(layer))), self.seed)

    def tensors(self, module: nn.Module, stats: LayerStatistics) -> Mapping[str, Tensor]:
        """The values."""
        W = weight_of(module).detach()
        rms = input_rms(module, stats)
        size = torch.ones_like(W, dtype=torch.float64) if rms is None else rms.double().square().to(W.device)
        mean = size.mean()
        size = (size + torch.where(mean > 0, RIDGE * mean, 1.0)).flatten()
        buckets = self._count(W.numel())
        bucket, negative = hashes(W.numel(), buckets, self.seed, W.device)
        sums = size.new_zeros(2, buckets)
        sums[0].index_add_(0, bucket, size * (1 - 2 * negative) * W.double().flatten())
        sums[1].index_add_(0, bucket, size)
        return {"values": sums[0] / torch.where(sums[1] > 0, sums[1], 1.0)}

    def cost(self, group: Group) -> Cost:
        """The values; those that no weight is hashed to are zero."""
        layer, buckets = group.layer, self._buckets(group.layer)
        bias = layer.weight[0] if layer.bias else 0
        read = int(torch.bincount(hashes(math.prod(layer.weight), buckets, self.seed)[0]).count_nonzero())
        return Cost(buckets + bias, read + bias, dense_macs(layer), (buckets + bias) * layer.itemsize)

    def _buckets(self, layer: Layer) -> int:
        """How many values.

        Raises:
            CallError: a setting is out of range.
        """
        self.must("share", type(self.share) in {int, float} and 0 < self.share <= 1, "in (0, 1]", layer)
        self.must("seed", type(self.seed) is int and 0 <= self.seed < 1 << 31, "between 0 and 2147483647", layer)
        return self._count(math.prod(layer.weight))

    def _count(self, size: int) -> int:
        return max(1, round(self.share * size))

    def exact_case(self, group: Group) -> tuple[Hashed, nn.Module] | None:
        """A layer whose weights share values by the very same hash."""
        if self.refuses(group):
            return None
        method, planted = replace(self, share=0.5), random_layer(group.layer)
        weight: Any = planted.weight
        weight.data = Module(
            dense_layer(group.layer), nn.Parameter(weight.data.flatten()[: method._buckets(group.layer)]), self.seed
        ).dense()
        return method, planted

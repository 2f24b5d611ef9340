"""Product and vector quantization: short pieces of the rows of a weight, each one of a few."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from taut.decompose.quantization import block_moments, quantized, quantized_together
from taut.methods.compact_weights.compact import Stored, stored_cost
from taut.methods.factorization import integer
from taut.methods.layer_factory import dense_layer, random_layer
from taut.nn.codebook import Codebook as Module
from taut.nn.codebook import code_bits, packed
from taut.structure.patches import weight_of
from taut.structure.statistics import LayerStatistics
from taut.types import Cost, Group, Layer

MOST = 256
"""Entries of a codebook at most: a code is a byte."""


@dataclass(frozen=True)
class Codebook(Stored):
    """Every row of the weight in pieces of `block` columns, each replaced by the nearest of `codes` entries.

    It buys bytes, not milliseconds: codes of 1, 2, 4 or 8 bits and a codebook are stored, the dense weight is gathered
    at every call, so that MACs are those of the layer. The codebook can be trained. Codes are no parameters: they count
    as bytes alone.

    In the metric of the data the pieces of a block are clustered by the output error that they make on their own,
    (a - b) A_b (a - b)^T, with A_b the second moment of the block's inputs (mean over the groups of a convolution).

    Source: Jegou, Douze and Schmid 2011, product quantization for nearest neighbor search; Gong, Liu, Yang and Bourdev
    2014, compressing deep convolutional networks using vector quantization; Stock et al. 2020, and the bit goes down.

    Attributes:
        block: columns c s (inputs times kernel offsets) per code; the last block of a row may be shorter.
        codes: entries k of a codebook, at most 256 and the number of pieces. With as many as there are distinct pieces
            the layer is exact.
        shared: one codebook for all blocks (vector quantization), else one per block (product quantization).
        metric: "data" or "frobenius".
        seed: of k-means.
    """

    block: int = 4
    codes: int = 16
    shared: bool = False
    metric: str = "data"
    seed: int = 0
    name: ClassVar[str] = "codebook"
    packages: ClassVar[tuple[str, ...]] = ("sklearn",)

    def built(self, layer: Layer) -> Module:
        """Codes that are all zero."""
        k, width, blocks = self._sizes(layer)
        codes = torch.zeros(layer.weight[0], blocks, dtype=torch.int64)
        return Module(dense_layer(layer), nn.Parameter(torch.empty(k, width)), codes, self.block)

    def tensors(self, module: nn.Module, stats: LayerStatistics) -> Mapping[str, Tensor]:
        """Codebook and packed codes."""
        weight = weight_of(module).detach()
        columns, taps = math.prod(weight.shape[1:]), math.prod(weight.shape[2:])
        moments = block_moments(stats.weighting, taps, columns, self.block)
        solve = quantized_together if self.shared else quantized
        codebook, codes = solve(weight.flatten(1), self.block, self.codes, moments, self.seed)
        return {"codebook": codebook, "codes": packed(codes, code_bits(self.codes))}

    def cost(self, group: Group) -> Cost:
        """The codebook, and the bytes of the codes."""
        k, width, blocks = self._sizes(group.layer)
        return stored_cost(group.layer, k * width, math.ceil(group.layer.weight[0] * blocks * code_bits(k) / 8))

    def _sizes(self, layer: Layer) -> tuple[int, int, int]:
        """Entries, columns of the codebook, and blocks.

        Raises:
            CallError: a setting is out of range.
        """
        columns = math.prod(layer.weight[1:])
        block = integer(self.name, "block", self.block, columns, layer)
        blocks = math.ceil(columns / block)
        self.must("shared", type(self.shared) is bool, "true or false", layer)
        self.must("seed", type(self.seed) is int and 0 <= self.seed < 1 << 32, "between 0 and 4294967295", layer)
        pieces = layer.weight[0] * (blocks if self.shared else 1)
        k = integer(self.name, "codes", self.codes, min(MOST, pieces), layer)
        return k, block if self.shared else columns, blocks

    def exact_case(self, group: Group) -> tuple[Codebook, nn.Module] | None:
        """A layer of few distinct rows."""
        if self.refuses(group):
            return None
        rows, columns = group.layer.weight[0], math.prod(group.layer.weight[1:])
        method = replace(self, block=max(1, 2 * columns // 3), codes=min(4, rows))
        planted: Any = random_layer(group.layer)
        planted.weight.data = planted.weight.data[torch.arange(rows) % method.codes]
        return method, planted

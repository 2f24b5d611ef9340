"""Adaptive Fastfood: a Linear as diagonals between Walsh-Hadamard transforms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from taut.decompose.fastfood import Block
from taut.methods.compact_weights.compact import Stored
from taut.methods.layer_factory import dense_layer, random_layer
from taut.nn.fastfood import Fastfood as Module
from taut.nn.fastfood import padded_size, permutations
from taut.structure.patches import weight_of
from taut.structure.statistics import LayerStatistics
from taut.types import Cost, Group, Layer


@dataclass(frozen=True)
class Fastfood(Stored):
    """W ~ blocks of S H G P H B: three trained diagonals, a fixed permutation P, Walsh-Hadamard transforms H.

    With n the power of two that holds the inputs and m = ceil(outputs / n) blocks it stores outputs + m n + m inputs
    numbers. The cost counts no multiply-accumulates, as torch's counter sees matrix products alone; what is not counted
    are 2 m n log2 n additions and m (inputs + n) + outputs products per position.

    Random G and B (normal, +-1) are the source's; S, and for n up to 1,024 G, B and S in turns, are then solved by
    least squares. Few numbers cannot be near a trained matrix: it needs training.

    Source: Yang et al. 2015, deep fried convnets; Le, Sarlos and Smola 2013, fastfood.

    Attributes:
        metric: "data" or "frobenius", of the start.
        seed: of P, and of the first G and B.
    """

    metric: str = "data"
    seed: int = 0
    name: ClassVar[str] = "fastfood"

    def refuses_layer(self, layer: Layer) -> str | None:
        """Linear layers alone."""
        return None if layer.kind == "Linear" else "fastfood: it transforms vectors, convolutions are left as they are"

    def built(self, layer: Layer) -> Module:
        """Diagonals that are not initialized.

        Raises:
            CallError: the seed is out of range.
        """
        self._check(layer)
        return Module(cast(nn.Linear, dense_layer(layer)), self.seed)

    def _check(self, layer: Layer) -> None:
        self.must("seed", type(self.seed) is int and 0 <= self.seed < 1 << 31, "between 0 and 2147483647", layer)

    def tensors(self, module: nn.Module, stats: LayerStatistics) -> Mapping[str, Tensor]:
        """The three diagonals."""
        W = weight_of(module).detach().double()
        size = padded_size(W.shape[1])
        full = stats.weighting.full
        A = torch.eye(W.shape[1]).to(W) if full is None else stats.weighting.regular()[0].to(W)
        G, B = self._start(len(W), W.shape[1])
        orders = permutations(len(G), size, self.seed, W.device)
        found = [
            Block(rows, A, order, torch.ones(len(rows)).to(W), g.to(W), b.to(W))
            for rows, order, g, b in zip(torch.split(W, size), orders, G, B, strict=True)
        ]
        for block in found:
            block.solve()
        return {
            "S": torch.cat([block.S for block in found]),
            "G": torch.stack([block.G for block in found]),
            "B": torch.stack([block.B for block in found]),
        }

    def _start(self, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
        """Random G (m, n), normal, and B (m, inputs), +-1."""
        size = padded_size(inputs)
        blocks = math.ceil(outputs / size)
        generator = torch.Generator().manual_seed(self.seed)
        B = torch.randint(0, 2, (blocks, inputs), generator=generator) * 2 - 1
        return torch.randn(blocks, size, generator=generator), B

    def cost(self, group: Group) -> Cost:
        """The diagonals; no matrix is multiplied."""
        layer = group.layer
        self._check(layer)
        outputs, inputs = layer.weight
        blocks = math.ceil(outputs / padded_size(inputs))
        params = outputs + blocks * (padded_size(inputs) + inputs) + (outputs if layer.bias else 0)
        return Cost(params, params, 0, params * layer.itemsize)

    def exact_case(self, group: Group) -> tuple[Fastfood, nn.Module] | None:
        """A layer with the G and B of the start."""
        if self.refuses(group):
            return None
        planted: Any = random_layer(group.layer)
        module = self.built(group.layer).double()
        outputs, inputs = module.shape
        G, B = self._start(outputs, inputs)
        module.S.data, module.G.data, module.B.data = torch.linspace(1, 2, outputs).double(), G.double(), B.double()
        planted.weight = nn.Parameter(module.dense().detach())
        return self, planted

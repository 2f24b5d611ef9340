"""Biclustering with outer products: grouped 1 x 1, depthwise kernel, grouped 1 x 1."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from taut.decompose.bicluster import Biclusters, bicluster, rank_one_terms, solve_last
from taut.decompose.cp import levelled
from taut.methods.clustered.clusters import BlockFactors, Blocks, Fit, exact_numbers
from taut.methods.factorization import integer
from taut.methods.layer_factory import chain_cost, conv, input_places, output_places, random_layer
from taut.types import Cost, Group, Layer

SIZES = (2, 4)
"""Inputs per cluster on offer."""

RANKS = (4, 8, 12, 16)


@dataclass(frozen=True)
class Outer(Blocks):
    """Inputs in G clusters, outputs in H; each of the G H blocks of the kernel becomes a sum of K outer products.

    Weights G H K (C / G + S + F / H), the first factor at the input's positions.
    Source: Denton et al. 2014, sections 3.2.2 and 3.4.

    Attributes:
        inputs: G, a divisor of the inputs; None until resolved.
        outputs: H, a divisor of the outputs; None until resolved.
        rank: K, terms per block; None until resolved.
        metric: "data", "fisher", "mahalanobis" or "frobenius".
        distance: of the clusters, "projection" or "euclidean".
        paper: terms one after the other, no joint last solve.
        reorders: "i", "o" or both, where channels still have to be brought into the order of the clusters.
    """

    inputs: int | None = None
    outputs: int | None = None
    rank: int | None = None
    metric: str = "data"
    distance: str = "projection"
    paper: bool = False
    reorders: str = "io"
    name: ClassVar[str] = "outer"

    def refuses_layer(self, layer: Layer) -> str | None:
        """As all; and calls without a batch, whose channels torch's ChannelShuffle would not find."""
        refused = super().refuses_layer(layer)
        if refused is None and any(len(call.input) != len(layer.kernel) + 2 for call in layer.calls):
            return "outer: needs inputs with a batch"
        return refused

    def family(self) -> str:
        """Clusters by another distance are others."""
        return f"{super().family()}/{self.distance}"

    def fit(self, factors: BlockFactors) -> Fit:
        """Three layers; terms ordered by input cluster in the first, by output cluster in the others."""
        sight = factors.sight
        W, G, H, k = sight.W[0], self.inputs or 1, self.outputs or 1, self.rank or 1
        found: Biclusters = factors.once(
            (G, H), lambda: bicluster(W, G, H, sight.weighting, sight.response, self.distance)
        )
        metric, B = found.metric(sight.weighting, sight.response)
        a, b, c = rank_one_terms(found.blocks(W), k, metric, B, paper=self.paper)
        if not self.paper:
            c = solve_last(found, W, torch.einsum("nck,nsk->nkcs", a, b), sight.weighting)
            a, b, c = levelled((a, b, c))
        blocks = torch.einsum("nck,nsk,nok->nocs", a, b, c)
        first = a.mT.reshape(H, G, k, -1).transpose(0, 1)  # (G, H, K, C / G)
        middle = b.mT.reshape(H, G, k, -1).transpose(1, 2)  # (H, K, G, S), as the shuffle orders them
        last = c.reshape(H, G, -1, k).permute(0, 2, 3, 1)  # (H, F / H, K, G)
        weights = first.flatten(0, 2), middle.flatten(0, 2), last.flatten(0, 1).flatten(1)
        return Fit(found.whole(blocks), weights, found.inputs, found.outputs)

    def candidates(self, group: Group, factors: object) -> Sequence[Outer]:
        """Clusters of two or four inputs, one or two of outputs."""
        del factors
        return self.worthwhile(group, self._options(group.layer))

    def _options(self, layer: Layer) -> Iterator[Outer]:
        outputs, inputs = layer.weight[:2]
        for size in SIZES:
            for n in (1, 2):
                if inputs % size == 0 and outputs % n == 0 and outputs >= 2 * n:
                    made = replace(self, inputs=inputs // size, outputs=n)
                    yield from (replace(made, rank=rank) for rank in RANKS if rank <= made._most(layer))

    def skeleton(self, group: Group) -> Mapping[str, nn.Module]:
        """Three convolutions; between the first two torch's ChannelShuffle, where both sides have clusters."""
        layer = group.layer
        G, H, k = self._sizes(layer)
        n = G * H * k
        first = conv((layer.weight[1], n), layer, (), groups=G, bias=False)
        middle = conv((n, n), layer, range(len(layer.kernel)), groups=n, bias=False)
        last = conv((n, layer.weight[0]), layer, (), groups=H, bias=layer.bias)
        return {layer.name: self.framed(layer, (first, nn.ChannelShuffle(G), middle, last))}

    def cost(self, group: Group) -> Cost:
        """As the source counts: G H K (C / G) at the input's positions, G H K (S + F / H) at the output's."""
        layer = group.layer
        G, H, k = self._sizes(layer)
        n, places = G * H * k, output_places(layer)
        parts = (
            (n * layer.weight[1] // G, input_places(layer)),
            (n * math.prod(layer.kernel), places),
            (n * layer.weight[0] // H, places),
        )
        return chain_cost(layer, parts)

    def _sizes(self, layer: Layer) -> tuple[int, int, int]:
        G = self.divisor("inputs", self.inputs, layer.weight[1], layer)
        H = self.divisor("outputs", self.outputs, layer.weight[0], layer)
        return G, H, integer(self.name, "rank", self.rank, self._most(layer), layer)

    def _most(self, layer: Layer) -> int:
        """Terms at which any block is exact: the product of its two smaller sides."""
        sides = sorted(
            (layer.weight[1] // (self.inputs or 1), math.prod(layer.kernel), layer.weight[0] // (self.outputs or 1))
        )
        return sides[0] * sides[1]

    def exact_case(self, group: Group) -> tuple[Outer, nn.Module] | None:
        """A layer planted with one term per block, one cluster on either side."""
        if self.refuses(group):
            return None
        layer = group.layer
        module = random_layer(layer)
        weight = module.weight
        if isinstance(weight, torch.Tensor):
            flat = [1] * len(layer.kernel)
            ends = exact_numbers(layer.weight[0], 1, *flat), exact_numbers(1, layer.weight[1], *flat)
            weight.data = ends[0] * ends[1] * weight.data[:1, :1]
        return replace(self, inputs=1, outputs=1, rank=1), module

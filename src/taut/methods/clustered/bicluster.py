"""Biclustering with two SVDs: 1 x 1, the kernel between G H pairs of clusters, grouped 1 x 1."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from taut.decompose.balance import level, orthogonalize
from taut.decompose.bicluster import Biclusters, bicluster, paper_svds, solve_last, two_svds
from taut.methods.clustered.clusters import BlockFactors, Blocks, Fit
from taut.methods.factorization import integer
from taut.methods.layer_factory import chain_cost, conv, input_places, output_places, random_layer, rank_grid
from taut.types import Cost, Group, Layer

CLUSTERS = (2, 4)
RANKS = 6
"""Ranks on offer on either side of the kernel."""


@dataclass(frozen=True)
class Bicluster(Blocks):
    """Inputs in G clusters, outputs in H; each of the G H blocks of the kernel becomes a Tucker-2 of its own.

    The first 1 x 1 layer is dense and so takes any order of the inputs; all but one in G of its weights start at zero.
    Weights C G H K1 + G H K1 S K2 + F G K2 (the source counts C H K1 for the first, without the zeros).
    Source: Denton et al. 2014, sections 3.2.2 and 3.4.

    Attributes:
        inputs: G, a divisor of the inputs; None until resolved.
        outputs: H, a divisor of the outputs; None until resolved.
        rank_in, rank_out: K1 and K2, channels per block before and behind the kernel; None until resolved.
        metric: "data", "fisher", "mahalanobis" or "frobenius".
        distance: of the clusters, "projection" or "euclidean".
        paper: the second SVD without singular values; no joint last solve.
        outputs_first: paper mode in the order of an implementation by others.
        reorders: "o" where the outputs still have to be put back into their order.
    """

    inputs: int | None = None
    outputs: int | None = None
    rank_in: int | None = None
    rank_out: int | None = None
    metric: str = "data"
    distance: str = "projection"
    paper: bool = False
    outputs_first: bool = False
    reorders: str = "o"
    name: ClassVar[str] = "bicluster"
    rank_settings: ClassVar[tuple[str, ...]] = ("rank_in", "rank_out")

    def family(self) -> str:
        """Clusters by another distance are others."""
        return f"{super().family()}/{self.distance}{'/outputs first' if self.outputs_first else ''}"

    def fit(self, factors: BlockFactors) -> Fit:
        """Three layers; blocks stacked output cluster first."""
        sight = factors.sight
        W, G, H, i, o = sight.W[0], self.inputs or 1, self.outputs or 1, self.rank_in or 1, self.rank_out or 1
        found: Biclusters = factors.once(
            (G, H), lambda: bicluster(W, G, H, sight.weighting, sight.response, self.distance)
        )
        metric, B = found.metric(sight.weighting, sight.response)
        if self.paper:
            V, core, U = paper_svds(found.blocks(W), i, o, outputs_first=self.outputs_first)
        else:
            V, core, U = two_svds(found.blocks(W), i, o, metric, B)
        if not self.paper and G > 1:
            U = solve_last(found, W, torch.einsum("nqrs,ncr->nqcs", core, V), sight.weighting)
        blocks = torch.einsum("noq,nqrs,ncr->nocs", U, core, V)
        first, core = orthogonalize(V.mT, core)
        last, flipped = orthogonalize(U.mT, core.transpose(1, 2))
        first, core, last = level(first, flipped.transpose(1, 2), last.mT)
        return Fit(found.whole(blocks), (self._spread(found, first), core, _joined(found, last)), None, found.outputs)

    def _spread(self, found: Biclusters, first: Tensor) -> Tensor:
        """The first layer's rows (H G K1, C) from those of the blocks (H G, K1, C / G)."""
        n, r, size = first.shape
        rows = first.new_zeros(n, r, len(found.inputs))
        for block in range(n):
            g = block % found.G
            rows[block][:, found.inputs[g * size : (g + 1) * size]] = first[block]
        return rows.flatten(0, 1)

    def candidates(self, group: Group, factors: object) -> Sequence[Bicluster]:
        """Two or four clusters on both sides, and ranks that are about the same share of their limits."""
        del factors
        return self.worthwhile(group, self._options(group.layer))

    def _options(self, layer: Layer) -> Iterator[Bicluster]:
        outputs, inputs = layer.weight[:2]
        for n in CLUSTERS:
            if inputs % n or outputs % n or min(inputs, outputs) < 2 * n:
                continue
            made = replace(self, inputs=n, outputs=n)
            for i in rank_grid(made._most_in(layer), RANKS):
                for o in rank_grid(replace(made, rank_in=i)._most_out(layer), RANKS):
                    share = i * (outputs // n) / (o * (inputs // n))
                    if 0.5 <= share <= 2:
                        yield replace(made, rank_in=i, rank_out=o)

    def skeleton(self, group: Group) -> Mapping[str, nn.Module]:
        """Three convolutions, and the order of the outputs."""
        layer = group.layer
        G, H, i, o = self._sizes(layer)
        n, bias = G * H, layer.bias
        first = conv((layer.weight[1], n * i), layer, (), groups=1, bias=False)
        core = conv((n * i, n * o), layer, range(len(layer.kernel)), groups=n, bias=False)
        last = conv((n * o, layer.weight[0]), layer, (), groups=H, bias=bias)
        return {layer.name: self.framed(layer, (first, core, last))}

    def cost(self, group: Group) -> Cost:
        """What is built; the zeros in which the first layer starts are parameters and MACs like others."""
        layer = group.layer
        G, H, i, o = self._sizes(layer)
        places = output_places(layer)
        parts = (
            (layer.weight[1] * G * H * i, input_places(layer)),
            (G * H * i * o * math.prod(layer.kernel), places),
            (layer.weight[0] * G * o, places),
        )
        whole = chain_cost(layer, parts)
        zeros = (G - 1) * parts[0][0] // G
        return replace(whole, nonzero=whole.params - zeros)

    def _sizes(self, layer: Layer) -> tuple[int, int, int, int]:
        G = self.divisor("inputs", self.inputs, layer.weight[1], layer)
        H = self.divisor("outputs", self.outputs, layer.weight[0], layer)
        i = integer(self.name, "rank_in", self.rank_in, self._most_in(layer), layer)
        return G, H, i, integer(self.name, "rank_out", self.rank_out, self._most_out(layer), layer)

    def _most_in(self, layer: Layer) -> int:
        other = (self.rank_out or 1) if self.outputs_first else layer.weight[0] // (self.outputs or 1)
        return min(layer.weight[1] // (self.inputs or 1), other * math.prod(layer.kernel))

    def _most_out(self, layer: Layer) -> int:
        other = layer.weight[1] // (self.inputs or 1) if self.outputs_first else (self.rank_in or 1)
        return min(layer.weight[0] // (self.outputs or 1), other * math.prod(layer.kernel))

    def exact_case(self, group: Group) -> tuple[Bicluster, nn.Module] | None:
        """Full ranks in the fewest clusters."""
        if self.refuses(group):
            return None
        outputs, inputs = group.layer.weight[:2]
        made = replace(self, inputs=2 - inputs % 2, outputs=2 - outputs % 2, outputs_first=False)
        made = replace(made, rank_in=made._most_in(group.layer))
        return replace(made, rank_out=made._most_out(group.layer)), random_layer(group.layer)


def _joined(found: Biclusters, last: Tensor) -> Tensor:
    """The last layer's rows (F, G K2), outputs cluster by cluster, from those of the blocks (H G, F / H, K2)."""
    split = last.reshape(found.H, found.G, *last.shape[1:])
    return split.transpose(1, 2).flatten(2).flatten(0, 1)

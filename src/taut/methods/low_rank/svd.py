"""SVD of a layer: Linear -> two Linears; convolution -> the same convolution to r channels, then 1 x 1."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from taut.decompose.balance import equalize
from taut.decompose.svd import OutputBasis, completed, output_basis
from taut.decompose.vbmf import output_rank
from taut.methods.factorization import Factorization, Sight, integer
from taut.methods.layer_factory import chain_cost, conv, linear, output_places, random_layer, rank_grid
from taut.methods.low_rank.vbmf_ranks import built_ranks, scaled, undecided
from taut.structure.patches import grouped_weight
from taut.types import Cost, Group, Layer, Rewrite


@dataclass(frozen=True)
class SVDFactors:
    """Nested output directions and the damage of keeping the first r, for every r."""

    basis: OutputBasis
    damages: list[float]


@dataclass(frozen=True)
class SVD(Factorization):
    """Low rank: the r output directions that carry most of the layer's output on the calibration data.

    Source: Denton et al. 2014, sections 3.2.2 and 3.3; the whole kernel is unfolded, per group of a grouped layer.
    Rank by the weights: Nakajima et al. 2013.

    Attributes:
        rank: components per group; None until resolved.
        metric: "data" (inputs' second moment), "fisher" (outputs' too) or "frobenius".
        vbmf: where no rank is given, the rank is this times what empirical variational Bayes finds in the weights when
            the step is carried out: 1 as found, above keeps more. None: off.
    """

    rank: int | None = None
    metric: str = "data"
    vbmf: float | None = None
    name: ClassVar[str] = "svd"

    def refuses_layer(self, layer: Layer) -> str | None:
        """Every Linear and convolution of more than one output and input per group."""
        return None if max_rank(layer) > 1 else "svd: one input or output per group leaves nothing to factorize"

    def factor(self, modules: Mapping[str, nn.Module], stats: Mapping[str, Any]) -> SVDFactors:
        """One eigendecomposition of the smaller Gram matrix serves every rank."""
        sight = self.sight(modules, stats)
        basis = output_basis(sight.W, sight.weighting, sight.response)
        return _factors(sight, basis, sight.damages(basis.lost(sight.stats.outputs)))

    def factor_once(self, modules: Mapping[str, nn.Module], stats: Mapping[str, Any]) -> SVDFactors:
        """The directions of its own rank."""
        sight = self.sight(modules, stats)
        return _factors(sight, output_basis(sight.W, sight.weighting, sight.response, self.rank), [])

    def candidates(self, group: Group, factors: SVDFactors) -> Sequence[SVD]:
        """Ranks of the grid that shrink the layer and that its inputs can judge, whatever `vbmf` would choose."""
        whole = max_rank(group.layer)
        judged = whole if factors is None else min(whole, factors.basis.energy.shape[-1])
        ranks = [r for r in rank_grid(whole) if r < judged or judged == whole]
        return self.worthwhile(group, (replace(self, rank=r, vbmf=None) for r in ranks))

    def decided(self, modules: Mapping[str, nn.Module]) -> SVD:
        """Itself with the rank that the weights decide, of the group that needs most, where none is given."""
        if not self._undecided():
            return self
        (module,) = modules.values()
        W = grouped_weight(module)
        return replace(self, rank=scaled(self.vbmf, output_rank(W), min(W.flatten(2).shape[1:])))

    def fitted(self, group: Group, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> SVD:
        """Itself with the rank that was built, where the weights decided it.

        Args:
            group: the layer as the step found it.
            shapes: of the parameters under its name, as the step left them.
        """
        if not self._undecided():
            return self
        (rank,) = built_ranks(group.layer, shapes.get(group.layer.name, {}), 2)
        return replace(self, rank=rank)

    def _undecided(self) -> bool:
        return undecided(self.name, self.vbmf, {"rank": self.rank})

    def damage(self, factors: SVDFactors) -> float | None:
        """Tail of the spectrum."""
        return factors.damages[min(self.rank or 0, len(factors.damages) - 1)]

    def rewrite(self, modules: Mapping[str, nn.Module], factors: SVDFactors) -> Rewrite:
        """Down W, then up; both with the same norm per component."""
        W = self.sight(modules, {}).W.flatten(2)
        r = self.rank or 0
        up, down = completed(W, factors.basis.up, factors.basis.down, r)
        first, second = equalize(down @ W, up)
        return self.rewritten(modules, (first, second))

    def skeleton(self, group: Group) -> Mapping[str, nn.Module]:
        """Two layers."""
        layer = group.layer
        r = integer(self.name, "rank", self.rank, max_rank(layer), layer)
        o, c = layer.weight[0], layer.weight[1] * layer.groups
        if layer.kind == "Linear":
            return {layer.name: nn.Sequential(linear(c, r, bias=False), linear(r, o, bias=layer.bias))}
        inner, g = r * layer.groups, layer.groups
        first = conv((c, inner), layer, range(len(layer.kernel)), groups=g, bias=False)
        return {layer.name: nn.Sequential(first, conv((inner, o), layer, (), groups=g, bias=layer.bias))}

    def cost(self, group: Group) -> Cost:
        """R (fan-in + outputs) weights, all at the output positions; the layer's own until the weights decide."""
        if self._undecided():
            return group.cost
        layer = group.layer
        r = integer(self.name, "rank", self.rank, max_rank(layer), layer)
        places = output_places(layer)
        first = r * layer.groups * math.prod(layer.weight[1:])
        return chain_cost(layer, ((first, places), (r * layer.weight[0], places)))

    def exact_case(self, group: Group) -> tuple[SVD, nn.Module] | None:
        """Full rank."""
        if self.refuses(group):
            return None
        return replace(self, rank=max_rank(group.layer)), random_layer(group.layer)


def _factors(sight: Sight, basis: OutputBasis, damages: list[float]) -> SVDFactors:
    dtype = sight.W.dtype
    up = basis.up.to(dtype)
    down = up.mT if sight.response is None else basis.down.to(dtype)
    return SVDFactors(OutputBasis(up, down, basis.energy), damages)


def max_rank(layer: Layer) -> int:
    """Rank at which the factorization is exact: the smaller side of one group's matrix."""
    return min(layer.weight[0] // layer.groups, math.prod(layer.weight[1:]))

"""Spatial SVD: a k_h x k_w convolution -> k_h x 1 to r channels, then 1 x k_w."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from taut.decompose.balance import orthogonalize
from taut.decompose.linalg import cholesky
from taut.decompose.projection import InputBasis, input_basis, unexplained
from taut.methods.factorization import Factorization, Sight, integer
from taut.methods.layer_factory import chain_cost, conv, output_places, random_layer, rank_grid
from taut.structure.patches import weight_of
from taut.types import Cost, Group, Layer, Rewrite


@dataclass(frozen=True)
class SpatialFactors:
    """The nested basis and the damage of its first r columns, for r = 0 ... R."""

    basis: InputBasis
    damages: list[float]


@dataclass(frozen=True)
class Spatial(Factorization):
    """Two convolutions, one along each kernel axis; keeps most of a CPU's speed (no tiny 1 x 1 layers).

    W[o, c, y, x] ~ sum_r U[o, r, x] V[r, c, y]: V from the whitened unfolding (c y) x (x o), U by least squares on its
    features. Source: Jaderberg et al. 2014, scheme 2, with the data metric of Denton et al. 2014.

    Attributes:
        rank: channels per group between the two; None until resolved.
        metric: "data", "fisher" or "frobenius".
    """

    rank: int | None = None
    metric: str = "data"
    name: ClassVar[str] = "spatial"

    def refuses_layer(self, layer: Layer) -> str | None:
        """Conv2d with both kernel sides above 1."""
        if layer.kind != "Conv2d" or min(layer.kernel) < 2:
            return "spatial: needs a Conv2d whose kernel is larger than 1 along both axes"
        return None

    def factor(self, modules: Mapping[str, nn.Module], stats: Mapping[str, Any]) -> SpatialFactors:
        """One basis and one Cholesky factor serve every rank."""
        sight = self.sight(modules, stats)
        basis = self._basis(modules, sight, None)
        errors = unexplained(sight.W, sight.weighting, sight.stats.outputs, basis)
        return SpatialFactors(basis, sight.damages(errors))

    def factor_once(self, modules: Mapping[str, nn.Module], stats: Mapping[str, Any]) -> SpatialFactors:
        """The basis up to its own rank."""
        return SpatialFactors(self._basis(modules, self.sight(modules, stats), self.rank), [])

    def _basis(self, modules: Mapping[str, nn.Module], sight: Sight, rank: int | None) -> InputBasis:
        ((_, module),) = modules.items()
        features = sight.W.shape[2] * weight_of(module).shape[2]
        half = None if sight.response is None else cholesky(sight.response).mT
        return input_basis(sight.W, sight.weighting, features, half, rank)

    def candidates(self, group: Group, factors: object) -> Sequence[Spatial]:
        """Ranks of the grid that shrink the layer."""
        del factors
        return self.worthwhile(group, (replace(self, rank=r) for r in rank_grid(max_rank(group.layer))))

    def damage(self, factors: SpatialFactors) -> float | None:
        """What the first r features do not explain."""
        return factors.damages[self.rank or 0]

    def rewrite(self, modules: Mapping[str, nn.Module], factors: SpatialFactors) -> Rewrite:
        """V^T along the height, U along the width, norms equal."""
        r = self.rank or 0
        first, second = orthogonalize(factors.basis.V[..., :r].mT.double(), factors.basis.solve(r))
        return self.rewritten(modules, (first, second))

    def skeleton(self, group: Group) -> Mapping[str, nn.Module]:
        """Two convolutions."""
        layer = group.layer
        inner = layer.groups * integer(self.name, "rank", self.rank, max_rank(layer), layer)
        first = conv((layer.weight[1] * layer.groups, inner), layer, (0,), groups=layer.groups, bias=False)
        second = conv((inner, layer.weight[0]), layer, (1,), groups=layer.groups, bias=layer.bias)
        return {layer.name: nn.Sequential(first, second)}

    def cost(self, group: Group) -> Cost:
        """R (c k_h g) weights at (output height x input width) positions, r k_w o at the output's."""
        layer = group.layer
        r = integer(self.name, "rank", self.rank, max_rank(layer), layer)
        height, width = layer.kernel
        between = sum(call.output[-2] * call.input[-1] * _batch(call.output) for call in layer.calls)
        first = r * layer.groups * layer.weight[1] * height
        return chain_cost(layer, ((first, between), (r * width * layer.weight[0], output_places(layer))))

    def exact_case(self, group: Group) -> tuple[Spatial, nn.Module] | None:
        """Full rank."""
        if self.refuses(group):
            return None
        return replace(self, rank=max_rank(group.layer)), random_layer(group.layer)


def max_rank(layer: Layer) -> int:
    """Rank at which the factorization is exact, per group."""
    height, width = layer.kernel
    return min(layer.weight[1] * height, layer.weight[0] // layer.groups * width)


def _batch(output: tuple[int, ...]) -> int:
    return output[0] if len(output) == 4 else 1

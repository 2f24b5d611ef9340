"""Tucker-2: a convolution -> 1 x 1 to r_in channels, the kernel on r_in -> r_out, 1 x 1 to the outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import nn

from taut.decompose.balance import level, orthogonalize
from taut.decompose.linalg import cholesky, metric_factor
from taut.decompose.projection import InputBasis, input_basis, unexplained
from taut.decompose.svd import OutputBasis, directions
from taut.decompose.tucker import tucker2
from taut.decompose.vbmf import input_rank, output_rank
from taut.methods.factorization import Factorization, Sight, integer
from taut.methods.layer_factory import chain_cost, conv, input_places, output_places, random_layer, rank_grid
from taut.methods.low_rank.vbmf_ranks import built_ranks, scaled, undecided
from taut.structure.patches import grouped_weight
from taut.types import Cost, Group, Layer, Rewrite

PAIRS = 20
"""Ranks on offer on either side of the core; each r_in costs an eigendecomposition."""


@dataclass(frozen=True)
class TuckerFactors:
    """The nested input basis, and per r_in the damages of every r_out (made when first asked for).

    Attributes:
        basis: of the input channels.
        base: squared error of keeping the first r input directions, r = 0 ... R.
        sight: the layer; what the output bases and damages are made from.
    """

    basis: InputBasis
    base: torch.Tensor
    sight: Sight
    damages: dict[int, list[float]] = field(default_factory=dict)

    def output(self, r: int, r_out: int | None = None) -> OutputBasis:
        """The output basis for r input channels, whole or up to r_out."""
        half = None if self.sight.response is None else metric_factor(self.sight.response)
        return directions(self.basis.explained(r), half, r_out)

    def cut(self, r_in: int, r_out: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """V (g, c, r_in), core (g, r_out, r_in, s) and U (g, o, r_out); by HOOI where only the weights are known."""
        if not self.sight.weighting.known and self.sight.response is None:
            V, core, U = tucker2(self.sight.W, r_in, r_out)
            return V.double(), core.double(), U.double()
        output = self.output(r_in, r_out)
        core = torch.einsum("gqo,gorp->gqrp", output.down[:, :r_out], self.basis.solve(r_in))
        return self.basis.V[..., :r_in].double(), core, output.up[..., :r_out]

    def damage(self, r_in: int, r_out: int) -> float:
        """Error of the input basis plus the tail of the output basis."""
        if r_in not in self.damages:
            errors = self.base[r_in] + self.output(r_in).lost(self.sight.stats.outputs)
            self.damages[r_in] = self.sight.damages(errors)
        found = self.damages[r_in]
        return found[min(r_out, len(found) - 1)]


@dataclass(frozen=True)
class Tucker(Factorization):
    """Tucker-2 of a convolution: fewer channels in and out of the kernel; stride, dilation and padding in the core.

    Input basis from the whitened unfolding, the rest by least squares on its features, output basis from what those
    explain. The padding sits behind the bias-free 1 x 1 layer, which is exact and saves the padded border.
    Source: Kim et al. 2016 (Tucker-2, ranks by the weights), with the data metric of Denton et al. 2014.

    Attributes:
        rank_in, rank_out: channels per group on either side of the core; None until resolved.
        metric: "data", "fisher" or "frobenius".
        vbmf: where no ranks are given, they are this times what empirical variational Bayes (Nakajima et al. 2013)
            finds in the kernel's unfoldings when the step is carried out: 1 as found, above keeps more. None: off.
    """

    rank_in: int | None = None
    rank_out: int | None = None
    metric: str = "data"
    vbmf: float | None = None
    name: ClassVar[str] = "tucker"
    rank_settings: ClassVar[tuple[str, ...]] = ("rank_in", "rank_out")

    def refuses_layer(self, layer: Layer) -> str | None:
        """Convolutions with a kernel above 1 and more than one channel on either side of a group."""
        if not layer.kernel or math.prod(layer.kernel) < 2:
            return "tucker: needs a kernel larger than 1"
        if min(max_ranks(layer)) < 2:
            return "tucker: one input or output per group leaves nothing to factorize"
        return None

    def factor(self, modules: Mapping[str, nn.Module], stats: Mapping[str, Any]) -> TuckerFactors:
        """One input basis serves every r_in; the output bases follow from it."""
        sight = self.sight(modules, stats)
        basis = self._basis(sight, None)
        return TuckerFactors(basis, unexplained(sight.W, sight.weighting, sight.stats.outputs, basis), sight)

    def factor_once(self, modules: Mapping[str, nn.Module], stats: Mapping[str, Any]) -> TuckerFactors:
        """The basis up to its own rank."""
        sight = self.sight(modules, stats)
        return TuckerFactors(self._basis(sight, self.rank_in), torch.zeros(0), sight)

    def _basis(self, sight: Sight, rank: int | None) -> InputBasis:
        half = None if sight.response is None else cholesky(sight.response).mT
        return input_basis(sight.W, sight.weighting, sight.W.shape[2], half, rank)

    def candidates(self, group: Group, factors: object) -> Sequence[Tucker]:
        """Pairs of ranks of the grid that shrink the layer, whatever `vbmf` would choose."""
        del factors
        ins, outs = (rank_grid(limit, most=PAIRS) for limit in max_ranks(group.layer))
        return self.worthwhile(group, (replace(self, rank_in=i, rank_out=o, vbmf=None) for i in ins for o in outs))

    def decided(self, modules: Mapping[str, nn.Module]) -> Tucker:
        """Itself with the ranks that the weights decide, of the group that needs most, where none are given."""
        if not self._undecided():
            return self
        (module,) = modules.values()
        W = grouped_weight(module)
        _, o, c, s = W.shape
        return replace(
            self,
            rank_in=scaled(self.vbmf, input_rank(W), min(c, o * s)),
            rank_out=scaled(self.vbmf, output_rank(W), min(o, c * s)),
        )

    def fitted(self, group: Group, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> Tucker:
        """Itself with the ranks that were built, where the weights decided them.

        Args:
            group: the layer as the step found it.
            shapes: of the parameters under its name, as the step left them.
        """
        if not self._undecided():
            return self
        i, o = built_ranks(group.layer, shapes.get(group.layer.name, {}), 3)
        return replace(self, rank_in=i, rank_out=o)

    def _undecided(self) -> bool:
        return undecided(self.name, self.vbmf, {"rank_in": self.rank_in, "rank_out": self.rank_out})

    def damage(self, factors: TuckerFactors) -> float | None:
        """Error of both bases."""
        return factors.damage(self.rank_in or 0, self.rank_out or 0)

    def rewrite(self, modules: Mapping[str, nn.Module], factors: TuckerFactors) -> Rewrite:
        """V^T, the core on orthogonal outer factors, and the output directions; norms equal."""
        i, o = self.rank_in or 0, self.rank_out or 0
        V, core, up = factors.cut(i, o)
        first, core = orthogonalize(V.mT, core)
        last, flipped = orthogonalize(up.mT, core.transpose(1, 2))
        return self.rewritten(modules, level(first, flipped.transpose(1, 2), last.mT))

    def skeleton(self, group: Group) -> Mapping[str, nn.Module]:
        """Three convolutions."""
        layer = group.layer
        g, i, o = layer.groups, *self._ranks(layer)
        first = conv((layer.weight[1] * g, i * g), layer, (), groups=g, bias=False)
        core = conv((i * g, o * g), layer, range(len(layer.kernel)), groups=g, bias=False)
        last = conv((o * g, layer.weight[0]), layer, (), groups=g, bias=layer.bias)
        return {layer.name: nn.Sequential(first, core, last)}

    def cost(self, group: Group) -> Cost:
        """C r_in at the input's positions, r_in r_out k and r_out o at the output's; the layer's own until decided."""
        if self._undecided():
            return group.cost
        layer = group.layer
        i, o = self._ranks(layer)
        inputs, places = i * layer.weight[1] * layer.groups, output_places(layer)
        core = i * o * layer.groups * math.prod(layer.kernel)
        return chain_cost(layer, ((inputs, input_places(layer)), (core, places), (o * layer.weight[0], places)))

    def _ranks(self, layer: Layer) -> tuple[int, int]:
        limits = max_ranks(layer)
        return (
            integer(self.name, "rank_in", self.rank_in, limits[0], layer),
            integer(self.name, "rank_out", self.rank_out, limits[1], layer),
        )

    def exact_case(self, group: Group) -> tuple[Tucker, nn.Module] | None:
        """Full ranks."""
        if self.refuses(group):
            return None
        i, o = max_ranks(group.layer)
        return replace(self, rank_in=i, rank_out=o), random_layer(group.layer)


def max_ranks(layer: Layer) -> tuple[int, int]:
    """Ranks per group at which the factorization is exact."""
    outputs, offsets = layer.weight[0] // layer.groups, math.prod(layer.kernel)
    return min(layer.weight[1], outputs * offsets), min(outputs, layer.weight[1] * offsets)

"""Low rank plus sparse: two thin layers, and beside them the few weights that they fit worst."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from taut.decompose.balance import equalize
from taut.decompose.svd import output_basis
from taut.errors import CallError
from taut.methods.factorization import Factorization, Sight, Unplanned, input_rms, integer
from taut.methods.layer_factory import conv, linear, output_places, random_layer
from taut.nn import LowRankSparse as Module
from taut.structure.patches import bias_of, weight_of
from taut.structure.tracing import describe_layer
from taut.types import Cost, Group, Layer, Rewrite

ROUNDS = 2
"""How often the thin layers are fitted again to what the sparse part leaves them."""

PLACE = 4
"""Bytes of a place in the weight: int32."""


@dataclass(frozen=True)
class Parts:
    """The layer in the metric of its inputs, and the root mean square of the input that each weight meets."""

    sight: Sight
    rms: Tensor


@dataclass(frozen=True)
class LowRankSparse(Unplanned, Factorization):
    """W ~ B A + R: the r leading output directions, and the weights that these fit worst, |W - B A| rms(x).

    It buys bytes, not milliseconds: R is stored by its places (4 bytes each) but multiplied dense, so that MACs are
    those of the layer and of the factors; its steps need `allow_growth`.

    Source: the other factored deployment of Rostan, neural network pruning with simultaneous matrix tri-factorization
    (prune what the factorization explains, but keep the factorization).

    Attributes:
        rank: directions; None until resolved.
        density: share of the weights that R holds, in [0, 1].
        metric: "data", "fisher" or "frobenius", of the directions.
    """

    rank: int | None = None
    density: float = 0.05
    metric: str = "data"
    name: ClassVar[str] = "lowrank_sparse"
    default: ClassVar[bool] = False
    plain: ClassVar[bool] = False

    def refuses_layer(self, layer: Layer) -> str | None:
        """Layers without groups, of more than one input and output."""
        if layer.groups > 1:
            return "lowrank_sparse: grouped convolutions are left as they are"
        return None if max_rank(layer) > 1 else "lowrank_sparse: one input or output leaves nothing to factorize"

    def factor(self, modules: Mapping[str, nn.Module], stats: Mapping[str, Any]) -> Parts:
        """The layer: directions depend on what the sparse part takes away."""
        sight = self.sight(modules, stats)
        ((_, module),) = modules.items()
        rms = input_rms(module, sight.stats)
        return Parts(sight, torch.ones_like(weight_of(module)) if rms is None else rms)

    def rewrite(self, modules: Mapping[str, nn.Module], factors: Parts) -> Rewrite:
        """Thin layers and sparse part in turns; the weights of R make up for the thin layers exactly."""
        ((name, module),) = modules.items()
        layer = describe_layer(name, module, (), 1)
        built = self._built(layer)
        old = weight_of(module)
        W = self.sight(modules, {}).W[0].flatten(1)
        size = len(built.values)
        R = torch.zeros_like(W)
        for _ in range(ROUNDS if size else 1):
            parts = self._factors(factors.sight, W - R, old)
            rest = W - parts[1].to(W) @ parts[0].to(W)
            places = (rest * factors.rms.to(W).reshape(W.shape)).abs().flatten().topk(size).indices.sort().values
            R = torch.zeros_like(W).flatten().scatter(0, places, rest.flatten()[places]).reshape(W.shape)
        thin: list[Any] = list(built.low)
        for part, weight in zip(thin, parts, strict=True):
            part.weight = nn.Parameter(weight.reshape(part.weight.shape), old.requires_grad)
        built.values = nn.Parameter(R.flatten()[places].to(old), old.requires_grad)
        built.places = places.to(torch.int32)
        bias = bias_of(module)
        if bias is not None:
            thin[1].bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
        return Rewrite({name: built}, self)

    def _factors(self, sight: Sight, W: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """(r, c s) and (o, r), as they will be stored."""
        r = self.rank or 0
        cube = W.reshape(sight.W.shape)
        basis = output_basis(cube, sight.weighting, sight.response, r)
        up = basis.up[..., :r].to(W)
        down = up.mT if sight.response is None else basis.down[:, :r].to(W)
        first, second = equalize(down @ cube.flatten(2), up)
        return first[0].to(old).contiguous(), second[0].to(old).contiguous()

    def skeleton(self, group: Group) -> Mapping[str, nn.Module]:
        """One module."""
        return {group.layer.name: self._built(group.layer)}

    def _built(self, layer: Layer) -> Module:
        r, size = self._sizes(layer)
        o, c = layer.weight[:2]
        if layer.kind == "Linear":
            first, second = linear(c, r, bias=False), linear(r, o, bias=layer.bias)
        else:
            first = conv((c, r), layer, range(len(layer.kernel)), groups=1, bias=False)
            second = conv((r, o), layer, (), groups=1, bias=layer.bias)
        return Module(first, second, nn.Parameter(torch.empty(size)), torch.zeros(size, dtype=torch.int32))

    def cost(self, group: Group) -> Cost:
        """R (fan-in + outputs) weights and those of R with their places; MACs of the factors and of the dense layer."""
        layer = group.layer
        r, size = self._sizes(layer)
        factors = r * (math.prod(layer.weight[1:]) + layer.weight[0])
        params = factors + size + (layer.weight[0] if layer.bias else 0)
        macs = layer.per_sample((factors + math.prod(layer.weight)) * output_places(layer))
        return Cost(params, params, macs, params * layer.itemsize + PLACE * size)

    def _sizes(self, layer: Layer) -> tuple[int, int]:
        """Rank, and weights in R.

        Raises:
            CallError: a setting is out of range.
        """
        if type(self.density) not in {int, float} or not 0 <= self.density <= 1:
            raise CallError(
                f"The 'density' of {self.name} on layer '{layer.name}' must be in [0, 1]. Got {self.density} instead."
            )
        rank = integer(self.name, "rank", self.rank, max_rank(layer), layer)
        return rank, round(self.density * math.prod(layer.weight))

    def exact_case(self, group: Group) -> tuple[LowRankSparse, nn.Module] | None:
        """Every weight in R, whatever the thin layers give."""
        if self.refuses(group):
            return None
        rank = max(1, max_rank(group.layer) // 2)
        return replace(self, rank=rank, density=1.0), random_layer(group.layer)


def max_rank(layer: Layer) -> int:
    """Rank at which the thin layers alone are exact: the smaller side of the matrix."""
    return min(layer.weight[0], math.prod(layer.weight[1:]))

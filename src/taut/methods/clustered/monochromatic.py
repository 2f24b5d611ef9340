"""Monochromatic: 1 x 1 to a few colours, then a grouped convolution in which every output reads one of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from taut.decompose import monochromatic as mathematics
from taut.methods.clustered.clusters import FAST_GROUP, BlockFactors, Blocks, Fit, divisors, exact_numbers
from taut.methods.factorization import integer
from taut.methods.layer_factory import chain_cost, conv, input_places, output_places, random_layer
from taut.types import Cost, Group, Layer

WIDEST = 64
"""Inputs at most: it is a method for colours, and its colour moments grow with their square."""

MOST = 64
"""Colours on offer at most."""


@dataclass(frozen=True)
class Monochromatic(Blocks):
    """Every output reads one mixture of the inputs, shared by F / C' outputs: for first layers on colour images.

    Weights C C' + S F, operations C C' at the input's positions and S F at the output's.
    Source: Denton et al. 2014, section 3.3.

    Attributes:
        colours: C', a divisor of the outputs; None until resolved.
        metric: "data", "fisher", "mahalanobis" or "frobenius".
        paper: Euclidean clusters of sign-fixed colours, taps not fitted again.
        reorders: "o" where the outputs still have to be put back into their order.
    """

    colours: int | None = None
    metric: str = "data"
    paper: bool = False
    reorders: str = "o"
    name: ClassVar[str] = "monochromatic"

    def refuses_layer(self, layer: Layer) -> str | None:
        """Convolutions of 2 to 64 inputs."""
        if layer.kernel and layer.weight[1] < 2:
            return "monochromatic: one input has one colour already"
        if layer.kernel and layer.weight[1] > WIDEST:
            return f"monochromatic: one mixture of {layer.weight[1]} inputs keeps too little of a filter"
        return super().refuses_layer(layer)

    def fit(self, factors: BlockFactors) -> Fit:
        """Colours, taps, and the outputs colour by colour."""
        k, sight = self.colours or 1, factors.sight
        W = sight.W[0]
        weights = None if sight.response is None else sight.response[0].diagonal()
        found = mathematics.paper(W, k) if self.paper else mathematics.monochromatic(W, k, sight.weighting, weights)
        order = found.labels.argsort(stable=True)
        size = found.taps.norm() / found.colours.norm().clamp_min(1e-300)
        scale = size.sqrt() if float(size) > 0 else torch.ones_like(size)
        return Fit(found.compose(), (found.colours * scale, found.taps[order] / scale), None, order)

    def candidates(self, group: Group, factors: object) -> Sequence[Monochromatic]:
        """Divisors of the outputs that leave groups of a multiple of 16, where there are any."""
        del factors
        outputs = group.layer.weight[0]
        known = [k for k in divisors(outputs) if k <= MOST]
        fast = [k for k in known if outputs // k % FAST_GROUP == 0]
        return self.worthwhile(group, (replace(self, colours=k) for k in fast or known))

    def skeleton(self, group: Group) -> Mapping[str, nn.Module]:
        """Two convolutions, and the order of the outputs."""
        layer = group.layer
        k = self._colours(layer)
        first = conv((layer.weight[1], k), layer, (), groups=1, bias=False)
        second = conv((k, layer.weight[0]), layer, range(len(layer.kernel)), groups=k, bias=layer.bias)
        return {layer.name: self.framed(layer, (first, second))}

    def cost(self, group: Group) -> Cost:
        """C C' weights at the input's positions, S F at the output's."""
        layer = group.layer
        k = self._colours(layer)
        parts = (
            (layer.weight[1] * k, input_places(layer)),
            (layer.weight[0] * math.prod(layer.kernel), output_places(layer)),
        )
        return chain_cost(layer, parts)

    def _colours(self, layer: Layer) -> int:
        integer(self.name, "colours", self.colours, layer.weight[0], layer)
        return self.divisor("colours", self.colours, layer.weight[0], layer)

    def exact_case(self, group: Group) -> tuple[Monochromatic, nn.Module] | None:
        """A layer planted in two colours (or the fewest that divide its outputs)."""
        if self.refuses(group):
            return None
        layer = group.layer
        k = min((d for d in divisors(layer.weight[0]) if d > 1), default=1)
        module = random_layer(layer)
        weight = module.weight
        if isinstance(weight, torch.Tensor):
            colours = exact_numbers(k, layer.weight[1])
            labels = torch.arange(layer.weight[0]) % k
            taps = weight.data[:, :1]
            weight.data = colours[labels].reshape(*layer.weight[:2], *([1] * len(layer.kernel))) * taps
        return replace(self, colours=k), module

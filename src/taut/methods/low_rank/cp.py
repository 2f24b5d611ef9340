"""CP (PARAFAC): a convolution -> 1 x 1 to r channels, a depthwise convolution per kernel axis, 1 x 1 to the outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from taut.decompose.cp import compose, cp, levelled
from taut.decompose.cp_metric import Roots, mode_roots, on_modes, solve_outputs
from taut.methods.factorization import Factorization, Sight, integer
from taut.methods.layer_factory import chain_cost, conv, random_layer, rank_grid
from taut.structure.patches import weight_of
from taut.types import Cost, Group, Layer, Rewrite

RANKS = 6
"""Ranks on offer: each is a fit of its own, for the terms of a larger rank do not begin with those of a smaller."""

EFFORT: Mapping[str, Any] = {"sweeps": 60, "tol": 1e-4, "restarts": 4}
"""Of a fit: the metric and the last solve matter more than its last digits."""

PLANTED = 3
"""Terms of the exact case: as many as a kernel axis of three taps can tell apart."""


@dataclass(frozen=True)
class CPFactors:
    """A kernel in the metric of its modes, and the fits made so far: no rank contains another.

    Attributes:
        sight: the layer.
        X: (g, o, c, k_1, ...), the whitened kernel.
        roots: of the metric of every mode and its inverse, or None.
        made: per rank the factors of the kernel and their damage.
    """

    sight: Sight
    X: Tensor
    roots: Roots
    made: dict[int, tuple[tuple[Tensor, ...], float]] = field(default_factory=dict)

    def fit(self, rank: int) -> tuple[tuple[Tensor, ...], float]:
        """Factors (g, d, rank) of outputs, inputs and every kernel axis, and what they leave out as damage."""
        if rank not in self.made:
            found = cp(self.X, rank, **EFFORT)
            plain = [f if pair is None else pair[1] @ f for f, pair in zip(found, self.roots, strict=True)]
            outputs = solve_outputs(self.sight.W, plain, self.sight.weighting)
            factors = tuple(levelled([outputs, *plain[1:]]))
            self.made[rank] = factors, self._damage(factors)
        return self.made[rank]

    def _damage(self, factors: tuple[Tensor, ...]) -> float:
        """tr(B dW A dW^T) of the kernel that is really built, in the metric of all that is known."""
        sight = self.sight
        return sight.damage(sight.W.double() - compose(factors).flatten(3))


@dataclass(frozen=True)
class CP(Factorization):
    """Sum of rank-1 terms: fewest weights of all chains, R (C + k_1 + ... + F), in layers of little work per byte.

    W[f, c, y, x] ~ sum_r U[f, r] P[y, r] Q[x, r] V[c, r]. The terms are fitted together, in the metric of inputs and of
    kernel axes (and of outputs, by "fisher"), the outputs then solved again by least squares in the whole metric.
    Depthwise convolutions move much and compute little: in eager mode the chain is often SLOWER than the dense layer
    although it multiplies less; `taut.compare` measures it.
    Source: Lebedev et al. 2015, with the data metric of Denton et al. 2014.

    Attributes:
        rank: terms per group; None until resolved.
        metric: "data", "fisher", "mahalanobis" or "frobenius".
    """

    rank: int | None = None
    metric: str = "data"
    name: ClassVar[str] = "cp"
    default: ClassVar[bool] = False

    def refuses_layer(self, layer: Layer) -> str | None:
        """Convolutions with a kernel above 1 and more than one channel in or out per group."""
        if not layer.kernel or math.prod(layer.kernel) < 2:
            return "cp: needs a kernel larger than 1; svd takes the others"
        if max(_sides(layer)[:2]) < 2:
            return "cp: one input and one output per group leave nothing to factorize"
        return None

    def factor(self, modules: Mapping[str, nn.Module], stats: Mapping[str, Any]) -> CPFactors:
        """The whitened kernel; fits are made when first asked for, and once."""
        sight = self.sight(modules, stats)
        (module,) = modules.values()
        X = sight.W.double().reshape(*sight.W.shape[:3], *weight_of(module).shape[2:])
        roots = mode_roots(sight.weighting, sight.response, X.shape[2:])
        return CPFactors(sight, on_modes(X, roots), roots)

    def candidates(self, group: Group, factors: object) -> Sequence[CP]:
        """A few ranks of the grid that shrink the layer, evenly over it."""
        del factors
        found = self.worthwhile(group, (replace(self, rank=r) for r in rank_grid(max_rank(group.layer))))
        if len(found) <= RANKS:
            return found
        return [found[round(i * (len(found) - 1) / (RANKS - 1))] for i in range(RANKS)]

    def damage(self, factors: CPFactors) -> float | None:
        """Of the fitted kernel."""
        return factors.fit(self.rank or 1)[1]

    def rewrite(self, modules: Mapping[str, nn.Module], factors: CPFactors) -> Rewrite:
        """Inputs, kernel axes, outputs; the columns of a term have the same norm in every mode."""
        ends, axes = factors.fit(self.rank or 1)[0][:2], factors.fit(self.rank or 1)[0][2:]
        inner = [axis.mT for axis in axes if axis.shape[1] > 1]
        scale = math.prod((axis for axis in axes if axis.shape[1] == 1), start=torch.ones(()).double())
        return self.rewritten(modules, ((ends[1] * scale).mT, *inner, ends[0]))

    def skeleton(self, group: Group) -> Mapping[str, nn.Module]:
        """1 x 1 with what axes of length 1 stride and pad, a depthwise layer per longer axis, 1 x 1."""
        layer = group.layer
        inner = layer.groups * integer(self.name, "rank", self.rank, most_terms(layer), layer)
        long, short = _axes(layer)
        first = conv((layer.weight[1] * layer.groups, inner), layer, short, groups=layer.groups, bias=False)
        middle = [conv((inner, inner), layer, (axis,), groups=inner, bias=False) for axis in long]
        last = conv((inner, layer.weight[0]), layer, (), groups=layer.groups, bias=layer.bias)
        return {layer.name: nn.Sequential(first, *middle, last)}

    def cost(self, group: Group) -> Cost:
        """R c at the input's positions, R k_j at positions that are the output's along all axes up to j, R f there."""
        layer = group.layer
        inner = layer.groups * integer(self.name, "rank", self.rank, most_terms(layer), layer)
        long, done = _axes(layer)
        parts = [(inner * layer.weight[1], _places(layer, done))]
        for axis in long:
            done = [*done, axis]
            parts.append((inner * layer.kernel[axis], _places(layer, done)))
        return chain_cost(layer, (*parts, (inner // layer.groups * layer.weight[0], _places(layer, done))))

    def exact_case(self, group: Group) -> tuple[CP, nn.Module] | None:
        """A layer planted with a few terms."""
        if self.refuses(group):
            return None
        layer = group.layer
        module: Any = random_layer(layer).double()
        rank = min(PLANTED, max_rank(layer))
        generator = torch.Generator().manual_seed(1)
        factors = [
            torch.randn(layer.groups, side, rank, generator=generator, dtype=torch.float64) for side in _sides(layer)
        ]
        module.weight.data = compose(factors).reshape(module.weight.shape).to(module.weight)
        return replace(self, rank=rank), module


def max_rank(layer: Layer) -> int:
    """Terms per group at which any kernel is exact: the product of all sides but the longest."""
    sides = _sides(layer)
    return math.prod(sides) // max(sides)


def most_terms(layer: Layer) -> int:
    """Terms per group that may be asked for: one for every weight; published nets use more than an exact fit needs."""
    return math.prod(_sides(layer))


def _sides(layer: Layer) -> tuple[int, ...]:
    return (layer.weight[0] // layer.groups, layer.weight[1], *layer.kernel)


def _axes(layer: Layer) -> tuple[list[int], list[int]]:
    """Kernel axes longer than 1, and the others."""
    axes = range(len(layer.kernel))
    return [a for a in axes if layer.kernel[a] > 1], [a for a in axes if layer.kernel[a] == 1]


def _places(layer: Layer, done: Sequence[int]) -> int:
    """Positions in the example where stride and padding of the axes `done` have been applied, of the others not."""
    dims, total = len(layer.kernel), 0
    for call in layer.calls:
        batch = call.output[0] if len(call.output) == dims + 2 else 1
        total += batch * math.prod((call.output if a in done else call.input)[a - dims] for a in range(dims))
    return total

"""Spatial SVD of a transposed convolution: k_h x 1 to r channels, then 1 x k_w, both transposed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from taut.decompose.balance import equalize
from taut.decompose.linalg import cholesky, metric_factor, ridge, spectrum
from taut.decompose.weighting import RIDGE
from taut.errors import CallError
from taut.methods.factorization import regular
from taut.methods.layer_factory import empty, rank_grid
from taut.methods.own_kind import OwnKind, seeded
from taut.structure.asides import AsideStatistics
from taut.structure.patches import weight_of
from taut.structure.statistics import LayerStatistics
from taut.structure.support import TRANSPOSED
from taut.structure.transposed_error import Trial
from taut.types import Cost, Group, Layer, Rewrite

RANKS = 24
"""Ranks on offer."""

IDLE = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1}
"""Settings that change nothing along an axis."""


@dataclass(frozen=True)
class TransposedSpatialFactors:
    """A nested basis of the columns, and what is needed to predict damages.

    Attributes:
        W: (c k_h, o k_w), float64.
        back, onto: (c k_h, R) and (R, c k_h), whose first r columns and rows keep what r channels can.
        tails: squared errors of keeping the first r in the metric, r = 0 ... R.
        energy: of the outputs, or of the weight where nothing was observed.
        trial: to try ranks on inputs that were kept; None: there are none.
        known: what was observed. tried: errors of ranks that were tried.
    """

    W: Tensor
    back: Tensor
    onto: Tensor
    tails: Tensor
    energy: float
    trial: Trial | None
    known: LayerStatistics
    tried: dict[int, float] = field(default_factory=dict)

    def damage(self, r: int) -> float:
        """What the first r channels leave out."""
        error = float(self.tails[r]) if self.trial is None else self._tried(self.trial, r)
        return max(0.0, float(self.known.damage(torch.tensor(error, dtype=torch.float64), self.energy)))

    def _tried(self, trial: Trial, r: int) -> float:
        """Error of r channels on inputs: there the outputs of taps overlap."""
        if r not in self.tried:
            change = self.W - self.back[:, :r] @ (self.onto[:r] @ self.W)
            self.tried[r] = trial.error(_unfolded(change, trial.layer))
        return self.tried[r]


@dataclass(frozen=True)
class TransposedSpatial(OwnKind):
    """Two transposed convolutions, one along each kernel axis; stride and padding go with their axis.

    W[c, o, y, x] ~ sum_r V[r, c, y] U[r, o, x]: V from the whitened unfolding (c y) x (o x), U by projection on it. The
    metric is the second moment of what the first of the two layers adds up at one place, taps that overlap along the
    height included, over inputs that calibration kept; overlap along the width is left to the damage, which is tried on
    these inputs. Source: Jaderberg et al. 2014, scheme 2, with the data metric of Denton et al.
    2014, for the transposed layer.

    Attributes:
        rank: channels between the two; None until resolved.
        metric: "data", "fisher" or "frobenius".
        stride, padding, output_padding, dilation: as of the layer; found out when the step is carried out.
    """

    rank: int | None = None
    metric: str = "data"
    stride: list[int] | None = None
    padding: list[int] | None = None
    output_padding: list[int] | None = None
    dilation: list[int] | None = None
    name: ClassVar[str] = "transposed_spatial"
    default: ClassVar[bool] = False
    of_their_own: ClassVar[tuple[str, ...]] = (TRANSPOSED,)

    def takes(self, layer: Layer) -> str | None:
        """ConvTranspose2d with both kernel sides above 1."""
        if len(layer.kernel) != 2 or min(layer.kernel) < 2:
            return "transposed_spatial: needs a ConvTranspose2d whose kernel is larger than 1 along both axes"
        return None

    def factor(self, modules: Mapping[str, nn.Module], stats: Mapping[str, Any]) -> TransposedSpatialFactors:
        """One eigendecomposition serves every rank."""
        self.check_metric()
        ((name, module),) = modules.items()
        known = stats.get(name, LayerStatistics())
        seen = known if isinstance(known, AsideStatistics) and self.metric != "frobenius" else AsideStatistics()
        W = weight_of(module).detach().double().permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
        L = cholesky(ridge(_moment(module, seen)[None].to(W), RIDGE))[0]
        response = regular(known.outputs) if self.metric == "fisher" else None
        whitened = L.T @ W
        G = whitened @ whitened.T
        if response is not None:
            half = metric_factor(response)[0][0].to(W)
            weighed = torch.einsum("pqk,oq->pok", whitened.reshape(len(W), half.shape[1], -1), half).flatten(1)
            G = weighed @ weighed.T
        Q = spectrum(G[None])[0][0].to(W)[:, : min(W.shape)]
        kept = (Q.T @ whitened).square().sum(1)
        tails = torch.cat([kept.flip(0).cumsum(0).flip(0), kept.new_zeros(1)])
        back = torch.linalg.solve_triangular(L.T, Q, upper=True)
        trial = Trial.of(module, known)
        products = None if trial is None else trial.known.products
        energy = float(tails[0] if products is None else products.diagonal().sum())
        return TransposedSpatialFactors(W, back, Q.T @ L.T, tails, energy, trial, known)

    def candidates(self, group: Group, factors: object) -> Sequence[TransposedSpatial]:
        """Ranks of the grid that shrink the layer."""
        del factors
        return self.worthwhile(group, (replace(self, rank=r) for r in rank_grid(max_rank(group.layer), RANKS)))

    def damage(self, factors: TransposedSpatialFactors) -> float | None:
        """What the channels between the two leave out."""
        return factors.damage(self.rank or 0)

    def rewrite(self, modules: Mapping[str, nn.Module], factors: TransposedSpatialFactors) -> Rewrite:
        """V along the height, U along the width, norms equal."""
        ((name, module),) = modules.items()
        conv: Any = module
        settings = {key: list(getattr(conv, key)) for key in IDLE}
        resolved: TransposedSpatial = replace(self, **settings)  # type: ignore[arg-type]
        (c, o, height, width), r = conv.weight.shape, self.rank or 0
        first, second = equalize(factors.back[:, :r].T[None], (factors.onto[:r] @ factors.W).T[None])
        V = first[0].reshape(r, c, height).transpose(0, 1)
        U = second[0].T.reshape(r, o, width)
        return self.filled(resolved, modules, {name: [V, U]})

    def skeleton(self, group: Group) -> Mapping[str, nn.Module]:
        """Two transposed convolutions."""
        layer = group.layer
        if any(getattr(self, key) is None for key in IDLE):
            raise CallError(
                "The settings of transposed_spatial but its rank are found out when the step is carried out."
            )
        (c, o), (height, width), r = layer.weight[:2], layer.kernel, self._rank(layer)
        first = empty(nn.ConvTranspose2d, c, r, kernel_size=(height, 1), bias=False, **self._along(0))
        second = empty(nn.ConvTranspose2d, r, o, kernel_size=(1, width), bias=layer.bias, **self._along(1))
        return {layer.name: nn.Sequential(first, second)}

    def _along(self, axis: int) -> dict[str, tuple[int, int]]:
        """The settings of the layer along one axis, and what changes nothing along the other."""
        own = {key: getattr(self, key)[axis] for key in IDLE}
        return {key: (own[key], value) if axis == 0 else (value, own[key]) for key, value in IDLE.items()}

    def cost(self, group: Group) -> Cost:
        """C r k_h at the input's positions, r o k_w at those of the output's height and the input's width."""
        layer = group.layer
        (c, o), (height, width), r = layer.weight[:2], layer.kernel, self._rank(layer)
        ins = sum(math.prod(call.input) for call in layer.calls) // c
        between = sum(math.prod(call.input) // c // call.input[-2] * call.output[-2] for call in layer.calls)
        first, second = c * r * height, r * o * width
        params = first + second + o * layer.bias
        return Cost(params, params, layer.per_sample(first * ins + second * between), params * layer.itemsize)

    def _rank(self, layer: Layer) -> int:
        return self.rank_of("rank", self.rank, max_rank(layer), layer)

    def exact_case(self, group: Group) -> tuple[TransposedSpatial, nn.Module] | None:
        """Full rank."""
        if self.refuses(group):
            return None
        layer = group.layer
        (c, o), full = layer.weight[:2], replace(self, rank=max_rank(layer))
        return full, seeded(empty(nn.ConvTranspose2d, c, o, kernel_size=layer.kernel, bias=layer.bias))


def max_rank(layer: Layer) -> int:
    """Rank at which the factorization is exact."""
    (c, o), (height, width) = layer.weight[:2], layer.kernel
    return min(c * height, o * width)


def _moment(module: Any, seen: AsideStatistics) -> Tensor:
    """Second moment (c k_h, c k_h) of what is added up at one output row and input column; white without data."""
    c, _, height, _ = module.weight.shape
    if not seen.kept:
        A = seen.weighting.channel
        inputs = torch.eye(c, dtype=torch.float64) if A is None else A[0].double()
        return torch.kron(inputs, torch.eye(height, dtype=inputs.dtype, device=inputs.device))
    taps = torch.eye(height, dtype=torch.float64, device=module.weight.device).tile(c, 1, 1)[..., None]
    total = taps.new_zeros(c * height, c * height)
    settings: Any = {key: (getattr(module, key)[0], value) for key, value in IDLE.items()}
    for sample in (one for x in seen.kept for one in x):
        placed = functional.conv_transpose2d(sample[None].to(taps), taps, groups=c, **settings)[0].flatten(1)
        total += placed @ placed.T
    return total


def _unfolded(W: Tensor, module: Any) -> Tensor:
    """(c k_h, o k_w) as the weight (c, o, taps)."""
    c, o, height, width = module.weight.shape
    return W.reshape(c, height, o, width).permute(0, 2, 1, 3).flatten(2)

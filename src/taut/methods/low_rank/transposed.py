"""Transposed: a transposed convolution -> 1 x 1 to r_in channels, the kernel on r_in -> r_out, 1 x 1 to the outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from taut.decompose.balance import equalize
from taut.decompose.linalg import cholesky, metric_factor, ridge, spectrum
from taut.decompose.outputs import OutputMoment
from taut.decompose.svd import OutputBasis, directions
from taut.decompose.weighting import RIDGE
from taut.errors import CallError
from taut.methods.factorization import regular
from taut.methods.layer_factory import CONVOLUTIONS, empty, rank_grid
from taut.methods.own_kind import OwnKind, seeded
from taut.structure.asides import AsideStatistics
from taut.structure.patches import bias_of, weight_of
from taut.structure.statistics import LayerStatistics
from taut.structure.support import TRANSPOSED, TRANSPOSED_KINDS
from taut.structure.transposed_error import Trial
from taut.types import Cost, Group, Layer, Rewrite

PAIRS = 16
"""Ranks on offer on either side of the kernel."""


@dataclass(frozen=True)
class TransposedFactors:
    """Nested bases of both sides, and what is needed to predict damages.

    Attributes:
        W: (c, o, taps), float64.
        inner: (c, c), L Q: columns are the input directions, in order; down: (c, c), its inverse.
        tails: errors of keeping the first r input directions, where the taps' outputs do not overlap, r = 0 ... c.
        outer: of the outputs; shift: (o,), the mean output, of which the bias takes what the directions leave.
        known: what was observed. trial: to try changes of the layer where taps overlap; None: they do not.
        lost: errors of the output directions, r = 0 ... o.
        tried: errors of input directions that were tried.
    """

    W: Tensor
    inner: Tensor
    down: Tensor
    tails: Tensor
    outer: OutputBasis
    shift: Tensor | None
    known: LayerStatistics
    trial: Trial | None
    lost: Tensor
    energy: float
    tried: dict[int, float] = field(default_factory=dict)

    def core(self, r_in: int, r_out: int) -> tuple[Tensor, Tensor, Tensor]:
        """Input directions (r_in, c), the kernel between (r_in, r_out, taps), and output directions (o, r_out)."""
        c, o, _ = self.W.shape
        first = self.down[:r_in] if r_in < c else torch.eye(c, dtype=self.W.dtype, device=self.W.device)
        core = torch.einsum("cr,cok->rok", self.inner[:, :r_in], self.W) if r_in < c else self.W
        if r_out >= o:
            return first, core, torch.eye(o, dtype=self.W.dtype, device=self.W.device)
        up, down = self.outer.up[0, :, :r_out].to(core), self.outer.down[0, :r_out].to(core)
        return first, torch.einsum("qo,rok->rqk", down, core), up

    def damage(self, r_in: int, r_out: int) -> float:
        """What the directions of both sides leave out."""
        c, o, _ = self.W.shape
        errors = (0.0 if r_in >= c else self._inside(r_in)) + (0.0 if r_out >= o else float(self.lost[r_out]))
        return max(0.0, float(self.known.damage(torch.tensor(errors, dtype=torch.float64), self.energy)))

    def _inside(self, r: int) -> float:
        """Error of the first r input directions: tried on inputs where the outputs of taps overlap."""
        if self.trial is None:
            return float(self.tails[r])
        if r not in self.tried:
            kept = torch.einsum("cr,rd,cok->dok", self.inner[:, :r], self.down[:r], self.W)
            self.tried[r] = self.trial.error(self.W - kept.to(self.W))
        return self.tried[r]


@dataclass(frozen=True)
class Transposed(OwnKind):
    """Low rank of a transposed convolution: fewer channels in and out of the kernel; stride and padding stay in it.

    y = Wᵀ * x: the output directions are those of the outputs' second moment, and what they leave out is the tail of
    its spectrum, whatever the stride. The input directions are those of W in the metric of the inputs' channels; what
    they leave out is the tail, too, where the outputs of the taps do not overlap (stride at least the kernel), and is
    tried on some of the calibration inputs where they do. The two add up. As many directions as channels mean no layer
    on that side. Source: Kim et al. 2016 (Tucker-2), with the data metric of Denton et al. 2014.

    Attributes:
        rank_in, rank_out: channels on either side of the kernel; None until resolved.
        metric: "data", "fisher" or "frobenius".
        stride, padding, output_padding, dilation: as of the layer; found out when the step is carried out.
    """

    rank_in: int | None = None
    rank_out: int | None = None
    metric: str = "data"
    stride: list[int] | None = None
    padding: list[int] | None = None
    output_padding: list[int] | None = None
    dilation: list[int] | None = None
    name: ClassVar[str] = "transposed"
    rank_settings: ClassVar[tuple[str, ...]] = ("rank_in", "rank_out")
    of_their_own: ClassVar[tuple[str, ...]] = (TRANSPOSED,)

    def takes(self, layer: Layer) -> str | None:
        """Those of more than one channel on either side."""
        return None if max(layer.weight[:2]) > 1 else "transposed: one input and output leave nothing to factorize"

    def factor(self, modules: Mapping[str, nn.Module], stats: Mapping[str, Any]) -> TransposedFactors:
        """One eigendecomposition per side serves every rank."""
        self.check_metric()
        ((name, module),) = modules.items()
        known = stats.get(name, LayerStatistics())
        seen = known if isinstance(known, AsideStatistics) and self.metric != "frobenius" else AsideStatistics()
        W = weight_of(module).detach().double().flatten(2)
        B = known.outputs
        response = regular(B) if self.metric == "fisher" else None
        A = seen.weighting.channel
        A = torch.eye(len(W), dtype=W.dtype, device=W.device)[None] if A is None else A.to(W)
        L = cholesky(ridge(A, RIDGE))[0]
        G = _gram(W, None if response is None else OutputMoment(response))
        Q = spectrum((L.T @ G @ L)[None])[0][0].to(W)
        inner = L @ Q
        errors = ((inner.T @ _gram(W, B)) * inner.T).sum(1).clamp_min(0)
        tails = torch.cat([errors.flip(0).cumsum(0).flip(0), errors.new_zeros(1)])
        S, shift = _outputs(W, seen, biased=bias_of(module) is not None)
        outer = directions(S[None], None if response is None else metric_factor(response))
        trial = Trial.of(module, seen) if _overlaps(module) else None
        energy = float(S.diagonal().sum())
        down = torch.linalg.solve(inner, torch.eye(len(W), dtype=W.dtype, device=W.device))
        return TransposedFactors(W, inner, down, tails, outer, shift, known, trial, outer.lost(B), energy)

    def candidates(self, group: Group, factors: object) -> Sequence[Transposed]:
        """Pairs of ranks of the grid that shrink the layer."""
        del factors
        c, o = group.layer.weight[:2]
        taps = math.prod(group.layer.kernel)
        ins = [*(r for r in rank_grid(min(c, o * taps), PAIRS) if r < c), c]
        outs = [*(r for r in rank_grid(min(o, c * taps), PAIRS) if r < o), o]
        return self.worthwhile(group, (replace(self, rank_in=i, rank_out=j) for i in ins for j in outs))

    def damage(self, factors: TransposedFactors) -> float | None:
        """Of both sides."""
        return factors.damage(self.rank_in or 0, self.rank_out or 0)

    def rewrite(self, modules: Mapping[str, nn.Module], factors: TransposedFactors) -> Rewrite:
        """Directions, the kernel between them, directions; norms equal."""
        ((name, module),) = modules.items()
        conv: Any = module
        settings = {key: list(getattr(conv, key)) for key in ("stride", "padding", "output_padding", "dilation")}
        resolved: Transposed = replace(self, **settings)  # type: ignore[arg-type]
        (c, o), i, j = conv.weight.shape[:2], self.rank_in or 0, self.rank_out or 0
        first, core, last = factors.core(i, j)
        if i < c:
            down, rest = equalize(first[None], core.flatten(1).T[None])
            first, core = down[0], rest[0].T.reshape(core.shape)
        if j < o:
            rest, up = equalize(core.transpose(0, 1).flatten(1)[None], last[None])
            core, last = rest[0].reshape(j, len(core), -1).transpose(0, 1), up[0]
        weights = [*([first] if i < c else []), core, *([last] if j < o else [])]
        made = self.filled(resolved, modules, {name: weights})
        bias = bias_of(module)
        if j < o and bias is not None and factors.shift is not None:
            behind: Any = list(made.modules[name].children())[-1]
            projected = factors.outer.up[0, :, :j] @ (factors.outer.down[0, :j] @ factors.shift.to(factors.outer.down))
            behind.bias.data += (factors.shift.to(projected) - projected).to(bias)
        return made

    def skeleton(self, group: Group) -> Mapping[str, nn.Module]:
        """Two or three layers."""
        layer = group.layer
        (c, o), (i, j) = layer.weight[:2], self._ranks(layer)
        axes = len(layer.kernel)
        if any(x is None for x in (self.stride, self.padding, self.output_padding, self.dilation)):
            raise CallError("The settings of transposed but its ranks are found out when the step is carried out.")
        settings = {key: tuple(getattr(self, key)) for key in ("stride", "padding", "output_padding", "dilation")}
        core = empty(TRANSPOSED_KINDS[axes - 1], i, j, kernel_size=layer.kernel, bias=layer.bias and j == o, **settings)
        pointwise = CONVOLUTIONS[axes]
        before = [empty(pointwise, c, i, kernel_size=1, bias=False)] if i < c else []
        behind = [empty(pointwise, j, o, kernel_size=1, bias=layer.bias)] if j < o else []
        return {layer.name: nn.Sequential(*before, core, *behind)}

    def cost(self, group: Group) -> Cost:
        """C r_in and r_in r_out taps at the input's positions, r_out o at the output's."""
        layer = group.layer
        (c, o), (i, j) = layer.weight[:2], self._ranks(layer)
        ins = sum(math.prod(call.input) for call in layer.calls) // c
        outs = sum(math.prod(call.output) for call in layer.calls) // o
        first, core, last = c * i * (i < c), i * j * math.prod(layer.kernel), j * o * (j < o)
        params = first + core + last + o * layer.bias
        macs = layer.per_sample((first + core) * ins + last * outs)
        return Cost(params, params, macs, params * layer.itemsize)

    def _ranks(self, layer: Layer) -> tuple[int, int]:
        ranks = (("rank_in", self.rank_in), ("rank_out", self.rank_out))
        i, j = (self.rank_of(key, rank, most, layer) for (key, rank), most in zip(ranks, layer.weight, strict=False))
        return i, j

    def exact_case(self, group: Group) -> tuple[Transposed, nn.Module] | None:
        """Full ranks."""
        if self.refuses(group):
            return None
        layer = group.layer
        (c, o), kind = layer.weight[:2], TRANSPOSED_KINDS[len(layer.kernel) - 1]
        return replace(self, rank_in=c, rank_out=o), seeded(
            empty(kind, c, o, kernel_size=layer.kernel, bias=layer.bias)
        )


def _gram(W: Tensor, B: OutputMoment | None) -> Tensor:
    """Sum over taps of W B Wᵀ, (c, c)."""
    if B is None:
        return W.flatten(1) @ W.flatten(1).T
    taps = W.permute(2, 1, 0)  # (taps, o, c)
    return sum((B.between(tap[None])[0] for tap in taps), W.new_zeros(len(W), len(W)))


def _outputs(W: Tensor, seen: AsideStatistics, *, biased: bool) -> tuple[Tensor, Tensor | None]:
    """Second moment (o, o) of the outputs, and their mean where a bias takes it; without data of white inputs."""
    if seen.products is None or seen.mean is None:
        flat = W.transpose(0, 1).flatten(1)
        return flat @ flat.T, None
    S, total = seen.products.to(W), seen.mean.to(W)
    if not biased:
        return S, None
    return S - torch.outer(total, total) / seen.positions, total / seen.positions


def _overlaps(module: Any) -> bool:
    """Whether an output position gets something from more than one tap."""
    axes = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    return any((k - 1) * d >= s for k, s, d in axes)

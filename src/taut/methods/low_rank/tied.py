"""Tied: the weight of an embedding that is that of output layers, too, in two factors that all of them share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from taut.core.text import some
from taut.decompose.balance import equalize
from taut.decompose.outputs import OutputMoment
from taut.decompose.svd import OutputBasis
from taut.decompose.tied import Use, lost, shared_directions
from taut.errors import CallError
from taut.methods.factorization import regular
from taut.methods.layer_factory import empty, linear, rank_grid
from taut.methods.own_kind import OwnKind, seeded
from taut.nn import Tied as End
from taut.structure.asides import AsideStatistics
from taut.structure.patches import weight_of
from taut.structure.scaled_rows import scale_of
from taut.structure.statistics import LayerStatistics
from taut.structure.support import SHARED_WEIGHT
from taut.types import Cost, Group, Layer, Rewrite

RIDGE = 1e-2
"""Share of the mean that is added to how much rows matter: no sampled label may have moved them."""


@dataclass(frozen=True)
class TiedFactors:
    """Nested directions of the shared weight's rows, and what all layers lose that keep the first r, for every r."""

    basis: OutputBasis
    damages: list[float]


@dataclass(frozen=True)
class Tied(OwnKind):
    """Low rank of a weight that an embedding and output layers share: W ~ A Bᵀ, A and B one Parameter each.

    The embedding reads rows of A and spreads them by B, an output layer gathers its inputs by B and multiplies by A:
    the tie holds, in training and on the disk. The directions are those that lose the least at all ends together: how
    often rows are read, what comes to the output layers, and how much outputs matter to the loss. Layers that share the
    weight and are never called follow the others. Source: Lan et al. 2020 (ALBERT: the factorized embedding), Chen et
    al. 2018 (GroupReduce: rows weighted by their frequency, at both ends), Van Loan and Pitsianis 1993.

    Attributes:
        rank: columns of A and B; None until resolved.
        metric: "fisher" (all of that), "data" (without how much single outputs matter) or "frobenius".
    """

    rank: int | None = None
    metric: str = "fisher"
    name: ClassVar[str] = "tied"
    plain: ClassVar[bool] = False
    of_their_own: ClassVar[tuple[str, ...]] = ()
    trades_macs: ClassVar[bool] = True

    def refuses(self, group: Group) -> str | None:
        """Layers that do not hold one weight together, or of which one has to stay."""
        first = group.layers[0]
        if any(sorted(layer.tied) != sorted(group.names) for layer in group.layers):
            reason = first.skip or "tied takes layers that share a weight, and all of these together"
            absent = [name for name in first.tied if name not in group.names] if _is_shared(first) else []
            return f"{reason}: tied takes all that hold it, and the step lacks {some(absent)}" if absent else reason
        kept = next((layer for layer in group.layers if not _is_shared(layer)), None)
        if kept is not None:
            return f"'{kept.name}', which holds its weight: {kept.skip}" if kept is not first else kept.skip
        return first.whole or self.takes(first)

    def takes(self, layer: Layer) -> str | None:
        """Weights of more than one row and column."""
        return None if min(layer.weight) > 1 else "tied: one row or column leaves nothing to factorize"

    def factor(self, modules: Mapping[str, nn.Module], stats: Mapping[str, Any]) -> TiedFactors:
        """One eigendecomposition of d x d serves every rank.

        Raises:
            CallError: the layers do not hold the same weight.
        """
        self.check_metric()
        W = _weight(modules)
        seen = {name: stats.get(name, LayerStatistics()) for name in modules}
        uses = [self._use(module, W, seen[name]) for name, module in modules.items()]
        basis = shared_directions([use for use in uses if use.rows.any()] or [_plain(W)])
        damages = torch.stack([_lost(module, W, basis, seen[name]) for name, module in modules.items()]).sum(0)
        return TiedFactors(basis, [max(0.0, value) for value in damages.tolist()])

    def _use(self, module: nn.Module, W: Tensor, known: LayerStatistics) -> Use:
        """What one layer asks of the directions, in the unit of damages."""
        if self.metric == "frobenius":
            return _plain(W)
        B, reads = known.outputs, isinstance(module, nn.Embedding)
        rows, columns = _row_weights(module, W, known), _columns(module, W, known)
        if B is not None and self.metric == "fisher":
            columns = _ridged(B, columns) if reads else columns
            rows = rows if reads else _ridged_diagonal(B)
        elif B is not None:
            rows = rows * B.diagonal().double().mean().to(rows)
        C = W.T @ (rows.to(W)[:, None] * W)
        energy = float((C * columns).sum())
        return Use(C * float(known.damage(W.new_ones(()), energy)), columns)

    def candidates(self, group: Group, factors: object) -> Sequence[Tied]:
        """Ranks of the grid that lower the parameters."""
        del factors
        ranks = rank_grid(min(group.layers[0].weight))
        return self.worthwhile(group, (replace(self, rank=rank) for rank in ranks))

    def damage(self, factors: TiedFactors) -> float | None:
        """Of all layers together."""
        return factors.damages[min(self.rank or 0, len(factors.damages) - 1)]

    def rewrite(self, modules: Mapping[str, nn.Module], factors: TiedFactors) -> Rewrite:
        """Rows along the first directions, and these; the bias of an output layer stays its own."""
        W, like, r = _weight(modules), weight_of(next(iter(modules.values()))), self.rank or 0
        up, down = factors.basis.up[..., :r].to(W), factors.basis.down[:, :r].to(W)
        first, second = equalize(down @ W.T, up)
        table, basis = (
            nn.Parameter(t.to(like).contiguous(), requires_grad=like.requires_grad) for t in (first[0].T, second[0])
        )
        built: dict[str, nn.Module] = {}
        for name, module in modules.items():
            bias = getattr(module, "bias", None)
            end: Any = _end(isinstance(module, nn.Embedding), (*W.shape, r), bias=isinstance(bias, Tensor))
            end = _holding(end, table, basis)
            if isinstance(bias, nn.Parameter):
                end.bias = bias
            built[name] = end
        return Rewrite(built, self)

    def skeleton(self, group: Group) -> Mapping[str, nn.Module]:
        """The ends, tied by their factors."""
        rows, columns = group.layers[0].weight
        rank = self._rank(group)
        table, basis = (nn.Parameter(torch.empty(size, rank)) for size in (rows, columns))
        return {
            layer.name: _holding(_end(layer.kind == "Embedding", (rows, columns, rank), bias=layer.bias), table, basis)
            for layer in group.layers
        }

    def cost(self, group: Group) -> Cost:
        """R (V + d) weights, once; r d multiply-accumulates where a row is read, r (V + d) at every output."""
        alone = self.costs(group)
        weight, first = math.prod(group.layers[0].weight), group.layers[0]
        gone = weight - self._rank(group) * sum(first.weight)
        before = group.cost
        macs = sum(cost.macs for cost in alone.values())
        return Cost(before.params - gone, before.nonzero - gone, macs, before.bytes - gone * first.itemsize)

    def costs(self, group: Group) -> dict[str, Cost]:
        """The same of every layer alone, the factors counted in each."""
        rank = self._rank(group)
        found = {}
        for layer in group.layers:
            weight, factors = math.prod(layer.weight), rank * sum(layer.weight)
            params = (layer.params - weight if layer.params >= weight else layer.params) + factors
            read = rank * sum(math.prod(call.output) for call in layer.calls)
            macs = layer.per_sample(read if layer.kind == "Embedding" else factors * layer.positions)
            found[layer.name] = Cost(params, params, macs, params * layer.itemsize)
        return found

    def _rank(self, group: Group) -> int:
        return self.rank_of("rank", self.rank, min(group.layers[0].weight), group.layers[0])

    def exact_case(self, group: Group) -> tuple[Tied, nn.Module] | None:
        """Full rank, and the first of the layers: the others hold its weight."""
        if self.refuses(group):
            return None
        first = group.layers[0]
        rows, columns = first.weight
        reads = first.kind == "Embedding"
        layer = empty(nn.Embedding, rows, columns) if reads else linear(columns, rows, bias=first.bias)
        return replace(self, rank=min(rows, columns)), seeded(layer)


def _is_shared(layer: Layer) -> bool:
    """Whether a layer is left alone for no other reason than that others hold its weight."""
    return layer.skip is not None and layer.skip.startswith(SHARED_WEIGHT.partition("'")[0])


def _weight(modules: Mapping[str, nn.Module]) -> Tensor:
    """The weight of all, in double precision."""
    weights = [weight_of(module) for module in modules.values()]
    if any(weight is not weights[0] for weight in weights):
        raise CallError(f"tied takes layers that hold one weight; {', '.join(modules)} do not (any more).")
    return weights[0].detach().double()


def _plain(W: Tensor) -> Use:
    return Use(W.T @ W, torch.eye(W.shape[1], dtype=W.dtype, device=W.device))


def _row_weights(module: nn.Module, W: Tensor, known: LayerStatistics) -> Tensor:
    """How often each row is read, times the square of what it is multiplied by; all alike of an output layer."""
    if not isinstance(module, nn.Embedding):
        return W.new_ones(len(W))
    counts = known.counts if isinstance(known, AsideStatistics) else None
    reads = W.new_ones(len(W)) if counts is None else counts.to(W)
    return reads * (scale_of(module) or 1.0) ** 2


def _columns(module: nn.Module, W: Tensor, known: LayerStatistics) -> Tensor:
    """The second moment of an output layer's inputs; no metric for what an embedding gives."""
    eye = torch.eye(W.shape[1], dtype=W.dtype, device=W.device)
    if isinstance(module, nn.Embedding) or not known.weighting.known:
        return eye
    return known.weighting.gram(eye[None, :, :, None])[0].to(W)


def _ridged(B: OutputMoment, otherwise: Tensor) -> Tensor:
    found = regular(B)
    return otherwise * B.diagonal().double().mean().to(otherwise) if found is None else found[0].to(otherwise)


def _ridged_diagonal(B: OutputMoment) -> Tensor:
    diagonal = B.diagonal()[0].double()
    return diagonal + RIDGE * diagonal.mean()


def _lost(module: nn.Module, W: Tensor, basis: OutputBasis, known: LayerStatistics) -> Tensor:
    """Damage at one layer of keeping the first r directions, for every r, by all that is known of it."""
    up, down = basis.up[0].to(W), basis.down[0].to(W)
    turned, B = W @ down.T, known.outputs
    rows, columns = _row_weights(module, W, known), _columns(module, W, known)
    C, M = turned.T @ (rows[:, None] * turned), up.T @ columns @ up
    if B is not None and isinstance(module, nn.Embedding):
        M = B.between(up[None])[0].to(W)
    elif B is not None:
        C = B.between(turned[None])[0].to(W)
    energy = float(((W.T @ (rows[:, None] * W)) * columns).sum())
    return known.damage(lost(C, M), energy)


def _end(reads: bool, sizes: tuple[int, int, int], *, bias: bool) -> nn.Module:
    """What holds A at one end, unfilled: rows that are read, or outputs."""
    rows, _, rank = sizes
    return empty(nn.Embedding, rows, rank) if reads else linear(rank, rows, bias=bias)


def _holding(table: Any, weight: nn.Parameter, basis: nn.Parameter) -> End:
    table.weight = weight
    return End(table, basis)

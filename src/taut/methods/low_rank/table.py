"""Table: an embedding of fewer columns, and a linear layer behind it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from taut.decompose.balance import equalize
from taut.decompose.linalg import metric_factor
from taut.decompose.svd import OutputBasis, directions
from taut.methods.factorization import regular
from taut.methods.layer_factory import empty, linear, rank_grid
from taut.methods.own_kind import OwnKind, seeded
from taut.structure.asides import AsideStatistics
from taut.structure.patches import weight_of
from taut.structure.scaled_rows import scale_of
from taut.structure.statistics import LayerStatistics
from taut.structure.support import TABLE
from taut.types import Cost, Group, Layer, Rewrite


@dataclass(frozen=True)
class TableFactors:
    """Nested directions of the rows and the damage of keeping the first r, for every r."""

    basis: OutputBasis
    damages: list[float]


@dataclass(frozen=True)
class Table(OwnKind):
    """Low rank of an embedding: the r directions that carry most of what is read from it.

    W ~ (W Vᵀ) U with U, V from the eigenvectors of Wᵀ D W, D how often each row is read on the calibration data (rows
    that no sample read count by the mass of those read once). It saves parameters and bytes, and costs the
    multiply-accumulates of the second layer. Source: Chen et al. 2018 (GroupReduce: frequencies as weights), Lan et
    al. 2020 (ALBERT: the factorized embedding).

    Attributes:
        rank: columns of the new table; None until resolved.
        metric: "data" (how often rows are read), "fisher" (the outputs' gradients, too) or "frobenius".
        padding_idx, sparse, scaled: as of the embedding (`scale_grad_by_freq`); found out when the step is carried out.
    """

    rank: int | None = None
    metric: str = "data"
    padding_idx: int | None = None
    sparse: bool = False
    scaled: bool = False
    name: ClassVar[str] = "table"
    of_their_own: ClassVar[tuple[str, ...]] = (TABLE,)
    trades_macs: ClassVar[bool] = True

    def takes(self, layer: Layer) -> str | None:
        """Embeddings of more than one row and column."""
        return None if min(layer.weight) > 1 else "table: one row or column leaves nothing to factorize"

    def factor(self, modules: Mapping[str, nn.Module], stats: Mapping[str, Any]) -> TableFactors:
        """One eigendecomposition of d x d serves every rank."""
        ((name, module),) = modules.items()
        known = stats.get(name, LayerStatistics())
        W, counts = _wide(module), self.counts(known)
        D = torch.ones(len(W), dtype=torch.float64) if counts is None else counts.to(W.device)
        S = (W.T @ (D.to(W)[:, None] * W))[None]
        response = regular(known.outputs) if self.metric == "fisher" else None
        basis = directions(S, None if response is None else metric_factor(response))
        energy = float(S.diagonal(dim1=1, dim2=2).sum())
        return TableFactors(basis, self.damages(known, basis.lost(known.outputs), energy))

    def counts(self, known: LayerStatistics) -> Tensor | None:
        """How often rows are read; None where nobody looked, or the metric is none of the data."""
        self.check_metric()
        return known.counts if isinstance(known, AsideStatistics) and self.metric != "frobenius" else None

    def candidates(self, group: Group, factors: object) -> Sequence[Table]:
        """Ranks of the grid that lower the parameters."""
        del factors
        return self.worthwhile(group, (replace(self, rank=r) for r in rank_grid(min(group.layer.weight))))

    def damage(self, factors: TableFactors) -> float | None:
        """Tail of the spectrum."""
        return factors.damages[min(self.rank or 0, len(factors.damages) - 1)]

    def rewrite(self, modules: Mapping[str, nn.Module], factors: TableFactors) -> Rewrite:
        """The rows along the first directions, and these."""
        ((name, module),) = modules.items()
        table: Any = module
        settings = {"padding_idx": table.padding_idx, "sparse": table.sparse, "scaled": table.scale_grad_by_freq}
        resolved = replace(self, **settings)
        r = self.rank or 0
        W = _wide(module)
        up, down = (t[0].to(W) for t in (factors.basis.up[..., :r], factors.basis.down[:, :r]))
        rows, turned = equalize((down @ W.T)[None], up[None])
        return self.filled(resolved, modules, {name: [rows[0].T, turned[0]]})

    def skeleton(self, group: Group) -> Mapping[str, nn.Module]:
        """An embedding and a linear layer."""
        layer, r = group.layer, self._rank(group.layer)
        table: Any = empty(
            nn.Embedding,
            layer.weight[0],
            r,
            padding_idx=self.padding_idx,
            sparse=self.sparse,
            scale_grad_by_freq=self.scaled,
        )
        return {layer.name: nn.Sequential(table, linear(r, layer.weight[1], bias=False))}

    def cost(self, group: Group) -> Cost:
        """R (rows + columns) weights, of which r columns run at every position that is read."""
        layer, r = group.layer, self._rank(group.layer)
        params = r * sum(layer.weight)
        macs = r * sum(math.prod(call.output) for call in layer.calls)
        return Cost(params, params, layer.per_sample(macs), params * layer.itemsize)

    def _rank(self, layer: Layer) -> int:
        return self.rank_of("rank", self.rank, min(layer.weight), layer)

    def exact_case(self, group: Group) -> tuple[Table, nn.Module] | None:
        """Full rank."""
        if self.refuses(group):
            return None
        rows, columns = group.layer.weight
        return replace(self, rank=min(rows, columns)), seeded(empty(nn.Embedding, rows, columns))


def _wide(module: nn.Module) -> Tensor:
    """The rows as they are given, in double precision: some embeddings multiply them by a number."""
    rows = weight_of(module).detach().double()
    return rows * ((scale_of(module) if isinstance(module, nn.Embedding) else None) or 1.0)

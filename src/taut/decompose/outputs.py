"""The second moment of a layer's output gradients: a matrix, or for wide outputs rows that have it.

A head of 50,000 words would need 10 GB for the matrix; what is asked of it are a diagonal and squared errors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from taut.decompose.weighting import Weighting

LIMIT = 2048
"""Outputs per group up to which the matrix itself is held (17 MB)."""

ROW_BYTES = 1 << 26
"""Memory of the rows that stand for a larger one."""


def rows_for(outputs: int) -> int:
    """How many rows stand for the matrix of that many outputs: a sum over many directions is then off by 5 %."""
    return max(256, min(1024, ROW_BYTES // (4 * outputs)))


@dataclass(frozen=True)
class OutputMoment:
    """B = E[g g^T] per group of a layer.

    Attributes:
        full: (g, o, o), or None where there are rows.
        rows: (g, m, o), with E[rows^T rows] = B and its diagonal exact.
    """

    full: Tensor | None = None
    rows: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the matrix, whether or not it is held."""
        g, _, o = self._held().shape
        return g, o, o

    def diagonal(self) -> Tensor:
        """Of the matrix, (g, o)."""
        if self.full is not None:
            return self.full.diagonal(dim1=-2, dim2=-1)
        return self._held().square().sum(1)

    def along(self, U: Tensor) -> Tensor:
        """u^T B u of the columns of U (g, o, r): (g, r), in float64."""
        if self.full is not None:
            return torch.einsum("gor,gop,gpr->gr", U.double(), self.full.double(), U.double())
        rows = self._held()
        return (rows @ U.to(rows)).double().square().sum(1)

    def between(self, W: Tensor) -> Tensor:
        """W^T B W of W (g, o, k): (g, k, k), in float64."""
        if self.full is not None:
            return W.mT.double() @ self.full.double() @ W.double()
        rows = self._held()
        seen = (rows @ W.to(rows)).double()
        return seen.mT @ seen

    def error(self, weighting: Weighting, W: Tensor) -> Tensor:
        """tr(B W A W^T) of W (g, o, c, s), summed over groups."""
        if self.full is not None:
            return (weighting.gram(W) * self.full.double()).sum()
        rows = self._held()
        seen = torch.einsum("gmo,gocs->gmcs", rows, W.to(rows))
        return W.new_tensor(weighting.energy(seen), dtype=torch.float64)

    def narrowed(self, outputs: Tensor) -> OutputMoment:
        """Of the outputs that are left: the same of every group, or whole groups."""
        held = self._held()
        g, _, o = held.shape
        groups = torch.bincount(outputs // o, minlength=g).nonzero().flatten()
        inside = (outputs[outputs // o == groups[0]] % o).to(held.device)
        part = held[groups.to(held.device)][:, :, inside]
        return OutputMoment(rows=part) if self.full is None else OutputMoment(part[:, inside])

    def _held(self) -> Tensor:
        held = self.rows if self.full is None else self.full
        if held is None:
            raise ValueError("this output moment holds neither a matrix nor rows")
        return held


def squared_error(weighting: Weighting, W: Tensor, B: OutputMoment | None) -> Tensor:
    """tr(B W A W^T) of W (g, o, c, s), summed over groups; B = I where it is not known."""
    return W.new_tensor(weighting.energy(W), dtype=torch.float64) if B is None else B.error(weighting, W)


def weighed(S: Tensor, B: OutputMoment | None) -> float:
    """tr(B S) of a second moment (o, o) of the outputs of one group; B = I where it is not known."""
    if B is None:
        return float(S.diagonal().sum())
    if B.full is not None:
        return float((S * B.full[0].to(S)).sum())
    return 0.0 if B.rows is None else float(((B.rows[0].to(S) @ S) * B.rows[0].to(S)).sum())

"""The diagonals of adaptive Fastfood that come closest to a matrix: W ~ S H G P H B, block by block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from taut.decompose.linalg import LARGE, ridge
from taut.nn.fastfood import hadamard

ROUNDS = 3
"""Of solving for G, B and S in turns."""

SHARE = 1e-9
"""Ridge of a turn's normal equations, of their mean diagonal."""


@dataclass
class Block:
    """Some rows of the matrix, and their diagonals so far; all float64.

    Attributes:
        W: (rows, inputs). A: (inputs, inputs), the metric. order: (n,), P.
        S: (rows,). G: (n,). B: (inputs,).
    """

    W: Tensor
    A: Tensor
    order: Tensor
    S: Tensor
    G: Tensor
    B: Tensor

    def solve(self) -> None:
        """S alone, then the three in turns where n is small enough to solve for: the error never rises."""
        self.solve_outer()
        if len(self.G) > LARGE:
            return
        H = hadamard(torch.eye(len(self.G)).to(self.W))
        for _ in range(ROUNDS):
            inner = H[self.order, : len(self.B)]
            outer = self.S[:, None] * H[: len(self.S)]
            self.G += _turn(outer, inner * self.B, self._rest(), self.A)
            self.B += self._inputs(outer * self.G @ inner)
            self.solve_outer()

    def solve_outer(self) -> None:
        """The best S for G and B as they are; rows that these map to nothing get zero."""
        V = self._unscaled()
        seen = V @ self.A
        norm = (seen * V).sum(1)
        self.S = torch.where(norm > 0, (seen * self.W).sum(1) / torch.where(norm > 0, norm, 1.0), 0.0)

    def _unscaled(self) -> Tensor:
        """H G P H B, the rows that are used."""
        n = len(self.G)
        first = hadamard(torch.nn.functional.pad(torch.diag(self.B), (0, n - len(self.B))))
        return hadamard(first[:, self.order] * self.G)[:, : len(self.W)].mT

    def _rest(self) -> Tensor:
        return self.W - self.S[:, None] * self._unscaled()

    def _inputs(self, T: Tensor) -> Tensor:
        """The step of B that minimizes |R - T diag(step)| in the metric."""
        normal = ridge((T.mT @ T * self.A)[None], SHARE)[0]
        right = (T * (self._rest() @ self.A)).sum(0)
        step: Tensor = torch.linalg.solve(normal, right)
        return step


def _turn(outer: Tensor, inner: Tensor, rest: Tensor, A: Tensor) -> Tensor:
    """The step of G that minimizes |R - outer diag(step) inner| in the metric; (rows, n) and (n, inputs)."""
    seen = inner @ A
    normal = ridge((outer.mT @ outer * (seen @ inner.mT))[None], SHARE)[0]
    step: Tensor = torch.linalg.solve(normal, ((outer.mT @ rest) * seen).sum(1))
    return step

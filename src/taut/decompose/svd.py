"""Singular value decomposition of a layer's weight in the metric of its inputs, and optionally of its outputs.

W ~ P^{-1} Q_r Q_r^T P W with Q the left singular vectors of P W A^{1/2}: the best rank-r weight for
tr(P dW A dW^T P^T) (Eckart-Young). P = I gives the data metric, P^T P = B the Kronecker-factored Fisher.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from taut.decompose.linalg import few, left_basis, metric_factor, spectrum
from taut.decompose.outputs import OutputMoment
from taut.decompose.weighting import Weighting


@dataclass(frozen=True)
class OutputBasis:
    """Nested output directions of a weight.

    Attributes:
        up: (g, o, R), P^{-1} Q.
        down: (g, R, o), Q^T P.
        energy: (g, R), squared singular values, descending.
    """

    up: Tensor
    down: Tensor
    energy: Tensor

    def lost(self, B: OutputMoment | None) -> Tensor:
        """Damage tr(B dW A dW^T) of keeping the first r directions, for r = 0 ... R: (R + 1,), summed over groups."""
        up = self.up.double()
        weight = up.square().sum(-2) if B is None else B.along(up)
        tail = (self.energy * weight).sum(0).flip(0).cumsum(0).flip(0)
        return torch.cat([tail, tail.new_zeros(1)])


def output_basis(W: Tensor, weighting: Weighting, B: Tensor | None = None, rank: int | None = None) -> OutputBasis:
    """The nested output basis of W (g, o, c, s); with B (g, o, o) in the Fisher metric, else in the data metric.

    `rank` is how many directions are wanted, None for all: a few are found much faster.
    """
    half = None if B is None else metric_factor(B)
    o, k = W.shape[1], W.shape[2] * W.shape[3]
    if rank is not None and few(rank, min(o, k)) and half is None and not weighting.known:
        Q, energy = left_basis(W.flatten(2), rank)
        return _basis(Q, energy, None)
    if o <= k:
        S = weighting.gram(W)
        return directions(S, half, rank)
    X = weighting.whitened(W)
    Q, energy = left_basis(X if half is None else half[0] @ X, rank)
    return _basis(Q, energy, half)


def completed(W: Tensor, up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The first `rank` directions; where there are fewer, those of what they leave of the weight follow.

    Args:
        W: (g, o, k).
        up: (g, o, r).
        down: (g, r, o); up down is a projection.
        rank: at most min(o, k).
    """
    missing = rank - up.shape[-1]
    if missing <= 0:
        return up[..., :rank], down[:, :rank]
    rest = left_basis(W - up @ (down @ W), missing)[0].to(up)
    return torch.cat([up, rest], -1), torch.cat([down, rest.mT - (rest.mT @ up) @ down], 1)


def directions(S: Tensor, half: tuple[Tensor, Tensor] | None = None, rank: int | None = None) -> OutputBasis:
    """The output basis of a second moment S = W A W^T (g, o, o); `half` is (P, P^{-1}) with P^T P = B, or None."""
    Q, energy = spectrum(S if half is None else half[0] @ S @ half[0].mT, rank)
    return _basis(Q, energy, half)


def _basis(Q: Tensor, energy: Tensor, half: tuple[Tensor, Tensor] | None) -> OutputBasis:
    if half is None:
        return OutputBasis(Q, Q.mT, energy)
    return OutputBasis(half[1] @ Q, Q.mT @ half[0], energy)

"""Nested input bases: the shared core of Tucker-2 (channels) and spatial SVD (channels and one kernel axis).

The weight of a group is a matrix W (o, F P): F features that a first layer mixes, P offsets that the second layer
still sees. A basis V (F, r) replaces the F features by r, and the best second layer on those is the projection

    U_r = W A M_r^T (M_r A M_r^T)^{-1},   M_r = V_r^T (x) I_P,   A = E[x x^T].

V comes from the whitened unfolding, so its columns are nested; ONE Cholesky factor L of M A M^T (all columns, ordered
by column) then serves every r, because its leading block is the factor of the leading block:

    Z = L^{-1} M A W^T,   U_r = L[:rP, :rP]^{-T} Z[:rP],   tr(U_r M_r A W^T) = ||Z[:rP]||^2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from taut.decompose.linalg import cholesky, left_basis, ridge
from taut.decompose.outputs import OutputMoment, squared_error
from taut.decompose.weighting import RIDGE, WIDE, Weighting


@dataclass(frozen=True)
class InputBasis:
    """A nested basis of the input features with everything needed to solve for the rest.

    Attributes:
        V: (g, F, R), the features are V_r^T x.
        Z: (g, R P, o), orthogonalized responses, ordered by basis column.
        root: (g, R P, R P), lower triangular L, or None where M A M^T is the identity.
        P: offsets.
    """

    V: Tensor
    Z: Tensor
    root: Tensor | None
    P: int

    def solve(self, r: int) -> Tensor:
        """U_r (g, o, r, P) in float64: the best second layer on the first r features."""
        k = r * self.P
        U = self.Z[:, :k].double()
        if self.root is not None:
            U = torch.linalg.solve_triangular(self.root[:, :k, :k].double().mT, U, upper=True)
        return U.mT.reshape(*U.mT.shape[:2], r, self.P)

    def explained(self, r: int) -> Tensor:
        """U_r M_r A W^T = Z_r^T Z_r (g, o, o): the part of W A W^T that r features keep."""
        Z = self.Z[:, : r * self.P].double()
        return Z.mT @ Z


def input_basis(
    W: Tensor, weighting: Weighting, features: int, response: Tensor | None = None, rank: int | None = None
) -> InputBasis:
    """The nested basis of the first `features` = F input coordinates.

    Args:
        W: (g, o, c, s) with c s = F P, the F slow and the P fast.
        weighting: metric of the inputs; its sketch form is not supported here.
        features: F.
        response: (g, o, o) weight of the outputs (B^{1/2}), or None: it turns the basis towards what matters.
        rank: columns wanted, None for all; the work after the basis grows with their square.

    Returns:
        The basis, stored in W's dtype.
    """
    g, o = W.shape[:2]
    flat = W.reshape(g, o, features, -1).double()
    P = flat.shape[-1]
    weighed = flat if response is None else torch.einsum("gqo,gofp->gqfp", response.double(), flat)
    unfolded = weighed.permute(0, 2, 3, 1).flatten(2)  # (g, F, P o)
    if weighting.full is not None:
        V, Z, root = _project_full(unfolded, flat, weighting, P, rank)
        return InputBasis(V.to(W.dtype), Z.to(W.dtype), root.to(W.dtype), P)
    L = _channel_root(weighting, W.shape[2], features)
    if L is None:
        U, _ = left_basis(unfolded, rank)
        V, back = U, U.mT
    else:
        U, _ = left_basis(L.mT @ unfolded, rank)
        V, back = torch.linalg.solve_triangular(L.mT, U, upper=True), U.mT @ L.mT
    Z = torch.einsum("grf,gofp->grpo", back, flat).flatten(1, 2)
    return InputBasis(V.to(W.dtype), Z.to(W.dtype), None, P)


def _channel_root(weighting: Weighting, channels: int, features: int) -> Tensor | None:
    """Cholesky factor of A_c (x) I over the F features, or None for the Frobenius norm."""
    if weighting.channel is None:
        return None
    L = cholesky(ridge(weighting.channel, RIDGE))
    rest = features // channels
    eye = torch.eye(rest, dtype=L.dtype, device=L.device)
    return torch.einsum("gcd,ij->gcidj", L, eye).flatten(3).flatten(1, 2) if rest > 1 else L


def _project_full(
    unfolded: Tensor, flat: Tensor, weighting: Weighting, P: int, rank: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    g, F = unfolded.shape[:2]
    work = torch.float64 if F * P <= WIDE else torch.float32  # of products alone: what is factorized is float64
    A4 = weighting.regular().view(g, F, P, F, P)
    L_f = cholesky(torch.einsum("gfphp->gfh", A4) / P)
    U, _ = left_basis(L_f.mT @ unfolded, rank)
    V = torch.linalg.solve_triangular(L_f.mT, U, upper=True)
    M = V.to(work)
    MA = torch.einsum("gfr,gfphq->grphq", M, A4.to(work))  # (g, R, P, F, P)
    G = torch.einsum("grphq,ghs->grpsq", MA, M)
    size = V.shape[-1] * P
    response = (MA.reshape(g, size, F * P) @ flat.flatten(2).to(work).mT).double()
    del A4, MA
    L = cholesky(G.reshape(g, size, size))
    return V, torch.linalg.solve_triangular(L, response, upper=False), L


def unexplained(W: Tensor, weighting: Weighting, B: OutputMoment | None, basis: InputBasis) -> Tensor:
    """tr(B (W A W^T - Z_r^T Z_r)) for r = 0 ... R, (R + 1,), summed over groups: what r features leave out."""
    Z = basis.Z.double()
    single = Z.square().sum(-1) if B is None else B.along(Z.mT)
    gained = single.sum(0).reshape(-1, basis.P).sum(-1).cumsum(0)
    total = squared_error(weighting, W, B).to(gained)
    return (total - torch.cat([gained.new_zeros(1), gained])).clamp_min(0)

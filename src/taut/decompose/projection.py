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
        P: offsets.
        metric: of the inputs, where M A M^T is not the identity; its factor is as large as A, and made when asked for.
    """

    V: Tensor
    Z: Tensor
    P: int
    metric: Weighting | None = None

    def solve(self, r: int) -> Tensor:
        """U_r (g, o, r, P) in float64: the best second layer on the first r features."""
        U = self.Z[:, : r * self.P].double()
        if self.metric is not None:
            L = cholesky(_moved(self.metric, self.V[..., :r].double(), self.P)[1])
            U = torch.linalg.solve_triangular(L.mT, U, upper=True)
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
        V, Z = _project_full(unfolded, flat, weighting, P, rank)
        return InputBasis(V.to(W.dtype), Z.to(W.dtype), P, weighting)
    L = _channel_root(weighting, W.shape[2], features)
    if L is None:
        U, _ = left_basis(unfolded, rank)
        V, back = U, U.mT
    else:
        U, _ = left_basis(L.mT @ unfolded, rank)
        V, back = torch.linalg.solve_triangular(L.mT, U, upper=True), U.mT @ L.mT
    Z = torch.einsum("grf,gofp->grpo", back, flat).flatten(1, 2)
    return InputBasis(V.to(W.dtype), Z.to(W.dtype), P)


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
) -> tuple[Tensor, Tensor]:
    L_f = cholesky(torch.einsum("gfphp->gfh", _by_offset(weighting, P)) / P)
    U, _ = left_basis(L_f.mT @ unfolded, rank)
    V = torch.linalg.solve_triangular(L_f.mT, U, upper=True)
    MA, G = _moved(weighting, V, P)
    response = (MA @ flat.flatten(2).to(MA).mT).double()
    del MA
    return V, torch.linalg.solve_triangular(cholesky(G), response, upper=False)


def _moved(weighting: Weighting, V: Tensor, P: int) -> tuple[Tensor, Tensor]:
    """M A (g, r P, F P) and M A M^T for the columns of V; of many inputs in float32, which its factor is not."""
    A4 = _by_offset(weighting, P)
    V = V.to(A4)
    MA = torch.einsum("gfr,gfphq->grphq", V, A4)
    G = torch.einsum("grphq,ghs->grpsq", MA, V)
    size = V.shape[-1] * P
    return MA.reshape(len(V), size, A4.shape[1] * P), G.reshape(len(V), size, size)


def _by_offset(weighting: Weighting, P: int) -> Tensor:
    """A with its ridge as (g, F, P, F, P)."""
    wide = weighting.full is not None and weighting.full.shape[-1] > WIDE
    A = weighting.regular(torch.float32 if wide else torch.float64)
    return A.view(len(A), -1, P, A.shape[-1] // P, P)


def unexplained(W: Tensor, weighting: Weighting, B: OutputMoment | None, basis: InputBasis) -> Tensor:
    """tr(B (W A W^T - Z_r^T Z_r)) for r = 0 ... R, (R + 1,), summed over groups: what r features leave out."""
    Z = basis.Z.double()
    single = Z.square().sum(-1) if B is None else B.along(Z.mT)
    gained = single.sum(0).reshape(-1, basis.P).sum(-1).cumsum(0)
    total = squared_error(weighting, W, B).to(gained)
    return (total - torch.cat([gained.new_zeros(1), gained])).clamp_min(0)

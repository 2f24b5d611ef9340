"""Sums of rank-1 terms in the metric of the data, as far as it is a product over the modes; the outputs beyond that.

tr(B dW A dW^T) with A ~ A_c (x) A_1 (x) A_2 ... over inputs and kernel axes is the Frobenius norm of dW with the root
of each factor on its mode: so terms stay terms. The outputs, the last layer, are then solved again in the whole A,
which no product restricts: U = W A Z^T (Z A Z^T)^{-1}, Z the terms without their outputs. Source of the metric: Denton
et al. 2014, section 3.2.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from taut.decompose.als import DAMPING, LIMIT, khatri_rao
from taut.decompose.linalg import gram, ridge, root
from taut.decompose.weighting import RIDGE, Weighting

Roots = list[tuple[Tensor, Tensor] | None]


def mode_roots(weighting: Weighting, B: Tensor | None, sizes: Sequence[int]) -> Roots:
    """Roots of the metric of every mode and their inverses, None where it is the identity.

    Args:
        weighting: of the inputs; a sketch is not used here.
        B: (g, o, o), metric of the outputs, or None.
        sizes: of the inputs and of every kernel axis, (c, k_1, ...).

    Returns:
        For (outputs, inputs, axis 1, ...).
    """
    moments: list[Tensor | None] = [B, *[None] * len(sizes)]
    if weighting.channel is not None:
        moments[1] = ridge(weighting.channel, RIDGE)
    elif weighting.full is not None:
        A = weighting.regular()
        total = A.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
        wide = A.reshape(len(A), *sizes, *sizes)
        for mode, size in enumerate(sizes):
            if size > 1 or mode == 0:
                moments[1 + mode] = _partial_trace(wide, mode) / (total if mode else 1)
    return [None if moment is None else root(moment) for moment in moments]


def _partial_trace(A: Tensor, keep: int) -> Tensor:
    """A (g, d_1, ..., d_m, d_1, ..., d_m) with all pairs of axes but one traced over, (g, d, d)."""
    m = (A.ndim - 1) // 2
    columns = [m if axis == keep else axis for axis in range(m)]
    inputs = [m + 1, *range(m), *columns]
    traced: Tensor = torch.einsum(A, inputs, [m + 1, keep, m])
    return traced


def on_modes(X: Tensor, roots: Roots) -> Tensor:
    """X (g, o, c, k_1, ...) with the root of every mode's metric applied."""
    for mode, pair in enumerate(roots, 1):
        if pair is not None:
            turned = X.movedim(mode, 1)
            X = (pair[0] @ turned.flatten(2)).reshape(turned.shape).movedim(1, mode)
    return X.contiguous()


def solve_outputs(W: Tensor, factors: Sequence[Tensor], weighting: Weighting) -> Tensor:
    """The best factor of the outputs for given others, (g, o, rank), in the whole metric of the inputs.

    Terms that would cancel each other are held by a ridge, as in the sweeps.

    Args:
        W: (g, o, c, s).
        factors: of the outputs (not read), the inputs and every kernel axis, (g, d, rank).
        weighting: of the inputs.
    """
    features = khatri_rao(list(factors[1:])).mT  # (g, rank, c s)
    norms = features.norm(dim=-1, keepdim=True)
    features = features / norms.clamp_min(1e-300)
    rank = features.shape[1]
    S = gram(weighting.whitened(torch.cat([features.reshape(len(W), -1, *W.shape[2:]), W.double()], 1)))
    normal, response, energy = S[:, :rank, :rank], S[:, rank:, :rank], W.double().flatten(1).square().sum(1)
    solved = response
    for share in (DAMPING, LIMIT**-2):
        solved = torch.linalg.solve(ridge(normal, share), response.mT).mT
        if bool((solved.flatten(1).square().sum(1) <= LIMIT**2 * energy).all()):
            break
    outputs: Tensor = solved / norms.mT.clamp_min(1e-300)
    return outputs

"""Low rank with a weight of its own for every entry: min over rank r of ||a * (W - U V)||_F^2, by alternation.

The Mahalanobis metric of Denton et al. 2014 (equation 2) weighs every weight with the root mean square a of its
gradient. Their recipe, a^{-1} * (low rank of a * W), is of FULL rank, so it makes nothing smaller and cannot be
deployed; this is the best that can. Where a is nearly an outer product of a factor per input and one per output, the
metric "mahalanobis" of the methods, which is exact for such a, costs nothing and loses little.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from taut.errors import CallError

DAMPING = 1e-9


def weighted_low_rank(W: Tensor, a: Tensor, rank: int, sweeps: int = 30, tol: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Factors U (m, r) and V (r, n) of the alternation that starts from the best separable weights.

    Args:
        W: (m, n).
        a: (m, n), not negative.
        rank: r.
        sweeps: updates of both factors at most.
        tol: stop where the relative error falls by less.

    Raises:
        CallError: the shapes differ, or a weight is negative or not finite.
    """
    if W.ndim != 2 or a.shape != W.shape or not bool((a >= 0).all()) or not bool(torch.isfinite(a).all()):
        raise CallError(f"Weights of shape {tuple(W.shape)} are needed, finite and not negative. Got {tuple(a.shape)}.")
    X, S = W.double(), a.double().square()
    rows, columns = (S.mean(axis).clamp_min(1e-12 * float(S.mean()) + 1e-300).sqrt() for axis in (1, 0))
    U, s, Vh = torch.linalg.svd(rows[:, None] * X * columns, full_matrices=False)
    left = (U[:, :rank] * s[:rank]) / rows[:, None]
    right = Vh[:rank] / columns
    error = _error(X, S, left, right)
    for _ in range(sweeps):
        right = _half(X, S, left).T
        left = _half(X.T, S.T, right.T)
        before, error = error, _error(X, S, left, right)
        if before - error <= tol * max(before, 1e-300):
            break
    return left.to(W), right.to(W)


def weighted_error(W: Tensor, a: Tensor, U: Tensor, V: Tensor) -> float:
    """||a * (W - U V)|| / ||a * W||."""
    S = a.double().square()
    energy = float((S * W.double().square()).sum())
    return math.sqrt(_error(W.double(), S, U.double(), V.double()) / max(energy, 1e-300))


def _error(X: Tensor, S: Tensor, U: Tensor, V: Tensor) -> float:
    return float((S * (X - U @ V).square()).sum())


def _half(X: Tensor, S: Tensor, U: Tensor) -> Tensor:
    """The best V^T (n, r) for given U (m, r): every column of X is a weighted least-squares problem of its own."""
    pairs = (U[:, :, None] * U[:, None, :]).flatten(1)
    normal = (S.T @ pairs).reshape(-1, U.shape[1], U.shape[1])
    response = (S * X).T @ U
    lift = DAMPING * normal.diagonal(dim1=-2, dim2=-1).mean(-1) + 1e-300
    normal.diagonal(dim1=-2, dim2=-1).add_(lift[:, None])
    solved: Tensor = torch.linalg.solve(normal, response[..., None])[..., 0]
    return solved

"""The leading eigenvectors of a second moment that is only known by its products: block Lanczos, restarted thickly.

A truncation of rank r needs r directions, not all n: products with a basis of about 1.6 r columns and a few restarts
find them to rounding, where a dense eigensolver would work on the whole n x n matrix. Random sketches (Halko et al.
2011) are quicker still, and off by 1e-3 on the flat spectra that trained kernels have. Source: Wu and Simon 2000
(thick restart).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TOLERANCE = 1e-6
"""Stop when what is left to gain is expected below this share of what the directions leave out."""

CYCLES = 20
"""Restarts at most; a spectrum without any decay may end there, with an error of a few 1e-6."""


def leading(product: Callable[[Tensor], Tensor], like: Tensor, rank: int, total: float) -> tuple[Tensor, Tensor]:
    """The `rank` leading eigenvectors and eigenvalues of a positive semidefinite S (n, n).

    Args:
        product: X (n, b) -> S X.
        like: any (n, ...) tensor of the dtype and device to work in.
        rank: directions wanted, well below n.
        total: trace of S.

    Returns:
        U (n, rank) with orthonormal columns and the values (rank,), descending, in float64.
    """
    n, block = like.shape[0], max(16, -(-rank // 8))
    room = min(n - block, max(4 * block, int(1.6 * rank) + 2 * block)) // block * block
    V, H = like.new_zeros(n, room + block), like.new_zeros(room, room)
    random = torch.Generator().manual_seed(0)
    V[:, :block] = torch.linalg.qr(torch.randn(n, block, generator=random).to(like))[0]
    k, before = 0, float("inf")
    for _ in range(CYCLES):
        k, R = _extend(product, V, H, k, block)
        values, turn = (t.flip(-1) for t in torch.linalg.eigh(H[:k, :k].double()))
        outside = max(0.0, total - float(values.sum())) / max(n - k, 1)
        left = _left(values[:rank], R.double() @ turn[k - block : k, :rank], outside)
        if left <= TOLERANCE * (total - float(values[:rank].sum())) or left >= before / 2:
            break  # converged, or down to rounding
        before = left
        keep = min(-(-(rank + block) // block) * block, k - block)
        V[:, : keep + block] = torch.cat([V[:, :k] @ turn[:, :keep].to(V), V[:, k : k + block]], 1)
        H.zero_()[:keep, :keep] = torch.diag(values[:keep]).to(H)
        k, turn = keep, torch.eye(keep, dtype=turn.dtype, device=turn.device)
    U = torch.linalg.qr(V[:, :k] @ turn[:k, :rank].to(V))[0]
    return U.double(), values[:rank].clamp_min(0)


def _extend(product: Callable[[Tensor], Tensor], V: Tensor, H: Tensor, k: int, block: int) -> tuple[int, Tensor]:
    """Fill the basis V with residuals of its newest block; H = V^T S V. Gives the size and the last residual's norm."""
    R = V.new_zeros(block, block)
    while k + block <= len(H):
        done = V[:, : k + block]
        Z = product(done[:, k:])
        C = done.mT @ Z
        Z = Z - done @ C
        H[: k + block, k : k + block], H[k : k + block, : k + block] = C, C.mT
        Z, R = torch.linalg.qr(Z - done @ (done.mT @ Z))
        again = Z - done @ (done.mT @ Z)  # a residual of almost nothing leaves rounding alone, in any direction
        V[:, k + block : k + 2 * block] = torch.linalg.qr(again)[0]
        k += block
    return k, R


def _left(values: Tensor, residuals: Tensor, outside: float) -> float:
    """Sum of |residual|^2 / (value - mean value outside the basis): by how much the values are still going to grow."""
    gaps = (values - outside).clamp_min(1e-12 * float(values[0].clamp_min(1e-300)))
    return float((residuals.square().sum(0) / gaps).sum())

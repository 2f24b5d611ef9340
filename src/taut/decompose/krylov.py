"""The leading eigenvectors of a second moment that is only known by its products: block Lanczos, restarted thickly.

A truncation of rank r needs r directions, not all n: products with a basis of about 1.6 r columns and a few restarts
find them to rounding, where a dense eigensolver would work on the whole n x n matrix. Random sketches (Halko et al.
2011) are quicker still, and off by 1e-3 on flat spectra. What does not converge is given back to the dense solver.
Source: Wu and Simon 2000 (thick restart).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TOLERANCE = 1e-6
"""Stop when what is left to gain is expected below this share of what the directions leave out."""

CYCLES = 12
"""Restarts at most: after these a dense solver would have been quicker."""

LOOSE = 1e-3
"""Inner products of basis vectors above this betray a basis that is none."""

Product = Callable[[Tensor], Tensor]


def leading(product: Product, like: Tensor, rank: int, total: float) -> tuple[Tensor, Tensor] | None:
    """The `rank` leading eigenvectors and eigenvalues of a positive semidefinite S (n, n).

    Args:
        product: X (n, b) -> S X.
        like: any (n, ...) tensor of the dtype and device to work in.
        rank: directions wanted, at most a fifth of n.
        total: trace of S.

    Returns:
        U (n, rank) with orthonormal columns and the values (rank,), descending, in float64; None where the spectrum
        is too flat for it to converge, or too steep for the dtype.
    """
    n, block = like.shape[0], max(16, -(-rank // 8))
    room = (int(1.6 * rank) + 3 * block) // block * block
    if not 0 < rank <= room - 2 * block <= n - 3 * block:
        raise ValueError(f"{rank} of {n} directions are too many for a Krylov basis")
    basis = _Basis(product, like, block, room)
    got = before = -1.0
    for _ in range(CYCLES):
        broken = basis.fill()
        if broken and like.dtype != torch.float64:
            return None  # residuals are down to rounding: a case for float64
        values, turn = (t.flip(-1) for t in torch.linalg.eigh(basis.H.double()))
        left = _left(values, basis.R.double() @ turn[-block:, :rank], rank, (total - float(values.sum())) / (n - room))
        gain, got = float(values[:rank].sum()) - got, float(values[:rank].sum())
        rounding = torch.finfo(like.dtype).eps * total
        enough = TOLERANCE * max(total - got, rounding)
        if (broken and gain <= enough) or (not broken and left <= enough) or (gain <= rounding and left >= before / 2):
            return basis.vectors(turn[:, :rank], values[:rank])
        before = left
        basis.restart(values, turn, -(-(rank + block) // block) * block)
    return None


class _Basis:
    """Orthonormal V, grown by blocks, with H = V^T S V and the residual R of the newest block."""

    def __init__(self, product: Product, like: Tensor, block: int, room: int) -> None:
        self.product, self.block, self.size = product, block, 0
        self.random = torch.Generator().manual_seed(0)
        self.V, self.H = like.new_zeros(like.shape[0], room + block), like.new_zeros(room, room)
        self.R = like.new_zeros(block, block)
        self.V[:, :block] = torch.linalg.qr(self._noise(block))[0]

    def fill(self) -> bool:
        """Add residuals of the newest block until V is full; whether any was but rounding, and noise took its place."""
        broken = False
        while self.size < len(self.H):
            done = self.V[:, : self.size + self.block]
            Z = self.product(done[:, self.size :])
            C = done.mT @ Z
            self.H[: self.size + self.block, self.size : self.size + self.block] = C
            self.H[self.size : self.size + self.block, : self.size + self.block] = C.mT
            size = Z.norm(dim=0)
            Z = Z - done @ C
            Q, self.R = torch.linalg.qr(Z - done @ (done.mT @ Z))
            lost = self.R.diagonal().abs() <= 10 * torch.finfo(Z.dtype).eps * size
            if bool(lost.any()):
                Q[:, lost] = self._noise(int(lost.sum()))
                Q = torch.linalg.qr(Q - done @ (done.mT @ Q))[0]
                broken = True
            Q = torch.linalg.qr(Q - done @ (done.mT @ Q))[0]
            self.size += self.block
            self.V[:, self.size : self.size + self.block] = Q
        return broken

    def restart(self, values: Tensor, turn: Tensor, keep: int) -> None:
        """Keep the leading directions and the newest residual, drop the rest."""
        kept = self.V[:, : self.size] @ turn[:, :keep].to(self.V)
        self.V[:, : keep + self.block] = torch.cat([kept, self.V[:, self.size :]], 1)
        self.H.zero_()[:keep, :keep] = torch.diag(values[:keep]).to(self.H)
        self.size = keep

    def vectors(self, turn: Tensor, values: Tensor) -> tuple[Tensor, Tensor] | None:
        """The directions `turn` of the basis with their values, unless rounding has spoiled the basis."""
        U = self.V[:, : self.size] @ turn.to(self.V)
        eye = torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
        if not float((U.mT @ U - eye).abs().max()) < LOOSE:
            return None
        return torch.linalg.qr(U)[0].double(), values.clamp_min(0)

    def _noise(self, columns: int) -> Tensor:
        return torch.randn(len(self.V), columns, generator=self.random).to(self.V)


def _left(values: Tensor, residuals: Tensor, rank: int, outside: float) -> float:
    """Sum of |residual|^2 / (value - mean value outside the basis): by how much the values are still going to grow."""
    gaps = (values[:rank] - max(0.0, outside)).clamp_min(1e-12 * float(values[0].clamp_min(1e-300)))
    return float((residuals.square().sum(0) / gaps).sum())

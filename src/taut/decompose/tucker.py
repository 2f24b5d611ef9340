"""Tucker-2 of a kernel in the Frobenius norm: higher-order orthogonal iteration without decomposing any unfolding.

W[o, c, s] ~ sum_{q, r} U[o, q] G[q, r, s] V[c, r]. Starting from the sequentially truncated HOSVD, U and V are improved
in turn; each is the dominant subspace of an unfolding, found by subspace iteration from the one before. Source: De
Lathauwer et al. 2000 (HOOI); Kim et al. 2016 (Tucker-2 of kernels).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from taut.decompose.linalg import gram, spectrum

MARGIN = 4
"""One in so many further directions is carried along by the subspace iteration, for it to converge."""

STEEP = 0.1
"""Below this relative error the small directions drown in the rounding of a Gram matrix, which squares them."""


def tucker2(W: Tensor, r_in: int, r_out: int, tol: float = 4e-5, sweeps: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Outer factors with orthonormal columns, and the core.

    Args:
        W: (g, o, c, s).
        r_in: input channels kept, at most min(c, o s).
        r_out: output channels kept, at most min(o, c s).
        tol: stop when U lowers the relative error by no more than this share of it.
        sweeps: improvements of both factors at most.

    Returns:
        V (g, c, r_in), G (g, r_out, r_in, s), U (g, o, r_out), in W's dtype.
    """
    s, c = W.shape[3], W.shape[2]
    last = W.transpose(2, 3).contiguous()  # channels last: no unfolding below has to be copied
    rows = last.flatten(1, 2)
    S = gram(rows.mT)
    total = float(S.diagonal(dim1=-2, dim2=-1).double().sum())
    V, _ = _start(S, r_in)
    inner = (rows @ V[..., :r_in]).reshape(*W.shape[:2], -1)  # (g, o, s r_in)
    U, kept = _start(gram(inner), r_out)
    errors = [_error(kept, total)]
    while len(errors) <= 2 * sweeps and not _settled(errors, tol, 2 * torch.finfo(W.dtype).eps):
        outer = (U[..., :r_out].mT @ last.flatten(2)).reshape(len(W), -1, c)  # (g, r_out s, c)
        V, kept = _follow(outer.mT, V, r_in, errors[-1])
        errors.append(_error(kept, total))
        inner = (rows @ V[..., :r_in]).reshape(*W.shape[:2], -1)
        U, kept = _follow(inner, U, r_out, errors[-1])
        errors.append(_error(kept, total))
    core = (U[..., :r_out].mT @ inner).reshape(len(W), r_out, s, r_in).transpose(2, 3)
    return V[..., :r_in], core, U[..., :r_out]


def _error(kept: float, total: float) -> float:
    return math.sqrt(max(0.0, 1 - kept / max(total, 1e-300)))


def _settled(errors: list[float], tol: float, eps: float) -> bool:
    """Whether U's last improvement was worth less than `tol`: V's next one answers to it and is about as large."""
    last = errors[-1]
    rounding = eps / max(last, 1e-300)  # of the squares, as it appears in their root
    return last == 0 or (len(errors) > 1 and errors[-2] - last <= max(tol * last, rounding))


def _width(rank: int, size: int) -> int:
    return min(size, rank + max(8, rank // MARGIN))


def _start(S: Tensor, rank: int) -> tuple[Tensor, float]:
    """The dominant eigenvectors of S (g, n, n), a few more than `rank`, and the sum of its `rank` largest values."""
    basis, values = spectrum(S)
    return basis[..., : _width(rank, S.shape[-1])].to(S.dtype), float(values[..., :rank].sum())


def _follow(T: Tensor, basis: Tensor, rank: int, error: float) -> tuple[Tensor, float]:
    """Two steps of subspace iteration for T T^T from `basis`; its directions in order, and what `rank` of them keep."""
    size = T.shape[-2]
    if basis.shape[-1] == size or rank * 2 > size:
        return _start(gram(T), rank)
    S = gram(T) if error >= STEEP else None
    for _ in range(2):
        basis = torch.linalg.qr(T @ (T.mT @ basis) if S is None else S @ basis)[0]
    small = gram(basis.mT @ T) if S is None else basis.mT @ (S @ basis)
    values, turn = torch.linalg.eigh(small.double())
    return basis @ turn.flip(-1).to(basis), float(values[..., -rank:].sum())

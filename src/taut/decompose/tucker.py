"""Tucker-2 of a kernel in the Frobenius norm: higher-order orthogonal iteration on Gram matrices.

W[o, c, s] ~ sum_{q, r} U[o, q] G[q, r, s] V[c, r]. Starting from the sequentially truncated HOSVD, U and V are improved
in turn; each is the dominant subspace of a small Gram matrix, found by subspace iteration from the one before, so that
no unfolding is ever decomposed. Source: De Lathauwer et al. 2000 (HOOI); Kim et al. 2016 (Tucker-2 of kernels).
"""

from __future__ import annotations

import torch
from torch import Tensor

from taut.decompose.linalg import spectrum

MARGIN = 4
"""One in so many further directions is carried along by the subspace iteration, for it to converge."""


def tucker2(W: Tensor, r_in: int, r_out: int, tol: float = 1e-5, sweeps: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Outer factors with orthonormal columns, and the core.

    Args:
        W: (g, o, c, s).
        r_in: input channels kept, at most min(c, o s).
        r_out: output channels kept, at most min(o, c s).
        tol: stop when the relative error falls by less.
        sweeps: improvements of both factors at most.

    Returns:
        V (g, c, r_in), G (g, r_out, r_in, s), U (g, o, r_out), in W's dtype.
    """
    total = float(W.double().square().sum())
    V = _start(_gram(W.transpose(1, 2)), r_in)
    U = _start(_gram(_project(W, V[..., :r_in])), r_out)
    error = 1.0
    for _ in range(sweeps):
        outer = torch.einsum("gop,gocs->gpcs", U[..., :r_out], W)
        V = _follow(_gram(outer.transpose(1, 2)), V, r_in)
        inner = _project(W, V[..., :r_in])
        U = _follow(_gram(inner), U, r_out)
        core = torch.einsum("gop,gors->gprs", U[..., :r_out], inner)
        last, error = error, max(0.0, 1 - float(core.double().square().sum()) / max(total, 1e-300)) ** 0.5
        if last - error < tol:
            break
    return V[..., :r_in], core, U[..., :r_out]


def _project(W: Tensor, V: Tensor) -> Tensor:
    return torch.einsum("gocs,gcr->gors", W, V)


def _gram(T: Tensor) -> Tensor:
    """T T^T over all but the first two axes."""
    flat = T.flatten(2)
    return flat @ flat.mT


def _width(rank: int, size: int) -> int:
    return min(size, rank + max(8, rank // MARGIN))


def _start(S: Tensor, rank: int) -> Tensor:
    """The dominant eigenvectors of S (g, n, n), a few more than `rank`."""
    basis, _ = spectrum(S)
    return basis[..., : _width(rank, S.shape[-1])].to(S.dtype)


def _follow(S: Tensor, basis: Tensor, rank: int) -> Tensor:
    """The dominant subspace of S by two steps of subspace iteration from `basis`, its directions in order."""
    if basis.shape[-1] == S.shape[-1] or rank * 2 > S.shape[-1]:
        return _start(S, rank)
    for _ in range(2):
        basis = torch.linalg.qr(S @ basis)[0]
    _, turn = torch.linalg.eigh(basis.mT @ (S @ basis))
    turned: Tensor = basis @ turn.flip(-1)
    return turned

"""Small dense algebra shared by the decompositions; batched over groups, in float64.

Of a symmetric matrix the factorizations read the lower triangle alone: none is made symmetric first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from taut.decompose.krylov import leading
from taut.errors import ModelError


def ridge(A: Tensor, share: float) -> Tensor:
    """A + share * (mean eigenvalue) * I, (g, k, k); an all-zero matrix becomes the identity."""
    lifted = A.to(torch.float64, copy=True)
    diagonal = lifted.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    diagonal.add_(torch.where(mean > 0, share * mean, 1.0))
    return lifted


def cholesky(A: Tensor) -> Tensor:
    """Lower L with L L^T = A, (g, k, k); a ridge is added, ten times more each time, where A is not definite enough."""
    share = 1e-12
    L: Tensor
    while True:
        L, info = torch.linalg.cholesky_ex(ridge(A, share))
        if not bool(info.any()):
            return L
        if not share < 1:
            raise ModelError("A second moment of the calibration data is not finite: its values are too large.")
        share *= 10


def root(A: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric A^{1/2} and A^{-1/2} of a positive definite A, (g, k, k)."""
    values, vectors = torch.linalg.eigh(A.double())
    floor = values.amax(-1, keepdim=True).clamp_min(1e-300) * 1e-14
    s = values.clamp_min(floor).sqrt()
    half: Tensor = (vectors * s[..., None, :]) @ vectors.mT
    return half, (vectors / s[..., None, :]) @ vectors.mT


def metric_factor(A: Tensor) -> tuple[Tensor, Tensor]:
    """Upper triangular P with P^T P = A, and P^{-1}, (g, k, k): all that a metric needs, much faster than `root`."""
    P = cholesky(A.double()).mT
    eye = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device).expand_as(P)
    return P, torch.linalg.solve_triangular(P, eye, upper=True)


SMALL = 256
"""Up to this size a Gram matrix is one product: blocks would cost more than the symmetry saves."""

FEW = 6
"""Up to one in so many directions, block Lanczos is quicker than a dense eigensolver."""

RESOLVED = 3e-6
"""Share of the energy left out below which squares in float32 are too coarse to tell directions apart."""

LARGE = 1024
"""Above this size eigenvectors are found in float32, twice as fast; only cuts that leave out under 1e-5 of the energy
suffer."""


def _eigh(S: Tensor) -> tuple[Tensor, Tensor]:
    try:
        values, vectors = torch.linalg.eigh(S.double() if S.shape[-1] <= LARGE else S.float())
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        if not bool(torch.isfinite(S).all()):
            raise ModelError("A second moment is not finite: the values that it is made of are too large.") from error
        values, vectors = torch.linalg.eigh(ridge(S, 1e-12))  # as good as equal eigenvalues may not converge
    return values.double(), vectors.double()


def few(rank: int | None, size: int) -> bool:
    """Whether finding `rank` directions alone is quicker than all of them."""
    return rank is not None and size >= 2 * SMALL and rank * FEW <= size


def left_basis(X: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Left singular vectors and squared singular values of X, by the eigenvectors of the SMALLER Gram matrix.

    Faster than a full SVD, the more so the less square X is. The squares lose what is below 1e-8 of the largest
    singular value (float64), which no truncation keeps; the vectors of such values are any that complete the others.

    Args:
        X: (g, m, n).
        rank: directions wanted, None for all; a few are found without decomposing anything.

    Returns:
        U (g, m, r) with orthonormal columns and s^2 (g, r), descending, r = min(m, n, rank), in float64.
    """
    m, n = X.shape[-2:]
    if rank is not None:
        found = [_leading_left(x, rank) if few(rank, min(m, n)) else None for x in X]
        return _stacked(found) or _first(left_basis(X.double()), rank)
    if m <= n:
        return spectrum(gram(X))
    values, V = _eigh(gram(X.mT))
    values, V = values.flip(-1).clamp_min(0), V.flip(-1)
    s = values.sqrt()
    good = bool((s > s.amax(-1, keepdim=True) * 1e-7).all())
    if n > LARGE or not good:  # vectors of small values are not orthogonal after a division
        return torch.linalg.qr(X.to(V) @ V)[0].double(), values.double()
    return (X.double() @ V) / s[..., None, :], values


def gram(X: Tensor, blocks: int = 4) -> Tensor:
    """X X^T (g, n, n) of X (g, n, m) in its dtype; what symmetry gives is not computed."""
    n = X.shape[-2]
    if n < SMALL:
        return X @ X.mT
    S = X.new_empty(*X.shape[:-1], n)
    for rows in _bands(n, blocks):
        piece = X[..., rows, :] @ X[..., : rows.stop, :].mT
        S[..., rows, : rows.stop] = piece
        S[..., : rows.start, rows] = piece[..., : rows.start].mT
    return S


def add_gram(S: Tensor, X: Tensor, weight: float = 1.0, blocks: int = 4) -> None:
    """Add X^T X of X (g, n, k), times `weight`, to the lower triangle of S (g, k, k), which `mirrored` completes."""
    k = X.shape[-1]
    if k < SMALL:
        S.baddbmm_(X.mT, X, alpha=weight)
        return
    for own, x in zip(S, X, strict=True):
        for rows in _bands(k, blocks):
            own[rows, : rows.stop].addmm_(x[:, rows].T, x[:, : rows.stop], alpha=weight)


def mirrored(S: Tensor) -> Tensor:
    """S (g, k, k) with its upper triangle made from the lower one, in place."""
    if S.shape[-1] < SMALL:
        return S.tril_().add_(S.tril(-1).mT)
    for own in S:
        for rows in _bands(S.shape[-1], 16):
            corner = own[rows, rows].tril()
            own[rows, rows] = corner + corner.tril(-1).T
            own[: rows.start, rows] = own[rows, : rows.start].T
    return S


def _bands(size: int, count: int) -> list[slice]:
    step = -(-size // count)
    return [slice(start, min(size, start + step)) for start in range(0, size, step)]


def _leading_left(x: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """In the dtype of x; where float32 cannot resolve what is left out, again in float64."""
    energy = float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
    found = leading(lambda V: x @ (x.mT @ V), x, rank, energy)
    if x.dtype == torch.float64 or (found is not None and energy - float(found[1].sum()) > RESOLVED * energy):
        return found
    wide = x.double()
    return _leading_of(gram(wide), rank) if len(x) <= x.shape[1] else _leading_left(wide, rank)


def _leading_of(S: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    return leading(S.matmul, S, rank, float(S.diagonal().sum()))


def _stacked(found: list[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor] | None:
    """The groups' bases as one, or None where one is missing."""
    known = [pair for pair in found if pair is not None]
    if len(known) < len(found):
        return None
    return torch.stack([U for U, _ in known]), torch.stack([values for _, values in known])


def _first(found: tuple[Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    return found[0][..., :rank], found[1][..., :rank]


def spectrum(S: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Eigenvectors (g, m, r) and eigenvalues (g, r), descending and not negative, of a second moment S (g, m, m).

    Args:
        S: in any dtype.
        rank: how many are wanted, None for all m.
    """
    if rank is not None:
        exact = [_leading_of(s, rank) if few(rank, S.shape[-1]) else None for s in S.double()]
        return _stacked(exact) or _first(spectrum(S), rank)
    values, U = _eigh(S)
    return U.flip(-1), values.flip(-1).clamp_min(0)

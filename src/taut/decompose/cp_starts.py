"""Where the fit of a sum of rank-1 terms begins: generalized eigenvectors, singular vectors, random columns."""

from __future__ import annotations

import torch
from torch import Tensor

from taut.decompose.als import khatri_rao
from taut.decompose.linalg import gram

MARGIN = 8
"""Directions more than wanted that a subspace iteration carries."""

FEW = 4
"""Up to one in so many directions, subspace iteration is quicker than a dense eigensolver."""

PLANTED = 1e-4
"""Share of a tensor's energy outside the leading subspaces from which on eigenvectors of slices say nothing."""


def leading(X: Tensor, mode: int, rank: int) -> Tensor:
    """The `rank` leading left singular vectors of the unfolding along a mode, (n, d, at most rank)."""
    values: Tensor = torch.linalg.eigh(gram(X.movedim(mode, 1).flatten(2)))[1]
    return values.flip(-1)[..., :rank]


def subspace(rows: Tensor, size: int) -> Tensor:
    """An orthonormal basis (n, d, size) close to that of the leading left singular vectors of rows (n, d, m).

    By two steps of subspace iteration with a few directions more, where these are few; what is missing, sweeps over
    the whole tensor find.
    """
    width = size + MARGIN
    if width * FEW > rows.shape[1]:
        return leading(rows, 1, size)
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(rows.shape[-1], width, generator=generator, dtype=torch.float64).to(rows)
    basis = torch.linalg.qr(rows @ basis)[0]
    basis = torch.linalg.qr(rows @ (rows.mT @ basis))[0]
    turned: Tensor = basis @ leading(basis.mT @ rows, 1, size)
    return turned


def columns(X: Tensor, rank: int, seed: int, *, random: bool) -> list[Tensor]:
    """Random unit columns (n, d_j, rank) in every mode; where not `random`, leading singular vectors come first."""
    generator = torch.Generator().manual_seed(seed)
    factors = []
    for mode in range(1, X.ndim):
        noise = torch.randn(X.shape[mode], rank, generator=generator, dtype=torch.float64).to(X)
        noise = (noise / noise.norm(dim=0)).repeat(len(X), 1, 1)  # the same for all: a stack is fitted as one by one
        if not random:
            found = leading(X, mode, rank)
            noise[..., : found.shape[-1]] = found
        factors.append(noise)
    return factors


def eigenvectors(X: Tensor, rank: int, seed: int) -> list[Tensor] | None:
    """Exact factors of a tensor of `rank` terms, if two modes are that long: two slices share their eigenvectors.

    In the leading subspaces of the two longest modes, two random combinations of the slices are M = A diag(m) B^T and
    N = A diag(n) B^T, so that M N^{-1} = A diag(m / n) A^{-1}. Source: Leurgans, Ross and Abel 1993; Sanchez and
    Kowalski 1990.

    Returns:
        Real factors (complex pairs become their real and imaginary parts), or None where no two modes are
        long enough, or much of every tensor of the stack is outside of those subspaces.
    """
    sizes = list(X.shape[1:])
    first, second = sorted(sorted(range(len(sizes)), key=lambda mode: -sizes[mode])[:2])
    others = [mode for mode in range(len(sizes)) if mode not in {first, second}]
    if min(sizes[first], sizes[second]) < rank or not others:
        return None
    U, V = leading(X, first + 1, rank), leading(X, second + 1, rank)
    slices = X.movedim((first + 1, second + 1), (1, 2)).flatten(3)
    core = torch.einsum("nabs,nar,nbq->nsrq", slices, U, V)
    energy, inside = X.flatten(1).square().sum(1), core.flatten(1).square().sum(1)
    if bool((inside < (1 - PLANTED) * energy).all()):
        return None
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(2, core.shape[1], generator=generator, dtype=torch.float64).to(X)
    M, N = torch.einsum("ps,nsrq->pnrq", mix, core)
    vectors = torch.linalg.eig(M @ torch.linalg.pinv(N))[1]
    A = torch.where(_second_of_pair(vectors)[:, None], vectors.imag, vectors.real)
    B = torch.einsum("nsrq,s->nqr", core, mix[0]) @ torch.linalg.pinv(A).mT
    normal = (A.mT @ A) * (B.mT @ B)
    rest = core.flatten(2) @ khatri_rao([A, B]) @ torch.linalg.pinv(normal, hermitian=True)
    found = {first: U @ A, second: V @ B} | _one_by_one(rest, others, sizes)
    return [found[mode] / found[mode].norm(dim=1, keepdim=True).clamp_min(1e-300) for mode in range(len(sizes))]


def _second_of_pair(vectors: Tensor) -> Tensor:
    """Which eigenvectors (n, r, r) repeat the conjugate of the one before them, (n, r)."""
    complex_ones = vectors.imag.abs().amax(1) > 0
    return complex_ones & (complex_ones.cumsum(-1) % 2 == 0)


def _one_by_one(rest: Tensor, modes: list[int], sizes: list[int]) -> dict[int, Tensor]:
    """The vectors of every term (n, s, rank) over several modes as the nearest product of one vector per mode."""
    found = {}
    for place, mode in enumerate(modes):
        tensors = rest.mT.reshape(*rest.mT.shape[:2], *(sizes[m] for m in modes))  # (n, rank, d, ...)
        turned = tensors.movedim(2 + place, 2)
        unfolded = turned.reshape(*turned.shape[:3], -1)
        found[mode] = torch.linalg.eigh(unfolded @ unfolded.mT)[1][..., -1].mT
    return found

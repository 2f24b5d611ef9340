"""Sums of rank-1 terms (CP, PARAFAC) of a stack of tensors: joint alternating least squares, or one term at a time.

T[a, b, c, ...] ~ sum_k A[a, k] B[b, k] C[c, k] ...; the terms are fitted together (Harshman 1970), or greedily, each to
what those before it left (Denton et al. 2014, equation 5). Fitting together is never worse at its best, and .42 -> .35
in the error of a kernel at eight terms.

Long modes are first cut to the subspace of their leading singular vectors, where sweeps cost little; the fits found
there are improved in a wider one, and the best of them on the whole tensor (Bro and Andersson 1998).
"""

from __future__ import annotations

import torch
from torch import Tensor

from taut.decompose.als import DAMPING, Fit, als
from taut.decompose.cp_starts import columns, eigenvectors, subspace

MODES = "abcdefgh"

FEW_SWEEPS = 30
"""Of every term where terms fitted one after the other are only the start."""

MOST_GREEDY = 32
"""Terms up to which these are a start: their work grows with the number of terms twice."""

START_DAMPING = 1e-2
"""Ridge of the first sweep. Without it ALS often ends where terms cancel."""

EXACT = 1e-7
"""Relative error from which on no further start is tried: squares in float64 resolve no less."""

LEAST = 24
"""Dimensions of a mode that are kept at least, where one is cut to its leading subspace."""

WIDER = 4
"""So many times more dimensions are kept where the fits are improved before the best of them is chosen."""

FORETASTE = 4
"""Sweeps there at most."""

POLISH = 12
"""Sweeps over the whole tensor at most."""


def cp(
    T: Tensor, rank: int, sweeps: int = 200, tol: float = 1e-6, restarts: int = 4, seed: int = 0
) -> tuple[Tensor, ...]:
    """Factors of the best of several joint fits of every tensor of a stack.

    Args:
        T: (n, d_1, ..., d_m), n tensors that are fitted on their own.
        rank: terms.
        sweeps: updates of all factors at most.
        tol: stop where the relative error falls by less than this share of it in a sweep, in every tensor.
        restarts: starting points: terms fitted one after the other (not where modes are cut or terms are many), leading
            singular vectors of the unfoldings, random ones. Generalized eigenvectors come before them where they may
            be exact.
        seed: of the random ones.

    Returns:
        One factor (n, d_j, rank) per mode, in T's dtype; the terms' columns have the same norm in every mode, and the
        energies of all terms are together at most `als.LIMIT`^2 times the tensor's.
    """
    longest = max(range(1, T.ndim), key=lambda mode: T.shape[mode])
    X, bases = _compressed(T.double().movedim(longest, -1))
    keep = max(rank, LEAST)
    middle, wide = _cut(X, WIDER * keep)
    small, narrow = _cut(middle, keep)
    cut = any(basis is not None for basis in narrow)
    fits = _fits(small, rank, (sweeps, tol, max(1, restarts), seed), one_by_one=not cut and 1 < rank <= MOST_GREEDY)
    if any(basis is not None for basis in wide):
        many = _repeated(middle, len(fits.error) // len(X))
        fits = als(many, _grown(fits.factors, narrow), min(sweeps, FORETASTE), tol)
        narrow = wide
    factors = _grown(_best(fits, len(X)).factors, narrow)
    if cut:
        factors = als(X.to(T.dtype), factors, min(sweeps, POLISH), tol).factors
    whole = _grown(factors, bases)
    whole.insert(longest - 1, whole.pop())
    return tuple(factor.to(T) for factor in levelled(whole))


def _fits(X: Tensor, rank: int, effort: tuple[int, float, int, int], *, one_by_one: bool) -> Fit:
    """Fits from all starts, side by side as a longer stack; one alone where it is exact."""
    sweeps, tol, restarts, seed = effort
    found = eigenvectors(X, rank, seed)
    first = None if found is None else als(X, found, sweeps, tol)
    if first is not None and float(first.error.max()) <= EXACT:
        return first
    starts, damping = [], []
    for start in range(restarts):
        greedily = one_by_one and start == 0
        starts.append(
            list(greedy(X, rank, FEW_SWEEPS, seed)) if greedily else columns(X, rank, seed + start, random=start > 1)
        )
        damping += [DAMPING if greedily else START_DAMPING] * len(X)
    fits = als(_repeated(X, restarts), _stacked(starts), sweeps, tol, torch.tensor(damping))
    if first is None:
        return fits
    return Fit(
        _stacked([first.factors, fits.factors]),
        torch.cat([first.error, fits.error]),
        torch.cat([first.spread, fits.spread]),
    )


def _best(fits: Fit, n: int) -> Fit:
    """Of every one of n tensors the best fit among those in the longer stack."""
    best = fits.part(slice(0, n))
    for start in range(n, len(fits.error), n):
        fit = fits.part(slice(start, start + n))
        best = best.where(fit, fit.error < best.error)
    return best


def _repeated(X: Tensor, times: int) -> Tensor:
    return X.repeat(times, *[1] * (X.ndim - 1))


def _stacked(parts: list[list[Tensor]]) -> list[Tensor]:
    return [torch.cat(factors) for factors in zip(*parts, strict=True)]


def _compressed(X: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """X in an orthonormal basis of every mode that is longer than all others together: the same fits, less work."""
    bases: list[Tensor | None] = []
    for mode in range(1, X.ndim):
        rows = X.movedim(mode, 1).flatten(2)
        if rows.shape[1] <= rows.shape[2]:
            bases.append(None)
            continue
        basis, small = torch.linalg.qr(rows)
        X = small.reshape(len(X), -1, *X.movedim(mode, 1).shape[2:]).movedim(1, mode)
        bases.append(basis)
    return X.contiguous(), bases


def _cut(X: Tensor, keep: int) -> tuple[Tensor, list[Tensor | None]]:
    """X in the leading subspace of `keep` dimensions of every mode at least twice as long, one mode after the other."""
    bases: list[Tensor | None] = []
    for mode in range(1, X.ndim):
        if X.shape[mode] < 2 * keep:
            bases.append(None)
            continue
        turned = X.movedim(mode, 1)
        basis = subspace(turned.flatten(2), keep)
        X = (basis.mT @ turned.flatten(2)).reshape(len(X), keep, *turned.shape[2:]).movedim(1, mode)
        bases.append(basis)
    return X.contiguous(), bases


def _grown(factors: list[Tensor], bases: list[Tensor | None]) -> list[Tensor]:
    """Factors, of a longer stack too, in the coordinates from before the bases were taken."""
    return [
        factor if basis is None else _repeated(basis, len(factor) // len(basis)) @ factor
        for factor, basis in zip(factors, bases, strict=True)
    ]


def greedy(T: Tensor, rank: int, sweeps: int = 64, seed: int = 0) -> tuple[Tensor, ...]:
    """The source's way: rank-1 terms one after the other, each from `sweeps` alternations on what is left.

    Args, Returns: as `cp`.
    """
    left = T.double().clone()
    terms: list[list[Tensor]] = []
    for place in range(rank):
        term = als(left, columns(left, 1, seed + place, random=False), sweeps, 0.0).factors
        left -= compose(term)
        terms.append(term)
    return tuple(torch.cat(parts, -1).to(T) for parts in zip(*(levelled(term) for term in terms), strict=True))


def compose(factors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """The tensors (n, d_1, ..., d_m) of factors (n, d_j, rank)."""
    modes = MODES[: len(factors)]
    return torch.einsum(",".join(f"n{m}z" for m in modes) + f"->n{modes}", *factors)


def levelled(factors: list[Tensor] | tuple[Tensor, ...]) -> list[Tensor]:
    """The same terms with their norm spread evenly over the modes; terms that are zero in a mode become zero."""
    norms = torch.stack([factor.norm(dim=1, keepdim=True) for factor in factors])  # (m, n, 1, rank)
    mean = norms.clamp_min(1e-300).log().mean(0).exp() * (norms > 0).all(0)
    return [factor * (mean / norm.clamp_min(1e-300)) for factor, norm in zip(factors, norms, strict=True)]

"""Sums of rank-1 terms (CP, PARAFAC) of a stack of tensors: joint alternating least squares, or one term at a time.

T[a, b, c, ...] ~ sum_k A[a, k] B[b, k] C[c, k] ...; the terms are fitted together (Harshman 1970), or greedily, each to
what those before it left (Denton et al. 2014, equation 5). Fitting together is never worse at its best, and .42 -> .35
in the error of a kernel at eight terms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from taut.decompose.als import DAMPING, als
from taut.decompose.cp_starts import columns, eigenvectors

MODES = "abcdefgh"

FEW_SWEEPS = 30
"""Of every term where terms fitted one after the other are only the start."""

START_DAMPING = 1e-2
"""Ridge of the first sweep. Without it ALS often ends where terms cancel."""

EXACT = 1e-7
"""Relative error from which on no further start is tried: squares in float64 resolve no less."""


def cp(
    T: Tensor, rank: int, sweeps: int = 200, tol: float = 1e-6, restarts: int = 4, seed: int = 0
) -> tuple[Tensor, ...]:
    """Factors of the best of several joint fits of every tensor of a stack.

    Args:
        T: (n, d_1, ..., d_m), n tensors that are fitted on their own.
        rank: terms.
        sweeps: updates of all factors at most.
        tol: stop where the relative error falls by less than this share of it in a sweep, in every tensor.
        restarts: starting points beside the generalized eigenvectors, which are exact for as many planted terms as
            two modes are long: terms fitted one after the other, leading singular vectors of the unfoldings, random
            ones.
        seed: of the random ones.

    Returns:
        One factor (n, d_j, rank) per mode, in T's dtype; the terms' columns have the same norm in every mode.
    """
    longest = max(range(1, T.ndim), key=lambda mode: T.shape[mode])
    X, bases = _compressed(T.double().movedim(longest, -1))
    best: list[Tensor] = []
    errors = X.new_full((len(X),), float("inf"))
    for start in range(-1, max(1, restarts)):
        begun = _start(X, rank, start, seed)
        if begun is None:
            continue
        factors, found = als(X, begun[0], sweeps, tol, begun[1])
        better = found < errors
        errors = torch.where(better, found, errors)
        best = [torch.where(better[:, None, None], new, old) for new, old in zip(factors, best or factors, strict=True)]
        if float(errors.max()) <= EXACT:
            break
    whole = [factor if basis is None else basis @ factor for factor, basis in zip(best, bases, strict=True)]
    whole.insert(longest - 1, whole.pop())
    return tuple(factor.to(T) for factor in levelled(whole))


def _start(X: Tensor, rank: int, start: int, seed: int) -> tuple[list[Tensor], float] | None:
    """The starting point of that number, and the ridge of the first sweep behind it."""
    if start < 0:
        found = eigenvectors(X, rank, seed)
        return None if found is None else (found, DAMPING)
    if start == 0 and rank > 1:
        return list(greedy(X, rank, FEW_SWEEPS, seed)), DAMPING
    return columns(X, rank, seed + start, random=start > 1), START_DAMPING


def _compressed(X: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """X in an orthonormal basis of every mode that is longer than all others together: the same fits, less work."""
    bases: list[Tensor | None] = []
    for mode in range(1, X.ndim):
        rows = X.movedim(mode, 1).flatten(2)
        if rows.shape[1] <= rows.shape[2]:
            bases.append(None)
            continue
        basis, small = torch.linalg.qr(rows)
        rest = X.movedim(mode, 1).shape[2:]
        X = small.reshape(len(X), -1, *rest).movedim(1, mode)
        bases.append(basis)
    return X, bases


def greedy(T: Tensor, rank: int, sweeps: int = 64, seed: int = 0) -> tuple[Tensor, ...]:
    """The source's way: rank-1 terms one after the other, each from `sweeps` alternations on what is left.

    Args, Returns: as `cp`.
    """
    left = T.double().clone()
    terms: list[list[Tensor]] = []
    for place in range(rank):
        term, _ = als(left, columns(left, 1, seed + place, random=False), sweeps, 0.0)
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

"""Sums of rank-1 terms (CP, PARAFAC) of a stack of tensors: joint alternating least squares, or one term at a time.

T[a, b, c, ...] ~ sum_k A[a, k] B[b, k] C[c, k] ...; the terms are fitted together (Harshman 1970), or greedily, each to
what those before it left (Denton et al. 2014, equation 5). Fitting together is never worse at its best, and .42 -> .35
in the error of a kernel at eight terms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from taut.decompose.linalg import gram

MODES = "abcdefgh"

DAMPING = 1e-12
"""Share of the mean diagonal added to the normal equations: terms that grow against each other stay solvable."""

FEW_SWEEPS = 30
"""Of every term where terms fitted one after the other are only the start."""

START_DAMPING = 1e-2
"""The same in the first sweep; it falls by tenths. Without it ALS often ends where terms cancel."""


def cp(
    T: Tensor, rank: int, sweeps: int = 200, tol: float = 1e-6, restarts: int = 4, seed: int = 0
) -> tuple[Tensor, ...]:
    """Factors of the best of several joint fits of every tensor of a stack.

    Args:
        T: (n, d_1, ..., d_m), n tensors that are fitted on their own.
        rank: terms.
        sweeps: updates of all factors at most.
        tol: stop where the relative error falls by less than this share of it in a sweep, in every tensor.
        restarts: starting points: terms fitted one after the other, leading singular vectors of the unfoldings,
            random ones.
        seed: of the random ones.

    Returns:
        One factor (n, d_j, rank) per mode, in T's dtype; the terms' columns have the same norm in every mode.
    """
    X, bases = _compressed(T.double())
    best: list[Tensor] = []
    errors = X.new_full((len(X),), float("inf"))
    for start in range(max(1, restarts)):
        if start == 0 and rank > 1:
            factors, damping = list(greedy(X, rank, FEW_SWEEPS, seed)), DAMPING
        else:
            generator = torch.Generator().manual_seed(seed + start)
            factors, damping = _start(X, rank, generator, random=start > 1), START_DAMPING
        factors, found = _als(X, factors, sweeps, tol, damping)
        better = found < errors
        errors = torch.where(better, found, errors)
        best = [torch.where(better[:, None, None], new, old) for new, old in zip(factors, best or factors, strict=True)]
    whole = [factor if basis is None else basis @ factor for factor, basis in zip(best, bases, strict=True)]
    return tuple(factor.to(T) for factor in levelled(whole))


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
        start = _start(left, 1, torch.Generator().manual_seed(seed + place), random=False)
        term, _ = _als(left, start, sweeps, 0.0, DAMPING)
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


def _start(X: Tensor, rank: int, generator: torch.Generator, *, random: bool) -> list[Tensor]:
    factors = []
    for mode in range(1, X.ndim):
        size = X.shape[mode]
        noise = torch.randn(size, rank, generator=generator, dtype=torch.float64).to(X)
        noise = (noise / noise.norm(dim=0)).repeat(len(X), 1, 1)  # the same for all: a stack is fitted as one by one
        if not random:
            rows = X.movedim(mode, 1).flatten(2)
            leading = torch.linalg.eigh(gram(rows))[1].flip(-1)[..., :rank]
            noise[..., : leading.shape[-1]] = leading
        factors.append(noise)
    return factors


def _als(X: Tensor, factors: list[Tensor], sweeps: int, tol: float, damping: float) -> tuple[list[Tensor], Tensor]:
    """Sweeps over the modes; the relative error of every tensor."""
    energy = X.flatten(1).square().sum(1)
    scale = energy.clamp_min(1e-300)
    unfolded = [X.movedim(mode, 1).flatten(2).contiguous() for mode in range(1, X.ndim)]
    error = torch.full_like(energy, float("inf"))
    last = len(factors) - 1
    for _ in range(sweeps):
        for mode in range(len(factors)):
            others = [f for other, f in enumerate(factors) if other != mode]
            normal, response = _hadamard(others), unfolded[mode] @ _khatri_rao(others)
            solved = _solve(normal, response, max(damping, DAMPING))
            norms = solved.norm(dim=1, keepdim=True).clamp_min(1e-300)
            factors[mode] = solved if mode == last else solved / norms
        # |X - Y|^2 = |X|^2 - 2 <X, Y> + |Y|^2, from what the last update has at hand
        whole = (_hadamard(factors[:-1]) * (factors[last].mT @ factors[last])).sum((1, 2))
        found = ((energy - 2 * (response * factors[last]).sum((1, 2)) + whole).clamp_min(0) / scale).sqrt()
        settled = damping <= DAMPING and bool((error - found <= tol * error).all())
        error, damping = found, damping / 10
        if settled:
            break
    return factors, error


def _hadamard(factors: list[Tensor]) -> Tensor:
    product = factors[0].mT @ factors[0]
    for factor in factors[1:]:
        product = product * (factor.mT @ factor)
    return product


def _khatri_rao(factors: list[Tensor]) -> Tensor:
    """Products of the columns over all modes but one, (n, d_1 d_2 ..., rank), the last mode fastest."""
    product = factors[0]
    for factor in factors[1:]:
        product = (product[:, :, None] * factor[:, None]).flatten(1, 2)
    return product


def _solve(normal: Tensor, response: Tensor, damping: float) -> Tensor:
    """Response normal^{-1} with a small ridge; a term that has vanished stays away."""
    lift = damping * normal.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None] + 1e-300
    lifted = normal.clone()
    lifted.diagonal(dim1=-2, dim2=-1).add_(lift)
    return torch.linalg.solve(lifted, response.mT).mT if lifted.shape[-1] > 1 else response / lifted

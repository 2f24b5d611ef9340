"""Alternating least squares for sums of rank-1 terms, with momentum, and with a bound on terms that cancel each other.

T[a, b, ..., l] ~ sum_k A[a, k] B[b, k] ... L[l, k]; each factor in turn is the least-squares solution for the others
(Harshman 1970). The two products with the whole tensor in a sweep are with its LAST mode, so that one should be the
longest; all other modes share what the first product leaves (a dimension tree, Phan et al. 2013). Sweeps start from
factors extrapolated along the last change, and without where that did not help (Mitchell, Ye and De Sterck 2020).

The best approximation by R terms need not exist: terms may grow without bound against each other (de Silva and Lim
2008). With unit columns in all modes but the last, a ridge d on the last factor bounds the norms of the terms t_k by
sum |t_k|^2 <= |T|^2 / d, for otherwise the factor zero would be better. It is raised where the terms exceed LIMIT.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 1e-12
"""Share of the mean diagonal added to the normal equations: terms that grow against each other stay solvable."""

LIMIT = 20.0
"""Root of sum |t_k|^2 / |T|^2 of every fit at most; so far cancelling terms cost a little over one digit."""

FIRST_RIDGE = 1e-6
"""Where terms exceed the limit; doubled in each sweep in which they still do."""


@dataclass(frozen=True)
class Fit:
    """Factors of n tensors and how well they do.

    Attributes:
        factors: (n, d_j, rank), unit columns in all modes but the last.
        error: (n,), relative.
        spread: (n,), root of the terms' energies over the tensor's.
    """

    factors: list[Tensor]
    error: Tensor
    spread: Tensor

    def score(self, ridge: Tensor) -> Tensor:
        """What a sweep with that ridge lowers."""
        return self.error.square() + ridge * self.spread.square()

    def part(self, some: slice) -> Fit:
        """The fits of some of the tensors."""
        return Fit([factor[some] for factor in self.factors], self.error[some], self.spread[some])

    def where(self, other: Fit, chosen: Tensor) -> Fit:
        """The other fit for the tensors that are chosen."""
        factors = choose(chosen, other.factors, self.factors)
        return Fit(
            factors, torch.where(chosen, other.error, self.error), torch.where(chosen, other.spread, self.spread)
        )


def choose(chosen: Tensor, there: list[Tensor], here: list[Tensor]) -> list[Tensor]:
    """Factors from `there` for the chosen tensors, from `here` for the others."""
    return [torch.where(chosen[:, None, None], new, old) for new, old in zip(there, here, strict=True)]


def als(X: Tensor, factors: list[Tensor], sweeps: int, tol: float, damping: Tensor | float = DAMPING) -> Fit:
    """Sweeps over the modes from given factors.

    Args:
        X: (n, d_1, ..., d_m), n tensors that are fitted on their own. All but the two products with X is in float64.
        factors: (n, d_j, rank), where to start, in float64.
        sweeps: updates of all factors at most, one more where terms exceed the limit at the end.
        tol: stop where the relative error falls by less than this share of it in a sweep, in every tensor.
        damping: ridge of the first sweep, as a share of the mean diagonal; it falls by tenths to DAMPING.
    """
    energy = X.flatten(1).double().square().sum(1)
    damping = torch.as_tensor(damping).to(energy).expand_as(energy)
    kept = _sweep(X, energy, factors, damping)
    guess, run, held = kept.factors, torch.zeros_like(energy), torch.zeros_like(energy)
    done = torch.zeros_like(energy, dtype=torch.bool)
    for _ in range(sweeps - 1):
        damping = (damping / 10).clamp_min(DAMPING)
        loose, calm = ~(kept.spread <= LIMIT), damping <= DAMPING
        held = torch.where(loose, (2 * held).clamp(FIRST_RIDGE, LIMIT**-2), held)
        ridge = torch.maximum(damping, held)
        new = _sweep(X, energy, guess, ridge)
        worse = calm & ~(new.score(ridge) <= kept.score(ridge))
        still = torch.where(worse, run == 0, kept.error - new.error <= tol * kept.error)
        done |= calm & still & ~loose
        run = torch.where(worse | ~calm, 0.0, run + 1)
        ahead = (run / (run + 3)).clamp_max(0.9)[:, None, None]
        after = kept.where(new, ~worse)
        guess = [b + ahead * (b - a) for a, b in zip(kept.factors, after.factors, strict=True)]
        kept = after
        if bool(done.all()):
            break
    loose = ~(kept.spread <= LIMIT)
    if bool(loose.any()):
        held = torch.full_like(energy, LIMIT**-2)
        kept = kept.where(_sweep(X, energy, [f.nan_to_num() for f in kept.factors], held), loose)
    return kept


def _sweep(X: Tensor, energy: Tensor, factors: list[Tensor], ridge: Tensor) -> Fit:
    """Every factor once, the last one at last."""
    rows, sizes, factors = X.flatten(1, -2), X.shape[1:-1], list(factors)
    grams = [factor.mT @ factor for factor in factors]
    part = (rows @ factors[-1].to(X.dtype)).double().reshape(len(X), *sizes, -1)
    for mode in range(len(sizes)):
        solved = _solve(_product(grams, mode), _contracted(part, factors, mode), ridge)
        factors[mode] = solved / solved.norm(dim=1, keepdim=True).clamp_min(1e-300)
        grams[mode] = factors[mode].mT @ factors[mode]
        part = (part * _along(factors[mode], part.ndim, 1)).sum(1)
    normal = _product(grams, len(sizes))
    response = (rows.mT @ khatri_rao(factors[:-1]).to(X.dtype)).double()
    factors[-1] = _solve(normal, response, ridge)
    # |X - Y|^2 = |X|^2 - 2 <X, Y> + |Y|^2, from what the last update has at hand
    whole = (normal * (factors[-1].mT @ factors[-1])).sum((1, 2))
    left = energy - 2 * (response * factors[-1]).sum((1, 2)) + whole
    scale = energy.clamp_min(1e-300)
    spread = (factors[-1].square().sum((1, 2)) / scale).sqrt()
    return Fit(factors, (left.clamp_min(0) / scale).sqrt(), torch.where(energy > 0, spread, 0.0))


def khatri_rao(factors: list[Tensor]) -> Tensor:
    """Products of the columns over all modes, (n, d_1 d_2 ..., rank), the last mode fastest."""
    product = factors[0]
    for factor in factors[1:]:
        product = (product[:, :, None] * factor[:, None]).flatten(1, 2)
    return product


def _along(factor: Tensor, axes: int, axis: int) -> Tensor:
    """A factor (n, d, rank) shaped to be multiplied onto that axis of a tensor (n, ..., rank) of so many."""
    shape = [1] * axes
    shape[0], shape[axis], shape[-1] = factor.shape
    return factor.reshape(shape)


def _contracted(part: Tensor, factors: list[Tensor], mode: int) -> Tensor:
    """`part` (n, d_mode, ..., d_{m-1}, rank) with the factors behind the mode summed over, (n, d_mode, rank)."""
    for other in range(part.ndim - 3 + mode, mode, -1):
        part = (part * _along(factors[other], part.ndim, part.ndim - 2)).sum(-2)
    return part


def _product(grams: list[Tensor], but: int) -> Tensor:
    """The elementwise product of the factors' Gram matrices but one."""
    product: Tensor | None = None
    for mode, one in enumerate(grams):
        if mode != but:
            product = one if product is None else product * one
    return grams[but] if product is None else product


def _solve(normal: Tensor, response: Tensor, ridge: Tensor) -> Tensor:
    """Response normal^{-1} with a small ridge; a term that has vanished stays away."""
    lifted = normal.clone()
    diagonal = lifted.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(ridge[:, None] * diagonal.mean(-1, keepdim=True) + 1e-300)
    return torch.linalg.solve(lifted, response.mT).mT if lifted.shape[-1] > 1 else response / lifted

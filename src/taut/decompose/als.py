"""Alternating least squares for sums of rank-1 terms: the sweeps, and the bound on terms that cancel each other.

T[a, b, ..., l] ~ sum_k A[a, k] B[b, k] ... L[l, k]; each factor in turn is the least-squares solution for the others
(Harshman 1970). The two products with the whole tensor of a sweep are with its LAST mode, so that one should be the
longest; all other modes share what the first of them leaves (a dimension tree, Phan et al. 2013).

The best approximation by R terms need not exist: terms may grow without bound against each other (de Silva and Lim
2008). With unit columns in all modes but the last, a ridge d on the last update bounds the norms of the terms t_k by
sum |t_k|^2 <= |T|^2 / d, for the factor zero would be better otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 1e-12
"""Share of the mean diagonal added to the normal equations: terms that grow against each other stay solvable."""

LIMIT = 30.0
"""Root of sum |t_k|^2 / |T|^2 up to which a fit is taken as it is; two digits are lost where terms cancel so far."""


def als(
    X: Tensor, factors: list[Tensor], sweeps: int, tol: float, damping: float = DAMPING
) -> tuple[list[Tensor], Tensor]:
    """Sweeps over the modes from given factors.

    Args:
        X: (n, d_1, ..., d_m), n tensors that are fitted on their own.
        factors: (n, d_j, rank), where to start.
        sweeps: updates of all factors at most.
        tol: stop where the relative error falls by less than this share of it in a sweep, in every tensor.
        damping: ridge of the first sweep, as a share of the mean diagonal; it falls by tenths to DAMPING.

    Returns:
        The factors, unit columns in all modes but the last, and the relative error of every tensor, (n,).
    """
    factors, error = _sweep(X, factors, sweeps, tol, (damping, DAMPING))
    loose = ~(_spread(X, factors) <= LIMIT)
    if bool(loose.any()):
        held, found = _sweep(X, [torch.nan_to_num(f) for f in factors], max(sweeps, 1), tol, (LIMIT**-2, LIMIT**-2))
        factors = [torch.where(loose[:, None, None], new, old) for new, old in zip(held, factors, strict=True)]
        error = torch.where(loose, found, error)
    return factors, error


def _spread(X: Tensor, factors: list[Tensor]) -> Tensor:
    """Root of the terms' energies over the tensor's, (n,); 0 for a tensor of zeros."""
    energy = X.flatten(1).square().sum(1)
    return (factors[-1].square().sum((1, 2)) / energy.clamp_min(1e-300)).sqrt() * (energy > 0)


def _sweep(
    X: Tensor, factors: list[Tensor], sweeps: int, tol: float, ridge: tuple[float, float]
) -> tuple[list[Tensor], Tensor]:
    """The sweeps, with a ridge that falls from the first value to the second."""
    damping, least = ridge
    energy = X.flatten(1).square().sum(1)
    scale = energy.clamp_min(1e-300)
    rows, sizes = X.flatten(1, -2), X.shape[1:-1]
    error = torch.full_like(energy, float("inf"))
    factors = list(factors)
    grams = [factor.mT @ factor for factor in factors]
    for _ in range(sweeps):
        part = (rows @ factors[-1]).reshape(len(X), *sizes, -1)
        for mode in range(len(sizes)):
            solved = _solve(_product(grams, mode), _contracted(part, factors, mode), max(damping, least))
            factors[mode] = solved / solved.norm(dim=1, keepdim=True).clamp_min(1e-300)
            grams[mode] = factors[mode].mT @ factors[mode]
            part = (part * _along(factors[mode], part.ndim, 1)).sum(1)
        normal, response = _product(grams, len(sizes)), rows.mT @ khatri_rao(factors[:-1])
        factors[-1] = _solve(normal, response, max(damping, least))
        grams[-1] = factors[-1].mT @ factors[-1]
        # |X - Y|^2 = |X|^2 - 2 <X, Y> + |Y|^2, from what the last update has at hand
        whole = (normal * grams[-1]).sum((1, 2))
        found = ((energy - 2 * (response * factors[-1]).sum((1, 2)) + whole).clamp_min(0) / scale).sqrt()
        settled = damping <= least and bool((error - found <= tol * error).all())
        error, damping = found, damping / 10
        if settled:
            break
    return factors, error


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


def _solve(normal: Tensor, response: Tensor, damping: float) -> Tensor:
    """Response normal^{-1} with a small ridge; a term that has vanished stays away."""
    lift = damping * normal.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None] + 1e-300
    lifted = normal.clone()
    lifted.diagonal(dim1=-2, dim2=-1).add_(lift)
    return torch.linalg.solve(lifted, response.mT).mT if lifted.shape[-1] > 1 else response / lifted

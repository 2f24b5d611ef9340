"""A second moment of few rows, made honest: its eigenvectors, with the energy that other rows have along them.

The eigenvalues of a sample are too large where they are large and too small where they are small; n rows of k > n
columns leave k - n directions without any energy at all, and whoever looks for cheap directions finds just these. Rows
that were kept out say what a direction truly carries (Abadir, Distaso and Zikes 2014; Bartz 2016). Along a single
direction they are few, so their ratio to the eigenvalue is smoothed: it rises from the largest eigenvalue to the
smallest, and the trace is that of all rows.

A large matrix takes minutes to diagonalize. There only its leading directions are found, about; among the others,
which differ less, the energies a l + b of eigenvalues l come as near as possible to those of the held-out rows
(Ledoit and Wolf 2004 weigh the sample and the identity likewise).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import isotonic_regression
from torch import Tensor

from taut.decompose.linalg import LARGE, spectrum

LEADING = 8
"""Of a large matrix one direction in so many is found."""

ITERATIONS = 2
"""Of the search for them."""

CROSSED = 512
"""Held-out rows that say how the other directions go together."""

BINS = 64
"""Groups of neighbouring directions whose ratio is one number, before it is made monotone."""

SEEN = 1e-6
"""Share of the largest eigenvalue below which one is rounding: what lies there is known from the other rows alone."""


@dataclass(frozen=True)
class HeldOut:
    """The second moment of rows that were kept out, in the scale of the one that it judges.

    Attributes:
        moment: (g, k, k), or None where there are rows. rows: (g, n, k), with rows^T rows the moment.
    """

    moment: Tensor | None = None
    rows: Tensor | None = None

    def along(self, V: Tensor) -> Tensor:
        """Energies (g, r) along the columns of V (g, k, r)."""
        if self.rows is not None:
            return (self.rows @ V.to(self.rows)).double().square().sum(1)
        A = self._matrix()
        V = V.to(A)
        return ((A @ V) * V).double().sum(1).clamp_min(0)

    def trace(self) -> Tensor:
        """Whole energy (g,)."""
        if self.rows is not None:
            return self.rows.flatten(1).double().square().sum(1)
        return self._matrix().diagonal(dim1=-2, dim2=-1).double().sum(-1)

    def across(self, A: Tensor, V: Tensor) -> Tensor:
        """<A, this> of both without the columns of V (k, r), of one group alone: A is (k, k)."""
        if self.rows is not None:
            n = self.rows.shape[1]
            X = self.rows[0, torch.linspace(0, n - 1, min(n, CROSSED)).round().long()].to(A)
            beside = X - (X @ V) @ V.T
            return (beside @ A * beside).double().sum() * (n / len(X))
        M = self._matrix()[0].to(A)
        beside = M - (M @ V) @ V.T
        return (A * (beside - V @ (V.T @ beside))).double().sum()

    def part(self, group: int) -> HeldOut:
        """Of one group alone."""
        moment, rows = (None if t is None else t[group : group + 1] for t in (self.moment, self.rows))
        return HeldOut(moment, rows)

    def _matrix(self) -> Tensor:
        if self.moment is None:
            raise ValueError("nothing was held out")
        return self.moment


def shrunk(A: Tensor, held: HeldOut, total: Tensor) -> Tensor:
    """The second moment with the eigenvectors of A and the energies of held-out rows.

    Args:
        A: (g, k, k), of the rows that are not held out.
        held: the others.
        total: (g,), the trace that is wanted.

    Returns:
        (g, k, k) in float32.
    """
    if A.shape[-1] > LARGE:
        parts = [_shrunk_large(a, held.part(i), total[i]) for i, a in enumerate(A)]
        return torch.stack(parts) if len(parts) > 1 else parts[0][None]
    U, values = spectrum(A)
    U = U.float()
    energies = _smoothed(values, held.along(U), total)
    half = U * energies.sqrt().float()[:, None]
    return half @ half.mT


def _shrunk_large(A: Tensor, held: HeldOut, total: Tensor) -> Tensor:
    """The same of one large A (k, k)."""
    k = len(A)
    V, AV, values = _leading(A.float())
    if not len(values):
        return torch.zeros_like(A, dtype=torch.float32)
    inside = held.along(V[None])[0]
    own, other = A.diagonal().double().sum() - values.sum(), held.trace()[0] - inside.sum()
    rest = k - len(values)
    weight = 0.0
    if own > SEEN * values[0]:
        squares = A.double().square().sum() - 2 * AV.double().square().sum() + values.square().sum()
        best = (held.across(A.float(), V) - own * other / rest) / (squares - own * own / rest)
        weight = float(best.clamp(min=0.0).minimum(other / own))
    floor = float((other - weight * own).clamp_min(0) / rest)
    scales = ((_ratio(values, inside) / values).clamp_min(0).sqrt() - weight**0.5).to(V)
    # D A D + floor (I - V V^T), where D = sqrt(weight) I + V scales V^T
    half = weight**0.5 * AV * scales + 0.5 * V * (scales.square() * values.to(V) - floor)
    crossed = half @ V.T
    found: Tensor = weight * A.float() + crossed + crossed.T
    found.diagonal().add_(floor)
    return found.mul_(float(total / found.diagonal().double().sum().clamp_min(1e-300)))


def _leading(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal V (k, r) that diagonalize V^T A V near the leading eigenvectors, A V, and the values, descending."""
    random = torch.Generator().manual_seed(0)
    V = torch.randn(len(A), len(A) // LEADING, generator=random).to(A)
    for _ in range(ITERATIONS):
        V = torch.linalg.qr(A @ V)[0]
    AV = A @ V
    turn, values = spectrum(V.T @ AV)
    seen = int((values > SEEN * values[0]).sum())
    turn = turn[:, :seen].to(V)
    return V @ turn, AV @ turn, values[:seen]


def shrunk_rows(rows: Tensor, held: HeldOut, total: Tensor) -> tuple[Tensor, Tensor]:
    """The same of fewer rows than columns, whose moment is rows^T rows, as rows again.

    Returns:
        Rows (g, m, k), and (g,) what is added to their moment in all directions: the mean energy beside them.
    """
    V, energies, beside = _judged(rows, held, total)
    over = (energies - beside[:, None]).clamp_min(0)
    return (over.sqrt()[..., None].to(V) * V.mT).contiguous(), beside.float()


def shrunk_moment(rows: Tensor, held: HeldOut, total: Tensor) -> Tensor:
    """The same as a matrix (g, k, k) in float32."""
    V, energies, beside = _judged(rows, held, total)
    A = (V * (energies - beside[:, None])[:, None].to(V)) @ V.mT
    A.diagonal(dim1=-2, dim2=-1).add_(beside[:, None].to(A))
    return A.float()


def _judged(rows: Tensor, held: HeldOut, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Directions (g, k, m) that rows (g, m, k) have, their energies (g, m), and the mean energy (g,) beside them."""
    m, k = rows.shape[1:]
    U, values = spectrum(rows @ rows.mT)
    seen = values > SEEN * values[:, :1]
    V = rows.mT @ (U / torch.where(seen, values, 1.0).sqrt()[:, None]).to(rows) * seen[:, None]
    inside = held.along(V)
    beside = (held.trace() - inside.sum(-1)).clamp_min(0) / (k - seen.sum(-1)).clamp_min(1)
    energies = beside[:, None].repeat(1, k)
    energies[:, :m] = torch.where(seen, inside, energies[:, :m])
    padded = torch.cat([values * seen, values.new_zeros(len(values), k - m)], -1)
    energies = _smoothed(padded, energies, total)
    return V, energies[:, :m], energies[:, -1]


def _smoothed(values: Tensor, held: Tensor, total: Tensor) -> Tensor:
    """Energies (g, k) in place of descending eigenvalues; `held` are those of the other rows, as they are."""
    energies = torch.stack([_ratio(v, h) for v, h in zip(values.cpu(), held.cpu(), strict=True)]).to(held)
    sums = energies.sum(-1, keepdim=True)
    energies = torch.where(sums > 0, energies, values)  # where the others are all zero they say nothing
    return energies * (total.double() / energies.sum(-1).clamp_min(1e-300))[:, None]


def _ratio(values: Tensor, held: Tensor) -> Tensor:
    seen = int((values > SEEN * values[0]).sum())
    beside = float(held[seen:].mean()) if seen < len(held) else 0.0
    energies = torch.full_like(held, beside)
    if seen:
        size = -(-seen // BINS)
        means = [_binned(t[:seen], size) for t in (held, values)]
        ratios = torch.from_numpy(isotonic_regression((means[0] / means[1]).numpy()).x.copy())
        energies[:seen] = ratios.repeat_interleave(size)[:seen] * values[:seen]
    return energies


def _binned(t: Tensor, size: int) -> Tensor:
    """Means of `size` neighbours each; the last of what is left."""
    return t if size == 1 else torch.stack([part.mean() for part in torch.split(t, size)])

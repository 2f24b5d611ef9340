"""The rank of a noisy matrix by empirical variational Bayes: the global solution, from singular values alone.

W (L, M), L <= M, is seen as a low-rank matrix plus Gaussian noise of unknown variance v. With a = L / M, t = 2.5129
sqrt(a), edge = (1 + t)(1 + a / t) and x = s^2 / (M v) of every singular value s, the variance minimizes

    sum_{x <= edge} (x - ln x)  +  sum_{x > edge} (x - tau + ln((tau + 1) / x) + a ln(tau / a + 1)),
    tau = ((x - (1 + a)) + sqrt((x - (1 + a))^2 - 4 a)) / 2,

between the bounds of the source; the rank is how many x are above the edge. Between two v at which some x meets the
edge, p d/dp of the objective, p = 1 / v, is

    g(p) = sum_{x <= edge} (x - 1)  +  a sum_{x > edge} (1 + 1 / tau),

which is convex in p: each such piece has at most one minimum inside, at the larger root of g, and Newton's method from
the right end finds it. With the ends of all pieces beside them, the best is the global one, however many there are.
Source: Nakajima, Sugiyama, Babacan and Tomioka 2013 (JMLR 14).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from taut.decompose.linalg import gram
from taut.errors import CallError, ModelError

THRESHOLD = 2.5129
"""Root of ln(1 + z) = z / 2: from this tau / sqrt(a) on a direction is worth more than noise."""

NEWTON = 60
"""Steps of Newton's method at most; it is monotone, and slower than quadratic at a double root alone."""


@dataclass(frozen=True)
class Bayes:
    """What empirical variational Bayes finds in a matrix.

    Attributes:
        rank: singular values that stand out of the noise.
        variance: of the noise in one entry.
    """

    rank: int
    variance: float


def evbmf(W: Tensor) -> Bayes:
    """Rank and noise variance of W, of which either side may be the longer.

    A matrix of zeros has rank 0 and variance 0; a single row or column is all noise (rank 0), as is a matrix whose
    singular values are all alike. The rank is below L / (1 + L / M): what has nearly full rank cannot be told from
    noise. Singular values below the rounding of float64 squares count as equal.

    Args:
        W: (L, M), in any real dtype.

    Raises:
        CallError: W is not a matrix, or empty.
        ModelError: W is not finite.
    """
    if W.ndim != 2 or not W.numel():
        raise CallError(f"The matrix of evbmf must have two sides above 0. Got {tuple(W.shape)} instead.")
    return _each(W[None])[0]


def output_rank(W: Tensor) -> int:
    """The rank that the outputs of a kernel need: evbmf of o x (c s), the largest of its groups.

    Args:
        W: (g, o, c, s); s is 1 for a Linear.
    """
    return max(found.rank for found in _each(W.flatten(2)))


def input_rank(W: Tensor) -> int:
    """The rank that the inputs of a kernel need: evbmf of c x (o s), the largest of its groups.

    Args:
        W: (g, o, c, s).
    """
    return max(found.rank for found in _each(W.transpose(1, 2).flatten(2)))


def _each(W: Tensor) -> list[Bayes]:
    """Of every matrix of W (g, m, n)."""
    W = W.detach().double()
    if not bool(W.isfinite().all()):
        raise ModelError("A matrix given to evbmf holds NaN or Inf: its rank cannot be estimated.")
    M, L = max(W.shape[1:]), min(W.shape[1:])
    scale = W.abs().amax((1, 2)).clamp_min(torch.finfo(W.dtype).tiny)
    unit = W / scale[:, None, None]
    squares = torch.linalg.eigvalsh(gram(unit if W.shape[1] <= W.shape[2] else unit.mT)).flip(-1)
    floor = squares[:, :1] * torch.finfo(W.dtype).eps * (L + M)  # what rounding leaves of smaller ones
    energies = squares.maximum(floor).cpu().numpy() / M
    return [_solved(e, M, s) if e[0] > 0 else Bayes(0, 0.0) for e, s in zip(energies, scale.tolist(), strict=True)]


def _solved(energies: NDArray[np.float64], M: int, scale: float) -> Bayes:
    """The best of all pieces; `energies` are s^2 / M, descending and above 0, of the matrix over `scale`."""
    best = min(
        (piece.objective(p), piece.signals, 1 / p)
        for piece, left, right in _pieces(energies, M)
        for p in (left, right, *piece.minimum(left, right))
    )
    return Bayes(best[1], best[2] * scale * scale)


def _pieces(energies: NDArray[np.float64], M: int) -> Iterator[tuple[_Piece, float, float]]:
    """Every number of signals, and the precisions between which just so many stand above the edge."""
    L = len(energies)
    a = L / M
    t = THRESHOLD * math.sqrt(a)
    edge = (1 + t) * (1 + a / t)
    most = -(-L * M // (L + M)) - 1  # ceil(L / (1 + a)) - 1
    low = 1 / float(energies.mean())
    high = max(low, 1 / max(float(energies[most]) / edge, float(energies[most:].mean())))
    cuts = [0.0, *(edge / energies).tolist()]
    for signals in range(most + 1):
        left, right = max(low, cuts[signals]), min(high, cuts[signals + 1])
        if left <= right:
            yield _Piece(a, signals, energies), left, right


class _Piece:
    """The objective where the first `signals` of the energies are above the edge, as a function of the precision p."""

    def __init__(self, a: float, signals: int, energies: NDArray[np.float64]) -> None:
        self.a, self.signals, self.above = a, signals, energies[:signals]
        noise = energies[signals:]
        self.count, self.total, self.logs = len(noise), float(noise.sum()), float(np.log(noise).sum())

    def taus(self, p: float) -> NDArray[np.float64]:
        """Tau of every signal."""
        shifted = p * self.above - (1 + self.a)
        found: NDArray[np.float64] = (shifted + np.sqrt(np.maximum(shifted**2 - 4 * self.a, 0))) / 2
        return found

    def objective(self, p: float) -> float:
        """The sums above, the second with x = (1 + tau)(1 + a / tau) put in: nothing large cancels."""
        a, tau = self.a, self.taus(p)
        noise = p * self.total - self.logs - self.count * math.log(p)
        signal = 1 + a + a / tau + np.log(tau) - np.log(tau + a) + a * np.log(tau / a + 1)
        return noise + float(signal.sum())

    def minimum(self, left: float, right: float) -> tuple[float, ...]:
        """The larger root of g between the two, if there is one."""
        p = right
        for _ in range(NEWTON):
            tau = self.taus(p)
            g = p * self.total - self.count + self.a * float((1 + 1 / tau).sum())
            slope = self.total - self.a * float((self.above / (tau**2 - self.a)).sum())
            if g <= 0 or slope <= 0:
                break
            lower = p - g / slope
            if lower < left or lower == p:
                break
            p = lower
        return () if p == right else (p,)

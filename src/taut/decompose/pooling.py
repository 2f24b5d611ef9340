"""Second moments of which some are of few rows: each as near to the mean of all as its rows are few.

Ledoit and Wolf (2004): of all mixtures of an estimate and a target, the one nearest to the truth has of the target the
share E|S - M|^2 / E|S - T|^2. The first is the variance of a mean over n rows, (tr(M)^2 + |M|^2) / n for normal rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mean_of(moments: Sequence[Tensor | None], rows: Sequence[float]) -> Tensor:
    """The mean per row over all matrices, (k, k) in float64.

    Args:
        moments: (k, k) each, means over rows; None where nothing was seen.
        rows: of how many.
    """
    seen = [(M, n) for M, n in zip(moments, rows, strict=True) if M is not None]
    total = torch.zeros_like(seen[0][0], dtype=torch.float64)
    for M, n in seen:
        total += M.double() * (n / sum(rows))
    return total


def share_of_mean(moment: Tensor | None, rows: float, mean: Tensor) -> float:
    """Which share of the mean is best in a moment: 0 of many rows, 1 of none.

    Args:
        moment: (k, k), a mean over rows; None where nothing was seen.
        rows: of how many.
        mean: (k, k), of all.
    """
    apart = 0.0 if moment is None else rows * float((moment.double() - mean).square().sum())
    spread = float(mean.diagonal().sum().square() + mean.square().sum())
    return min(1.0, spread / apart) if apart > 0 else 1.0


def mixed(moment: Tensor | None, mean: Tensor, share: float) -> Tensor:
    """A moment (k, k), or none, with a share of the mean of all, in float64."""
    return mean if moment is None else (1 - share) * moment.double() + share * mean


def few_of_all(rows: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Rows (m, k) whose sum of squares is the mean of moments that are held as rows: some of each.

    Args:
        rows: of every moment, (m, k), alike in what they tell, as random sums are; (0, k) where nothing was seen.
        weights: of each in the mean; they add up to 1.
    """
    most = -(-max(len(r) for r in rows) // len(rows))
    parts = [r[:most] * (w * len(r) / max(1, min(most, len(r)))) ** 0.5 for r, w in zip(rows, weights, strict=True)]
    return torch.cat(parts)


def expected(rows: Sequence[float]) -> list[float]:
    """How many rows to count with: what none was seen of counts as much as the mean, what is seen often as it is seen.

    What calibration did not show may well be used, and has no smaller share in the function for that.
    """
    mean = sum(rows) / len(rows)
    return [n + (mean - n) / (1 + n) for n in rows]

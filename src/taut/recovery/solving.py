"""Ridge regression of a layer's weight towards the one it has, in whichever form is smaller."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from taut.structure.patches import gram, grouped_weight

RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
"""Shares of the mean input variance that hold a weight where it is; the best on held-out rows is taken."""

HELD_OUT = 0.2
"""Share of the rows, the last ones and so other samples, on which the ridge is chosen."""


@dataclass(frozen=True)
class Moments:
    """Present inputs of a layer.

    Attributes:
        rows: (g, n, k), centred where a bias or a batch norm takes the mean.
        mean: (g, 1, k), what was subtracted.
        gram: (g, k, k), rows^T rows / n in float64, or None where there are fewer rows than columns.
    """

    rows: Tensor
    mean: Tensor
    gram: Tensor | None

    @classmethod
    def of(cls, rows: Tensor, *, centred: bool) -> Moments:
        """Moments of unfolded inputs (g, n, k)."""
        mean = rows.mean(1, keepdim=True) if centred else torch.zeros_like(rows[:, :1])
        rows = rows - mean if centred else rows
        n, k = rows.shape[1:]
        return cls(rows, mean, gram(rows) / n if n >= k else None)


def least_squares(
    module: nn.Module, moments: Moments, target: Tensor, *, centred: bool
) -> tuple[Tensor, Tensor | None]:
    """Argmin over dW of E|y - (W + dW) x - b|^2 + lambda |dW|^2, lambda a share of the mean input variance.

    Args:
        module: the layer with its weight W.
        moments: of its present inputs.
        target: (g, n, o), wanted outputs at the same positions.
        centred: whether the mean is left to the bias.

    Returns:
        W + dW as (g, o, k), and the bias that makes the means equal, or None where the layer has none.
    """
    W = grouped_weight(module).flatten(2)
    bias = module.bias if isinstance(module.bias, Tensor) else None
    wanted = target - target.mean(1, keepdim=True) if centred else target
    residual = wanted - moments.rows @ W.mT
    W = W + _step(moments.rows, residual).to(W)
    if bias is None:
        return W, None
    shift = target.mean(1, keepdim=True) - moments.mean @ W.mT
    return W, shift.flatten()


def _step(rows: Tensor, residual: Tensor) -> Tensor:
    """Change of the weight (g, o, k) on all rows, with the ridge that predicts held-out rows best; or none at all."""
    cut = int(rows.shape[1] * (1 - HELD_OUT))
    trial = _Solver(rows[:, :cut], residual[:, :cut])
    held, wanted = rows[:, cut:], residual[:, cut:]
    errors = {share: float((wanted - held @ trial.solve(share).to(held).mT).square().sum()) for share in RIDGES if cut}
    best = min(errors, key=errors.__getitem__, default=None)
    if best is None or errors[best] >= float(wanted.square().sum()):
        return residual.new_zeros(residual.shape[0], residual.shape[2], rows.shape[2])
    return _Solver(rows, residual).solve(best)


class _Solver:
    """Normal equations (k x k), or their dual (n x n) where there are fewer rows than columns."""

    def __init__(self, rows: Tensor, residual: Tensor) -> None:
        n, k = rows.shape[1:]
        self.rows, self.residual, self.dual = rows, residual, n < k
        self.lift = rows.double().square().mean((1, 2))[:, None, None] + 1e-30
        self.gram = gram(rows.mT if self.dual else rows) / n
        self.right = residual.double() if self.dual else (rows.mT @ residual).double() / n

    def solve(self, share: float) -> Tensor:
        """Change of the weight (g, o, k) for a ridge of `share` times the mean input variance."""
        eye = torch.eye(self.gram.shape[-1], dtype=torch.float64, device=self.rows.device)
        found = torch.cholesky_solve(self.right, torch.linalg.cholesky(self.gram + share * self.lift * eye))
        return (found / self.rows.shape[1]).mT.to(self.rows) @ self.rows if self.dual else found.mT

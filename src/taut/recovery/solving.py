"""Ridge regression of a layer's weight towards the one it has, in whichever form is smaller."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from taut.structure.patches import gram, grouped_weight

RIDGE = 1e-2
"""Share of the mean input variance that holds a weight where it is."""


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
    """Argmin over dW of E|y - (W + dW) x - b|^2 + lambda |dW|^2, lambda = 1e-2 times the mean input variance.

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
    W = W + _step(moments, residual).to(W)
    if bias is None:
        return W, None
    shift = target.mean(1, keepdim=True) - moments.mean @ W.mT
    return W, shift.flatten()


def _step(moments: Moments, residual: Tensor) -> Tensor:
    """DW (g, o, k); by the k x k normal equations, or by the n x n dual where there are fewer rows."""
    rows = moments.rows
    n = rows.shape[1]
    lift = RIDGE * rows.double().square().mean((1, 2))[:, None, None] + 1e-30
    if moments.gram is not None:
        H = (residual.mT @ rows).double() / n
        G = moments.gram + lift * torch.eye(rows.shape[2], dtype=torch.float64, device=rows.device)
        return torch.cholesky_solve(H.mT, torch.linalg.cholesky(G)).mT
    K = gram(rows.mT) / n + lift * torch.eye(n, dtype=torch.float64, device=rows.device)
    dual = torch.cholesky_solve(residual.double(), torch.linalg.cholesky(K)) / n
    return dual.mT.to(rows) @ rows

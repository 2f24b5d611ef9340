"""Ridge regression of a layer's weight towards the one it has, in whichever form is smaller."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from taut.decompose.linalg import cholesky
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
        """Moments of unfolded inputs (g, n, k), which are centred in place: a copy would double a layer's memory."""
        mean = rows.mean(1, keepdim=True) if centred else torch.zeros_like(rows[:, :1])
        rows = rows.sub_(mean) if centred else rows
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
    W = _step(moments, residual).to(W).add_(W)  # in place: a wide layer is most of a model
    if bias is None:
        return W, None
    shift = target.mean(1, keepdim=True) - moments.mean @ W.mT
    return W, shift.flatten()


def _step(moments: Moments, residual: Tensor) -> Tensor:
    """Change of the weight (g, o, k) on all rows, with the ridge that predicts held-out rows best; or none at all."""
    rows = moments.rows
    n, k = rows.shape[1:]
    cut = int(n * (1 - HELD_OUT))
    if cut == 0:
        return residual.new_zeros(residual.shape[0], residual.shape[2], k)
    if moments.gram is None:
        return _dual_step(rows, residual, cut)
    held = gram(rows[:, cut:]), _cross(residual[:, cut:], rows[:, cut:])
    whole = moments.gram * n, _cross(residual, rows)
    trial = whole[0] - held[0], whole[1] - held[1]

    gains = {share: _gain(_solve(*trial, share), *held) for share in RIDGES}
    best = max(gains, key=gains.__getitem__)
    return _solve(*whole, best) if gains[best] > 0 else torch.zeros_like(whole[1])


def _gain(D: Tensor, G: Tensor, H: Tensor) -> float:
    """How much smaller the squared error becomes by the change D, from second moments alone."""
    return float((2 * D * H).sum() - (D @ G * D).sum())


def _cross(residual: Tensor, rows: Tensor) -> Tensor:
    return (residual.mT @ rows).double()


def _solve(G: Tensor, H: Tensor, share: float) -> Tensor:
    """H (G + share (mean variance) I)^{-1}, (g, o, k)."""
    lift = share * G.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] + 1e-30
    lifted = G.clone()
    lifted.diagonal(dim1=-2, dim2=-1).add_(lift[..., 0])
    return torch.cholesky_solve(H.mT, cholesky(lifted)).mT


def _dual_step(rows: Tensor, residual: Tensor, cut: int) -> Tensor:
    """The same where there are fewer rows than columns: X^T (X X^T + lambda I)^{-1} R; one X X^T serves all ridges."""
    k = rows.shape[2]
    K, R = gram(rows.mT), residual.double()
    train, wanted = K[:, :cut, :cut], R[:, cut:]

    errors = {}
    for share in RIDGES:
        solved = _dual(train, R[:, :cut], share, k)
        errors[share] = float((wanted - K[:, cut:, :cut] @ solved).square().sum())
    best = min(errors, key=errors.__getitem__)
    if errors[best] >= float(wanted.square().sum()):
        return residual.new_zeros(residual.shape[0], residual.shape[2], k)
    return _dual(K, R, best, k).mT.to(rows) @ rows


def _dual(K: Tensor, R: Tensor, share: float, k: int) -> Tensor:
    """(K + share (mean variance) I)^{-1} R, with K = X X^T of k columns."""
    lift = share * K.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None] / k + 1e-30
    lifted = K.clone()
    lifted.diagonal(dim1=-2, dim2=-1).add_(lift)
    return torch.cholesky_solve(R, cholesky(lifted))

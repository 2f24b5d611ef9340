"""Ridge regression of a layer's weight towards the one it has, in whichever form is smaller."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from taut.core.modes import generator
from taut.decompose.linalg import cholesky
from taut.structure.patches import gram, grouped_weight

RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
"""Shares of the mean input variance that hold a weight where it is; the best on held-out rows is taken."""

HELD_OUT = 0.2
"""Share of the rows, the last ones and so other samples, on which the ridge is chosen."""


MIXES = 256
"""Combinations of a layer's outputs on which its ridge is chosen."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Present inputs of a layer; what is solved with them again and again is decomposed once.

    Attributes:
        rows: (g, n, k), centred where a bias or a batch norm takes the mean.
        mean: (g, 1, k), what was subtracted.
        gram: (g, k, k), rows^T rows / n in float64, or None where there are fewer rows than columns.
        again: whether more than one solution is asked for, so that what serves all of them is kept.
    """

    rows: Tensor
    mean: Tensor
    gram: Tensor | None
    again: bool = False
    _triangles: dict[tuple[bool, float], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Tensor, *, centred: bool, again: bool = False) -> Moments:
        """Moments of unfolded inputs (g, n, k), which are centred in place: a copy would double a layer's memory."""
        mean = rows.mean(1, keepdim=True) if centred else torch.zeros_like(rows[:, :1])
        rows = rows.sub_(mean) if centred else rows
        n, k = rows.shape[1:]
        return cls(rows, mean, gram(rows) / n if n >= k else None, again)

    @property
    def cut(self) -> int:
        """Where the held-out rows begin."""
        return int(self.rows.shape[1] * (1 - HELD_OUT))

    @cached_property
    def held(self) -> Tensor:
        """Held-out rows^T rows, (g, k, k), in float64."""
        return gram(self.rows[:, self.cut :])

    @cached_property
    def products(self) -> Tensor:
        """Rows rows^T, (g, n, n), in float64."""
        return gram(self.rows.mT)

    def triangle(self, share: float, *, trial: bool) -> Tensor:
        """Cholesky factor of rows^T rows, or of rows rows^T where that is smaller, and share (mean variance) I.

        Args:
            share: of the mean variance of an input.
            trial: without the held-out rows.
        """
        if (found := self._triangles.get((trial, share))) is None:
            lifted, count = self._summed(trial=trial), self.rows.shape[2]
            lift = share * lifted.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None] / count + 1e-30
            lifted.diagonal(dim1=-2, dim2=-1).add_(lift)
            found = cholesky(lifted)
            if self.again:
                self._triangles[trial, share] = found
        return found

    def _summed(self, *, trial: bool) -> Tensor:
        """What `triangle` factors, as a copy."""
        if self.gram is None:
            return (self.products[:, : self.cut, : self.cut] if trial else self.products).clone()
        whole = self.gram * self.rows.shape[1]
        return whole - self.held if trial else whole


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
    rows, cut = moments.rows, moments.cut
    if cut == 0:
        return residual.new_zeros(residual.shape[0], residual.shape[2], rows.shape[2])
    if moments.gram is None:
        return _dual_step(moments, residual)
    held, whole = _cross(residual[:, cut:], rows[:, cut:]), _cross(residual, rows)
    few, all_few = _mixed(held), _mixed(whole)
    gains = {share: _gain(_solve(moments, all_few - few, share, trial=True), moments.held, few) for share in RIDGES}
    best = max(gains, key=gains.__getitem__)
    return _solve(moments, whole, best, trial=False) if gains[best] > 0 else torch.zeros_like(whole)


def _mixed(H: Tensor) -> Tensor:
    """MIXES random combinations of many outputs (g, o, k): sums of squares over these are those over all, about."""
    outputs = H.shape[1]
    if outputs <= 2 * MIXES:
        return H
    signs = torch.randint(0, 2, (MIXES, outputs), generator=generator(0)).to(H) * 2 - 1
    mixed: Tensor = (signs / MIXES**0.5) @ H
    return mixed


def _gain(D: Tensor, G: Tensor, H: Tensor) -> float:
    """How much smaller the squared error becomes by the change D, from second moments alone."""
    return float((2 * D * H).sum() - (D @ G * D).sum())


def _cross(residual: Tensor, rows: Tensor) -> Tensor:
    return (residual.mT @ rows).double()


def _solve(moments: Moments, H: Tensor, share: float, *, trial: bool) -> Tensor:
    """H (G + share (mean variance) I)^{-1}, (g, o, k)."""
    return torch.cholesky_solve(H.mT, moments.triangle(share, trial=trial)).mT


def _dual_step(moments: Moments, residual: Tensor) -> Tensor:
    """The same where there are fewer rows than columns: X^T (X X^T + lambda I)^{-1} R; one X X^T serves all ridges."""
    rows, cut, R = moments.rows, moments.cut, residual.double()
    wanted, across = R[:, cut:], moments.products[:, cut:, :cut]
    errors = {}
    for share in RIDGES:
        solved = torch.cholesky_solve(R[:, :cut], moments.triangle(share, trial=True))
        errors[share] = float((wanted - across @ solved).square().sum())
    best = min(errors, key=errors.__getitem__)
    if errors[best] >= float(wanted.square().sum()):
        return residual.new_zeros(residual.shape[0], residual.shape[2], rows.shape[2])
    return torch.cholesky_solve(R, moments.triangle(best, trial=False)).mT.to(rows) @ rows

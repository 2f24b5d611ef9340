"""Batch norms of a compressed model: their stored statistics move as far as their inputs moved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Norm = tuple[Tensor, Tensor]
"""Mean and variance per channel."""


def reestimate(before: Norm) -> Any:
    """A hook that moves a batch norm's running statistics as far as its input moved, relative to the original's.

    mean' = mean + (m - m0), var' = var v / v0, with m, v of the input that it is about to normalize and m0, v0 of the
    original's on the same samples: what training stored stays, where nothing moved.
    """

    def hook(module: Any, args: tuple[Tensor, ...]) -> None:
        mean, var = module.running_mean, module.running_var
        same = isinstance(mean, Tensor) and mean.shape == before[0].shape  # an exact step may have made it narrower
        if same and isinstance(mean, Tensor) and isinstance(var, Tensor):
            now = moments_of(args[0])
            stored = mean.double(), var.double()
            tiny = 1e-6 * before[1].mean() + 1e-30
            mean.copy_(stored[0] + now[0] - before[0])
            var.copy_(stored[1] * (now[1] + tiny) / (before[1] + tiny))

    return hook


def moments_of(x: Tensor) -> Norm:
    """Mean and variance of every channel, in float64."""
    wide = x.detach().double()
    axes = [axis for axis in range(x.ndim) if axis != 1]
    return wide.mean(axes), wide.var(axes)


def moved(norm: Norm, rows: Tensor, wanted: Tensor) -> Norm:
    """The moments of all positions, if their values were `wanted` instead of `rows` at those that were chosen.

    Args:
        norm: of all positions.
        rows: (g, n, o), the original's outputs at the chosen ones.
        wanted: what they should be instead.
    """
    old, new = (t.transpose(0, 1).flatten(1).double() for t in (rows, wanted))
    spread = old.var(0)
    grown = torch.where(spread > 0, new.var(0) / spread.clamp_min(1e-30), 1.0)
    return norm[0] + new.mean(0) - old.mean(0), norm[1] * grown

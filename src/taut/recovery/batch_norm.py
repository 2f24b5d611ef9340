"""Batch norms of a compressed model: their stored statistics move as far as their inputs moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Reals = Sequence[Tensor | None] | None
"""Of every batch, which positions are real, and no padding; None: all."""

Norm = tuple[Tensor, Tensor]
"""Mean and variance per channel."""


def reestimate(module: Any, before: Norm, inputs: Sequence[Tensor], real: Reals = None) -> None:
    """Move a batch norm's running statistics as far as its input moved, relative to the original's.

    mean' = mean + (m - m0), var' = var v / v0, with m, v of the input that it is about to normalize and m0, v0 of the
    original's on the same samples: what training stored stays, where nothing moved.

    Args:
        module: the batch norm.
        before: of the original.
        inputs: what it is about to normalize, batch by batch.
        real: batch by batch which positions are; None: all.
    """
    mean, var = module.running_mean, module.running_var
    same = isinstance(mean, Tensor) and mean.shape == before[0].shape  # an exact step may have made it narrower
    if same and isinstance(mean, Tensor) and isinstance(var, Tensor):
        now = moments_of(inputs, real)
        stored = mean.double(), var.double()
        tiny = 1e-6 * before[1].mean() + 1e-30
        mean.copy_(stored[0] + now[0] - before[0])
        var.copy_(stored[1] * (now[1] + tiny) / (before[1] + tiny))


def moments_of(inputs: Sequence[Tensor], real: Reals = None) -> Norm:
    """Mean and variance of every channel over all batches, in float64, at all or at `real` positions."""
    return pooled([counted(*pair) for pair in zip(inputs, real or [None] * len(inputs), strict=True)])


def counted(x: Tensor, real: Tensor | None = None) -> tuple[int, Tensor, Tensor]:
    """How many values every channel of a batch has, their mean and their variance, at all or at `real` positions."""
    x = x if real is None else x.movedim(1, -1)[real]
    wide = x.detach().double()
    axes = [axis for axis in range(x.ndim) if axis != 1]
    count = x.numel() // max(x.shape[1], 1)
    mean = wide.mean(axes)
    return count, mean, wide.var(axes) if count > 1 else torch.zeros_like(mean)


def pooled(parts: Sequence[tuple[int, Tensor, Tensor]]) -> Norm:
    """Mean and variance of all values from those of the parts (Chan et al. 1983)."""
    if len(parts) == 1:
        return parts[0][1:]
    total = sum(count for count, _, _ in parts)
    mean = torch.stack([count * mean for count, mean, _ in parts]).sum(0) / total
    squares = torch.stack([(count - 1) * var + count * (own - mean).square() for count, own, var in parts]).sum(0)
    return mean, squares / max(total - 1, 1)


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

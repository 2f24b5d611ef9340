"""The scalar whose gradients weigh outputs: per-sample losses with labels sampled from the model itself.

For class outputs E[g g^T] is the Fisher information, for other outputs random +-1 projections give the Gauss-Newton
matrix; both put the damage of every layer in one unit, the rise of the loss (for values: half the squared change).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from taut.structure.answers import KINDS
from taut.structure.kinds import (
    choose_kinds,
    float_outputs,
    kinds_of,
    name_of,
    output_kind,
    real_of,
    rows_of,
)

__all__ = ["KINDS", "Loss", "choose_kinds", "divergence", "float_outputs", "kinds_of", "output_kind", "sampled_loss"]

Loss = Callable[[Any, Any], Tensor]


def sampled_loss(output: Any, kinds: Sequence[str], generator: torch.Generator) -> Tensor:
    """Sum over samples of the loss on labels drawn from the output itself, summed over its float tensors."""
    parts = zip(float_outputs(output), kinds_of(output, kinds), real_of(output), strict=True)
    losses = [_sampled(rows_of(t.float(), kind, real), name_of(kind), generator) for t, kind, real in parts]
    return torch.stack(losses).sum()


def _sampled(output: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    if not output.numel():  # nothing but padding
        return output.sum()
    if kind == "values":
        signs = torch.empty(output.shape).bernoulli_(0.5, generator=generator).mul_(2).sub_(1).to(output)
        return (output * signs).sum()
    if kind == "sigmoid":
        p = output.detach().clamp(0, 1)
        labels = (torch.rand(p.shape, generator=generator).to(p) < p).to(p)
        return functional.binary_cross_entropy(output.clamp(1e-6, 1 - 1e-6), labels, reduction="sum")
    scores = output.flatten(0, -2)
    logs = scores.log_softmax(-1) if kind == "logits" else scores.clamp_min(1e-9).log()
    p = logs.detach().exp().cpu()
    labels = torch.multinomial(p, 1, generator=generator).to(logs.device)
    return -logs.gather(-1, labels).sum()


def divergence(kinds: Sequence[str], before: Any, after: Any) -> float:
    """How far an output moved, per sample, in the unit of `sampled_loss`: KL in nats, or half the squared change."""
    total = 0.0
    pairs = zip(float_outputs(before), float_outputs(after), strict=True)
    for kind, real, (p, q) in zip(kinds_of(before, kinds), real_of(before), pairs, strict=True):
        rows = (rows_of(t.double(), kind, real) for t in (p, q))
        moved = float(_divergence(name_of(kind), *rows)) / max(1, p.shape[0] if p.ndim else 1)
        total += 0.0 if moved < 0 else moved  # probabilities in single precision sum to a little less or more than 1
    return total


def _divergence(kind: str, p: Tensor, q: Tensor) -> Tensor:
    if kind == "values":
        return (p - q).square().sum() / 2
    if kind == "sigmoid":
        p, q = p.clamp(1e-6, 1 - 1e-6), q.clamp(1e-6, 1 - 1e-6)
        return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum()
    if kind == "logits":
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    else:
        log_p, log_q = p.clamp_min(1e-9).log(), q.clamp_min(1e-9).log()
    return (log_p.exp() * (log_p - log_q)).sum()

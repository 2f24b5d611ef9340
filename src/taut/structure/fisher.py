"""The scalar whose gradients weigh outputs: per-sample losses with labels sampled from the model itself.

For class outputs E[g g^T] is the Fisher information, for other outputs random +-1 projections give the Gauss-Newton
matrix; both put the damage of every layer in one unit, the rise of the loss (for values: half the squared change).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from taut.core.tensors import all_tensors
from taut.errors import CallError

Loss = Callable[[Any, Any], Tensor]

KINDS = ("logits", "probabilities", "sigmoid", "values")


def output_kind(output: Tensor) -> str:
    """What an output tensor is, read off its values and shape."""
    low, high = float(output.min()), float(output.max())
    if low >= 0 and high <= 1:
        rows = output.ndim >= 2 and output.shape[-1] > 1
        if rows and torch.allclose(output.sum(-1), torch.ones(()).to(output), atol=1e-3):
            return "probabilities"
        return "sigmoid"
    return "logits" if output.ndim == 2 and output.shape[1] >= 2 else "values"


def float_outputs(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output, nested as it may be."""
    return [t for t in all_tensors(output) if t.is_floating_point()]


def choose_kinds(output: Any, wish: str) -> list[str]:
    """The kind of every float tensor of an output; `wish` other than "auto" overrides.

    Raises:
        CallError: `wish` is unknown.
    """
    if wish != "auto" and wish not in KINDS:
        raise CallError(f"The 'output' must be one of auto, {', '.join(KINDS)}. Got '{wish}' instead.")
    return [output_kind(t.detach().float()) if wish == "auto" else wish for t in float_outputs(output)]


def kinds_of(output: Any, kinds: list[str]) -> list[str]:
    """The kinds of an output's float tensors; read anew for another number of them, as lists of samples give."""
    outputs = float_outputs(output)
    if len(outputs) == len(kinds):
        return kinds
    return kinds[:1] * len(outputs) if len(set(kinds)) == 1 else choose_kinds(output, "auto")


def sampled_loss(output: Any, kinds: list[str], generator: torch.Generator) -> Tensor:
    """Sum over samples of the loss on labels drawn from the output itself, summed over its float tensors."""
    losses = [
        _sampled(t.float(), kind, generator)
        for t, kind in zip(float_outputs(output), kinds_of(output, kinds), strict=True)
    ]
    return torch.stack(losses).sum()


def _sampled(output: Tensor, kind: str, generator: torch.Generator) -> Tensor:
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


def divergence(kinds: list[str], before: Any, after: Any) -> float:
    """How far an output moved, per sample, in the unit of `sampled_loss`: KL in nats, or half the squared change."""
    total = 0.0
    for kind, p, q in zip(kinds_of(before, kinds), float_outputs(before), float_outputs(after), strict=True):
        moved = float(_divergence(kind, p.double(), q.double())) / max(1, p.shape[0] if p.ndim else 1)
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

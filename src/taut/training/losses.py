"""What is minimized: the user's loss, and distillation, which needs no labels.

Distillation (Hinton et al. 2015) compares the outputs of the compressed net with the original's, read as `observe`
reads them:

    logits         T^2 KL(softmax(p / T) || softmax(q / T)), T = 2
    probabilities  KL(p || q)
    sigmoid        the sum over elements of the Bernoulli KL(p || q)
    values         ||p - q||^2 / ||p - mean p||^2

each a mean over samples, summed over the float tensors of the output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from taut.errors import CallError, DataError
from taut.structure.fisher import choose_kinds, float_outputs

Loss = Callable[[Any, Any], Tensor]

TEMPERATURE = 2.0
TINY = 1e-6


def distillation(kinds: list[str], original: Any, output: Any) -> Tensor:
    """How far `output` is from the `original`'s, per sample; 0 where they agree.

    Raises:
        DataError: the outputs have different shapes, or none is floating point.
    """
    pairs = list(zip(kinds, float_outputs(original), float_outputs(output), strict=False))
    if not pairs or any(p.shape != q.shape for _, p, q in pairs):
        raise DataError("Distillation needs floating-point outputs of the same shapes from both models.")
    return torch.stack([_distance(kind, p.detach().float(), q.float()) for kind, p, q in pairs]).sum()


def _distance(kind: str, p: Tensor, q: Tensor) -> Tensor:
    samples = max(1, p.shape[0] if p.ndim else 1)
    if kind == "values":
        return (p - q).square().sum() / (p - p.mean(0)).square().sum().clamp_min(TINY)
    if kind == "sigmoid":
        target = p.clamp(0, 1)
        entropy = functional.binary_cross_entropy(target, target, reduction="sum")
        return (functional.binary_cross_entropy(q.clamp(TINY, 1 - TINY), target, reduction="sum") - entropy) / samples
    if kind == "logits":
        soft, mine = (p / TEMPERATURE).log_softmax(-1), (q / TEMPERATURE).log_softmax(-1)
        return TEMPERATURE**2 * functional.kl_div(mine, soft, reduction="sum", log_target=True) / samples
    return (
        functional.kl_div(q.clamp_min(TINY).log(), p.clamp_min(TINY).log(), reduction="sum", log_target=True) / samples
    )


class Objective:
    """The number that a stage minimizes.

    Attributes:
        loss: the user's, or None. share: weight of the distillation.
    """

    def __init__(self, loss: Loss | None, share: float | None) -> None:
        """Settle the weights.

        Raises:
            CallError: the share asks for a loss that was not given.
        """
        self.loss = loss
        self.share = (1.0 if loss is None else 0.0) if share is None else share
        if self.loss is None and self.share < 1:
            raise CallError(f"A stage with 'distill' {self.share} needs a loss for the rest: give loss=.")
        self.kinds: list[str] = []

    @property
    def distills(self) -> bool:
        """Whether the original's outputs are needed."""
        return self.share > 0

    def __call__(self, output: Any, targets: Any, original: Any) -> Tensor:
        """The loss of a batch, a mean over its samples.

        Raises:
            DataError: the user's loss needs targets that the batch does not have.
        """
        total = torch.zeros(())
        if self.loss is not None and self.share < 1:
            if targets is None:
                raise DataError("The loss needs targets: give training batches as (inputs, targets).")
            total = (1 - self.share) * self.loss(output, targets)
        if self.distills:
            self.kinds = self.kinds or choose_kinds(original, "auto")
            return total + self.share * distillation(self.kinds, original, output)
        return total

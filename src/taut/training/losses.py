"""What is minimized: the user's loss, and distillation, which needs no labels.

Distillation (Hinton et al. 2015) compares the outputs of the compressed net with the original's, read as `observe`
reads them:

    logits         T^2 KL(softmax(p / T) || softmax(q / T)), T = 2
    probabilities  KL(p || q)
    sigmoid        the sum over elements of the Bernoulli KL(p || q)
    values         the mean over elements of (p - q)^2 / v, v the variance of p over the first batch

each a mean over samples, summed over the float tensors of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict
from torch import Tensor
from torch.nn import functional

from taut.core.tensors import describe
from taut.core.user_code import call
from taut.errors import CallError, DataError
from taut.structure.kinds import Look, Reader, choose_kinds, float_outputs, name_of, real_of, rows_of
from taut.types.budget import FORBID

Loss = Callable[[Any, Any], Tensor]

TEMPERATURE = 2.0
TINY = 1e-6


@dataclass(frozen=True)
class Reading:
    """How the original's outputs are read: settled once for a whole run.

    Attributes:
        kinds: of every float tensor. scales: variance of those that are values, 1 for the others.
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID
    kinds: tuple[str, ...]
    scales: tuple[float, ...]

    @classmethod
    def of(cls, original: Any, kinds: Sequence[str] = (), output: str = "auto", look: Look | None = None) -> Reading:
        """From the original's output on a batch; `kinds` that are known already are taken over.

        Args:
            original: the output, or what of it counts.
            kinds: of its tensors, where they are known.
            output: "auto" or the kind that is wished for.
            look: what else is known of the output.

        Raises:
            CallError: `output` is unknown.
            DataError: no tensor of the output is floating point.
        """
        found = [t.detach().float() for t in float_outputs(original)]
        if not found:
            raise DataError("Distillation needs floating-point outputs.")
        settled = list(kinds) if len(kinds) == len(found) else choose_kinds(original, output, look)
        parts = zip(found, settled, real_of(original), strict=True)
        scales = [
            _variance(t if real is None else rows_of(t, k, real)) if k == "values" else 1.0 for t, k, real in parts
        ]
        return cls(tuple(settled), tuple(scales))

    def distance(self, original: Any, output: Any) -> Tensor:
        """How far `output` is from the `original`'s, per sample; 0 where they agree.

        Raises:
            DataError: the outputs have different shapes.
        """
        pairs = list(zip(float_outputs(original), float_outputs(output), strict=False))
        if len(pairs) != len(self.kinds) or any(p.shape != q.shape for p, q in pairs):
            raise DataError("Distillation needs floating-point outputs of the same shapes from both models.")
        parts = [
            _distance(
                name_of(kind), (rows_of(p.detach().float(), kind, real), rows_of(q.float(), kind, real)), _samples(p)
            )
            / scale
            for kind, scale, real, (p, q) in zip(self.kinds, self.scales, real_of(original), pairs, strict=True)
        ]
        return torch.stack(parts).sum()


def _variance(p: Tensor) -> float:
    """Over the samples of a batch; of a single sample the mean square."""
    spread = (p - p.mean(0)).square().mean() if p.ndim and len(p) > 1 else p.square().mean()
    return float(spread) or 1.0


def _samples(p: Tensor) -> int:
    return max(1, p.shape[0] if p.ndim else 1)


def _distance(kind: str, rows: tuple[Tensor, Tensor], samples: int) -> Tensor:
    p, q = rows
    if not p.numel():
        return q.sum()
    if kind == "values":
        return (p - q).square().mean()
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


def _scalar(value: Any, output: Any) -> Tensor:
    """What the user's loss gave, as the one number that can be minimized.

    Raises:
        DataError: it is something else.
    """
    wanted = "return one number as a tensor, a mean over the samples, computed from the outputs by torch"
    if not isinstance(value, Tensor):
        raise DataError(f"loss returned {describe(value)}: {wanted}.")
    if value.numel() != 1 or not value.is_floating_point():
        kind = str(value.dtype).removeprefix("torch.")
        raise DataError(f"loss returned a {kind} tensor of shape {tuple(value.shape)}: {wanted}.")
    if not value.requires_grad and any(t.requires_grad for t in float_outputs(output)):
        raise DataError(f"loss returned a tensor without a gradient, as after .item() or .detach(): {wanted}.")
    return value.reshape(())


class Objective:
    """The number that a stage minimizes.

    Attributes:
        loss: the user's, or None. share: weight of the distillation. reading: of the original's outputs, once settled.
    """

    def __init__(
        self,
        loss: Loss | None,
        share: float | None,
        kinds: Sequence[str] = (),
        output: str = "auto",
        reader: Reader | None = None,
    ) -> None:
        """Settle the weights.

        Args:
            loss: the user's.
            share: weight of the distillation; None: all of it without a loss, else nothing.
            kinds: of the tensors of an output, where they are known.
            output: "auto" or the kind that is wished for.
            reader: knows what of an output counts; None: all that is an answer.

        Raises:
            CallError: the share asks for a loss that was not given.
        """
        self.loss = loss
        self.share = (1.0 if loss is None else 0.0) if share is None else share
        if self.loss is None and self.share < 1:
            raise CallError(f"A stage with 'distill' {self.share} needs a loss for the rest: give loss=.")
        self.kinds, self.output, self.reader = kinds, output, reader
        self.reading: Reading | None = None

    @property
    def distills(self) -> bool:
        """Whether the original's outputs are needed."""
        return self.share > 0

    def settle(self, original: Any, inputs: Any = None, targets: Any = None) -> Reading:
        """Settle how the original's outputs are read, from those of one whole batch."""
        look = None if self.reader is None else self.reader.look(inputs, targets)
        self.reading = Reading.of(self._answers(original, inputs), self.kinds, self.output, look)
        return self.reading

    def _answers(self, output: Any, inputs: Any) -> Any:
        return output if self.reader is None else self.reader.answers(output, inputs)

    def __call__(self, output: Any, targets: Any, original: Any, inputs: Any = None) -> Tensor:
        """The loss of a batch, a mean over its samples.

        Args:
            output: of the compressed network.
            targets: for the user's loss.
            original: what the original gives.
            inputs: of both, which say what is padding.

        Raises:
            DataError: the user's loss needs targets that the batch does not have, raised, or gave no scalar.
        """
        total = torch.zeros(())
        if self.loss is not None and self.share < 1:
            if targets is None:
                raise DataError("The loss needs targets: give training batches as (inputs, targets).")
            total = (1 - self.share) * _scalar(call("loss", self.loss, output, targets), output)
        if self.distills:
            if self.reading is None:
                raise CallError("Distillation starts with a reading of the original's output.")
            return total + self.share * self.reading.distance(
                self._answers(original, inputs), self._answers(output, inputs)
            )
        return total

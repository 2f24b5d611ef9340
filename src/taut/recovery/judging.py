"""Samples that judge: how far the outputs of a compressed model are from the original's, on what no refit saw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taut.calls import Example, evaluating
from taut.nested import fresh
from taut.recovery.samples import joined
from taut.structure.fisher import choose_kinds, divergence, float_outputs, kinds_of
from taut.structure.surgery import shallow

CLASSES = frozenset({"logits", "probabilities"})


class Judge:
    """Batches, each run at its own size, with the original's outputs on them.

    Attributes:
        batches: inputs.
    """

    def __init__(self, example: Example, original: nn.Module, batches: Sequence[Any], kinds: Sequence[str]) -> None:
        """Note the outputs of `original`.

        Args:
            example: how the models are called.
            original: the model.
            batches: inputs, of any sizes; joined where the model takes them together.
            kinds: how outputs are read (`taut.observe`); empty: by what they look like.
        """
        self.example = example
        self.batches = joined(example, original, batches)
        self._samples = [example.samples.size(inputs) for inputs in self.batches]
        self._wanted = self._outputs(original)
        self._kinds = list(kinds) or choose_kinds(self._wanted[0], "auto")

    def _outputs(self, model: nn.Module) -> list[Any]:
        copied = shallow(model)
        with evaluating(copied), torch.no_grad():
            return [fresh(self.example.run(copied, inputs)) for inputs in self.batches]

    def divergence(self, model: nn.Module) -> float:
        """How far the outputs moved, per sample in the unit of the loss; infinite where they do not compare."""
        moved = [
            size * self._moved(before, after)
            for size, before, after in zip(self._samples, self._wanted, self._outputs(model), strict=True)
        ]
        mean = sum(moved) / sum(self._samples)
        return mean if math.isfinite(mean) else math.inf

    def _moved(self, before: Any, after: Any) -> float:
        pairs = float_outputs(before), float_outputs(after)
        if [t.shape for t in pairs[0]] != [t.shape for t in pairs[1]]:
            return math.inf
        return divergence(self._kinds, *pairs) / (len(before) if self.example.samples.listed else 1)

    def agreement(self, model: nn.Module) -> float:
        """The share of answers that are the original's: of classes the first; else how much of the variance is kept."""
        shares = [
            (size, self._agreed(before, after))
            for size, before, after in zip(self._samples, self._wanted, self._outputs(model), strict=True)
        ]
        return sum(size * share for size, share in shares) / sum(self._samples)

    def _agreed(self, before: Any, after: Any) -> float:
        pairs = float_outputs(before), float_outputs(after)
        if not pairs[0] or [t.shape for t in pairs[0]] != [t.shape for t in pairs[1]]:
            return 0.0
        shares = [_share(kind, p, q) for kind, p, q in zip(kinds_of(before, self._kinds), *pairs, strict=True)]
        return sum(shares) / len(shares)


def _share(kind: str, before: Tensor, after: Tensor) -> float:
    if not bool(torch.isfinite(after).all()):
        return 0.0
    if kind in CLASSES:
        return float((before.argmax(-1) == after.argmax(-1)).double().mean())
    if kind == "sigmoid" and not before.is_complex():
        return float(((before > 0.5) == (after > 0.5)).double().mean())
    p, q = before.double(), after.double()
    varied = float((p - p.mean(0, keepdim=True)).square().sum()) if p.ndim and len(p) > 1 else float(p.square().sum())
    missed = float((p - q).square().sum())
    return max(0.0, 1 - missed / varied) if varied > 0 else float(missed == 0)

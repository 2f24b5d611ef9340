"""Samples that judge: how far the outputs of a compressed model are from the original's, on what no refit saw."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from taut.core.example import Example
from taut.core.modes import evaluating
from taut.recovery.samples import joined
from taut.structure.answers import Answers, answers_of
from taut.structure.coverage import seeded
from taut.structure.fisher import divergence
from taut.structure.kinds import CLASSES, choose_kinds, kinds_of, look_at, name_of, rows_of
from taut.structure.surgery import shallow


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
        self._kinds = list(kinds) or choose_kinds(
            self._wanted[0], "auto", look_at(original, example, self.batches[0], None)
        )

    def _outputs(self, model: nn.Module) -> list[Answers]:
        """Of both models with the same random draws."""
        copied, outputs = shallow(model), []
        for number, inputs in enumerate(self.batches):
            with evaluating(copied), torch.no_grad(), seeded(number):
                answers = answers_of(self.example, self.example.run(copied, inputs), inputs)
                outputs.append(replace(answers, tensors=tuple(t.clone() for t in answers.tensors)))
        return outputs

    def divergence(self, model: nn.Module) -> float:
        """How far the outputs moved, per sample in the unit of the loss; infinite where they do not compare."""
        moved = [
            size * self._moved(before, after, size)
            for size, before, after in zip(self._samples, self._wanted, self._outputs(model), strict=True)
        ]
        mean = sum(moved) / sum(self._samples)
        return mean if math.isfinite(mean) else math.inf

    def _moved(self, before: Answers, after: Answers, size: int) -> float:
        if not before.tensors or [t.shape for t in before.tensors] != [t.shape for t in after.tensors]:
            return math.inf
        one_by_one = self.example.samples.listed and before.items == size
        return divergence(self._kinds, before, after) / (size if one_by_one else 1)

    def agreement(self, model: nn.Module) -> float:
        """The share of answers that are the original's: of classes the first; else how much of the variance is kept."""
        tallies: dict[Any, _Tally] = defaultdict(_Tally)
        for before, after in zip(self._wanted, self._outputs(model), strict=True):
            kinds = kinds_of(before, self._kinds)
            for number, (kind, p, real) in enumerate(zip(kinds, before.tensors, before.real, strict=True)):
                same = len(before.tensors) == len(after.tensors) and after.tensors[number].shape == p.shape
                pair = [rows_of(t, kind, real) for t in ((p, after.tensors[number]) if same else (p,))]
                column, shape = 0 if self.example.samples.listed else number, pair[0].shape
                tally = tallies[column, kind, shape[1:] if len(shape) > 1 else ()]
                tally.add(name_of(kind), pair[0], pair[1] if same else None)
        shares = [(tally.weight, tally.share) for tally in tallies.values()]
        return sum(weight * share for weight, share in shares) / sum(weight for weight, _ in shares) if shares else 0.0


@dataclass
class _Tally:
    """Answers of one output over all batches.

    Attributes:
        weight: answers compared. right: the original's of them; of values, squared errors instead.
        total, squares: of values, their sums and the sums of their squares, for every one of a sample.
    """

    weight: float = 0.0
    right: float = 0.0
    missed: float = 0.0
    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    values: bool = False

    def add(self, kind: str, before: Tensor, after: Tensor | None) -> None:
        """Count one batch; an output that does not compare, or is not finite, gives nothing right."""
        if after is not None and not bool(torch.isfinite(after).all()):
            after = None
        if kind in CLASSES:
            self.weight += before.numel() / before.shape[-1]
            self.right += 0.0 if after is None else float((before.argmax(-1) == after.argmax(-1)).sum())
        elif kind == "sigmoid":
            self.weight += before.numel()
            self.right += 0.0 if after is None else float(((before > 0.5) == (after > 0.5)).sum())
        else:
            self.values = True
            p = before.double().reshape(len(before) if before.ndim > 1 else before.numel(), -1)
            q = torch.zeros_like(p) if after is None else after.double().reshape(p.shape)
            self.weight += len(p)
            self.total, self.squares = self.total + p.sum(0), self.squares + p.square().sum(0)
            self.missed += float((p - q).square().sum())

    @property
    def share(self) -> float:
        """Of the answers, or of their variance, that is kept."""
        if not self.values:
            return self.right / self.weight if self.weight else 0.0
        mean = torch.as_tensor(self.total) / self.weight
        varied = float((torch.as_tensor(self.squares) - self.weight * mean.square()).sum())
        if self.weight == 1:
            varied = float(torch.as_tensor(self.squares).sum())  # nothing to vary over
        return max(0.0, 1 - self.missed / varied) if varied > 0 else float(self.missed == 0)

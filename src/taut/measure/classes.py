"""Which class a smaller network harms most: a mean over all may hide that one of them is gone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from taut.core.example import Example
from taut.core.modes import evaluating
from taut.core.tensors import tensors

FEWEST = 10
"""Samples of a class below which its share of right answers says nothing."""


UNTOLD = -100
"""The label of samples that torch's losses leave out."""


@dataclass(frozen=True)
class ClassChange:
    """The class whose share of right answers fell most.

    Attributes:
        label: its number. n: its samples. classes: those with enough samples, of which it is the worst.
        before, after: share of right answers of the original and of the compressed model.
        low, high: 95 % interval of the change, as of this class alone.
    """

    label: int
    n: int
    classes: int
    before: float
    after: float
    low: float
    high: float


def worst_class(
    example: Example, original: nn.Module, small: nn.Module, batches: Iterable[tuple[Any, Any]]
) -> ClassChange | None:
    """The class that lost most, where the targets are classes that the original knows; else None.

    Args:
        example: how the models are called.
        original: in eval mode meanwhile.
        small: likewise.
        batches: inputs and targets.
    """
    labels, right = [], []
    width = 0
    for inputs, targets in batches:
        classes = _classes(targets)
        if classes is None:
            return None
        labelled = classes != UNTOLD
        answers = []
        for model in (original, small):
            with torch.no_grad(), evaluating(model):
                output = next(iter(tensors(example.run(model, inputs))), None)
            if output is None or output.ndim != 2 or len(output) != len(classes) or not output.is_floating_point():
                return None
            width = output.shape[1]
            answers.append((output.argmax(1).cpu() == classes)[labelled])
        labels.append(classes[labelled])
        right.append(torch.stack(answers, 1))
    return _worst(torch.cat(labels), torch.cat(right).double(), width) if sum(map(len, labels)) else None


def _classes(targets: Any) -> Tensor | None:
    """The class of every sample (n,): of whole numbers, a column or a list of them, or of ones among zeros."""
    if isinstance(targets, list | tuple) and targets and all(type(target) is int for target in targets):
        targets = torch.tensor(targets)
    if not isinstance(targets, Tensor) or targets.is_complex():
        return None
    targets = targets.detach().cpu()
    if targets.ndim == 2 and targets.shape[1] > 1:
        single = bool(((targets == 0) | (targets == 1)).all()) and bool((targets.sum(1) == 1).all())
        return targets.long().argmax(1) if single else None
    if targets.ndim == 2 and targets.shape[1] == 1:
        targets = targets[:, 0]
    return None if targets.ndim != 1 or targets.is_floating_point() else targets.long()


def _worst(labels: Tensor, right: Tensor, width: int) -> ClassChange | None:
    """Of the labels (n,) and whether both models are right (n, 2)."""
    chance, n = 1 / max(width, 1), len(labels)
    if width < 2 or int(labels.min()) < 0 or int(labels.max()) >= width:
        return None
    if float(right[:, 0].mean()) <= chance + 3 * math.sqrt(chance * (1 - chance) / n):
        return None  # these numbers are no classes that the original knows
    pairs = []
    for label in sorted(set(labels.tolist())):
        own = right[labels == label]
        if len(own) >= FEWEST:
            change = own[:, 1] - own[:, 0]
            half = 1.96 * float(change.std()) / math.sqrt(len(own))
            mean = float(change.mean())
            before, after = own.mean(0).tolist()
            pairs.append((mean, ClassChange(label, len(own), 0, before, after, mean - half, mean + half)))
    if len(pairs) < 2:
        return None
    worst = min(pairs, key=lambda pair: pair[0])[1]
    return ClassChange(worst.label, worst.n, len(pairs), worst.before, worst.after, worst.low, worst.high)

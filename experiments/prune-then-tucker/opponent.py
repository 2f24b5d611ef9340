"""The strongest peer, Torch-Pruning 1.6.1, cut to a fraction of the MACs: one shot, all layers ranked together."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

import taut
from taut.errors import BudgetError, CallError

SAMPLES = 512
"""Images whose gradients Taylor importance reads."""

BATCH = 128
SCAN = 16
"""Pruning ratios tried first, equally spaced; above them MACs may rise again: a layer of which every channel ranks
below the threshold is kept whole."""

HALVINGS = 9
"""Of the interval before the first ratio within the budget; 1/8192 is less than a channel of these nets."""

IMPORTANCES: dict[str, Any] = {
    "l2": tp.importance.GroupMagnitudeImportance,
    "taylor": tp.importance.GroupTaylorImportance,
}
"""Name -> norm of a channel's group of weights (p = 2), or sum of |w dL/dw| over it (Molchanov et al. 2019)."""


def _gradients(net: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor | None]:
    """Of the cross-entropy summed over batches, one per parameter; a factor over all of them changes no rank."""
    copied = copy.deepcopy(net).eval()
    for x, y in zip(images[:SAMPLES].split(BATCH), labels[:SAMPLES].split(BATCH), strict=True):
        nn.functional.cross_entropy(copied(x), y, reduction="sum").backward()
    return [parameter.grad for parameter in copied.parameters()]


def _pruned(
    net: nn.Module, example: Tensor, ratio: float, importance: Any, gradients: list[Tensor | None]
) -> nn.Module:
    """A copy of the net without `ratio` of its channels; the classifier's outputs stay."""
    copied = copy.deepcopy(net).eval()
    for parameter, gradient in zip(copied.parameters(), gradients, strict=False):  # no gradients for l2
        parameter.grad = gradient  # a deep copy of a parameter has none
    last = [module for module in copied.modules() if isinstance(module, nn.Linear)][-1]
    pruner = tp.pruner.BasePruner(
        copied,
        example,
        importance=importance,
        global_pruning=True,
        pruning_ratio=ratio,
        ignored_layers=[last],
        round_to=None,
    )
    pruner.step()
    copied.zero_grad()
    return copied


def opponent(
    net: nn.Module, example: Tensor, macs: float, importance: str, images: Tensor, labels: Tensor
) -> nn.Module:
    """The net with at most `macs` of its multiply-accumulates: the least pruned one, by ratio.

    Args:
        net: a classifier whose last Linear layer gives the logits; it is not changed.
        example: an input of one sample.
        macs: fraction kept, counted as for our own nets.
        importance: "l2" or "taylor".
        images: of the training split; the first 512 are used, by "taylor" only.
        labels: theirs.

    Returns:
        A smaller net in eval mode, not trained.

    Raises:
        CallError: the importance is unknown.
        BudgetError: no ratio gives so few MACs.
    """
    if importance not in IMPORTANCES:
        raise CallError(
            f"The 'importance' of Torch-Pruning must be {' or '.join(IMPORTANCES)}. Got {importance} instead."
        )
    score = IMPORTANCES[importance]()
    limit = macs * taut.trace(net, example).cost.macs
    with torch.enable_grad():  # its graph of dependencies is read off the graph of gradients
        gradients = _gradients(net, images, labels) if importance == "taylor" else []

        def within(ratio: float) -> nn.Module | None:
            small = _pruned(net, example, ratio, score, gradients)
            return small if taut.trace(small, example).cost.macs <= limit else None

        tried = ((place / SCAN, within(place / SCAN)) for place in range(SCAN))
        high, best = next(((ratio, small) for ratio, small in tried if small is not None), (1.0, None))
        if best is None:
            raise BudgetError(f"Torch-Pruning found no pruning ratio for {macs:g} of the MACs.")
        low = high - 1 / SCAN
        for _ in range(HALVINGS):
            ratio = (low + high) / 2
            small = within(ratio)
            low, high, best = (ratio, high, best) if small is None else (low, ratio, small)
    return best

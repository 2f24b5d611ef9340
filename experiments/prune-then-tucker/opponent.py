"""The strongest peer, Torch-Pruning 1.6.1, cut to a fraction of the MACs in one shot."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

Inputs = tuple[Tensor, ...]
"""One tensor for each argument of a net."""


@dataclass(frozen=True)
class Peer:
    """How the peer ranks channels, and what it must know of a net.

    Attributes:
        importance: "l2" or "taylor".
        overall: whether all layers are ranked together; else each loses the same share.
        loss: of outputs and targets, a mean over samples; read by "taylor" only.
        kept: names of layers of which all outputs stay; None: the last Linear layer, a classifier's.
        multiple: of what widths have to be, as heads of attention want it; None: of nothing.
    """

    importance: str
    overall: bool = True
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy
    kept: Sequence[str] | None = None
    multiple: int | None = None

    def gradients(self, net: nn.Module, inputs: Inputs, targets: Tensor) -> list[Tensor | None]:
        """Of the loss summed over the samples, one per parameter; a factor over all of them changes no rank."""
        copied = copy.deepcopy(net).eval()
        for start in range(0, min(SAMPLES, len(targets)), BATCH):
            rows = slice(start, min(start + BATCH, SAMPLES))
            answer = copied(*(part[rows] for part in inputs))
            (len(targets[rows]) * self.loss(answer, targets[rows])).backward()
        return [parameter.grad for parameter in copied.parameters()]

    def pruned(self, net: nn.Module, example: Inputs, ratio: float, gradients: list[Tensor | None]) -> nn.Module:
        """A copy of the net without `ratio` of its channels."""
        copied = copy.deepcopy(net).eval()
        for parameter, gradient in zip(copied.parameters(), gradients, strict=False):  # no gradients for l2
            parameter.grad = gradient  # a deep copy of a parameter has none
        last = [module for module in copied.modules() if isinstance(module, nn.Linear)][-1:]
        pruner = tp.pruner.BasePruner(
            copied,
            example,
            importance=IMPORTANCES[self.importance](),
            global_pruning=self.overall,
            pruning_ratio=ratio,
            ignored_layers=last if self.kept is None else [copied.get_submodule(name) for name in self.kept],
            round_to=self.multiple,
        )
        pruner.step()
        copied.zero_grad()
        return copied


def opponent(
    net: nn.Module, example: Tensor | Inputs, macs: float, peer: str | Peer, inputs: Tensor | Inputs, targets: Tensor
) -> nn.Module:
    """The net with at most `macs` of its multiply-accumulates: the least pruned one, by ratio.

    Args:
        net: it is not changed.
        example: an input of one sample, or a tuple of them where there are several.
        macs: fraction kept, counted as for our own nets.
        peer: how channels are ranked; "l2" or "taylor" for a classifier, all layers together.
        inputs: of the training split, as the example; the first 512 are used, by "taylor" only.
        targets: theirs.

    Returns:
        A smaller net in eval mode, not trained.

    Raises:
        CallError: the importance is unknown.
        BudgetError: no ratio gives so few MACs.
    """
    peer = Peer(peer) if isinstance(peer, str) else peer
    if peer.importance not in IMPORTANCES:
        raise CallError(
            f"The 'importance' of Torch-Pruning must be {' or '.join(IMPORTANCES)}. Got {peer.importance} instead."
        )
    example, inputs = ((each,) if isinstance(each, Tensor) else each for each in (example, inputs))
    limit = macs * taut.trace(net, example).cost.macs
    with torch.enable_grad():  # its graph of dependencies is read off the graph of gradients
        gradients = peer.gradients(net, inputs, targets) if peer.importance == "taylor" else []

        def within(ratio: float) -> nn.Module | None:
            small = peer.pruned(net, example, ratio, gradients)
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

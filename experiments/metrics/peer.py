"""The strongest peer, Torch-Pruning, cut to the same MACs as our nets: one shot, global, classifier spared."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

import taut

STEPS = 12
"""Halvings of the interval in which the pruning ratio is sought."""


def macs(net: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates per sample, counted as for our own nets."""
    return taut.trace(net, example).cost.macs


def _pruned(net: nn.Module, example: Tensor, ratio: float, importance: Any, batches: list[Any] | None) -> nn.Module:
    copied = copy.deepcopy(net)
    last = [module for module in copied.modules() if isinstance(module, nn.Linear)][-1]
    pruner = tp.pruner.MetaPruner(
        copied,
        example,
        importance=importance,
        global_pruning=True,
        pruning_ratio=ratio,
        ignored_layers=[last],
        round_to=None,
    )
    for x, y in batches or []:  # Taylor importance reads the gradients
        nn.functional.cross_entropy(copied(x), y).backward()
    pruner.step()
    copied.zero_grad()
    return copied.eval()


def prune(net: nn.Module, example: Tensor, times: float, kind: str, batches: list[Any]) -> nn.Module:
    """The net with `times` fewer MACs (the largest net within that budget), by "l2" or "taylor" importance."""
    importance = {"l2": tp.importance.GroupMagnitudeImportance, "taylor": tp.importance.GroupTaylorImportance}[kind]()
    limit = macs(net, example) / times
    data = batches if kind == "taylor" else None
    low, high, best = 0.0, 0.98, None
    with torch.enable_grad():
        for _ in range(STEPS):
            ratio = (low + high) / 2
            small = _pruned(net, example, ratio, importance, data)
            if macs(small, example) <= limit:
                best, high = small, ratio
            else:
                low = ratio
    if best is None:
        raise RuntimeError(f"Torch-Pruning found no ratio for {times}x fewer MACs.")
    return best

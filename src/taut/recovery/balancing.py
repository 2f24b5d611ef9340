"""Factors of one layer brought to the same norm before training: the product, and so the function, stays.

An optimizer moves every weight by about its learning rate. Where a factor has weights of 0.003 beside one with weights
of 3, a rate that moves the second at all destroys the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from taut.decompose.balance import level
from taut.structure.surgery import HOOKS

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@torch.no_grad()
def balance(model: nn.Module) -> None:
    """Level the norms of layers that follow each other in a Sequential with nothing, not even a bias, between them."""
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    for sequence in model.modules():
        if isinstance(sequence, nn.Sequential):
            for chain in _chains(sequence, uses):
                weights = level(*(layer.weight.double() for layer in chain))
                for layer, weight in zip(chain, weights, strict=True):
                    layer.weight.copy_(weight)


def _chains(sequence: nn.Sequential, uses: dict[int, int]) -> Iterator[list[Any]]:
    """Runs of two and more; all but the last without bias, none tied, hooked, frozen or parametrized."""
    run: list[Any] = []
    for layer in sequence:
        plain = type(layer) in KINDS and not any(getattr(layer, hooks) for hooks in HOOKS)
        if plain and layer.weight.requires_grad and uses[id(layer.weight)] == 1:
            run.append(layer)
            if layer.bias is None:
                continue
        if len(run) > 1:
            yield run
        run = []
    if len(run) > 1:
        yield run

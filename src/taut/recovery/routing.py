"""Layers of which every run decides anew which rows they get, as experts: what they have to give for those of now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from taut.nn import GroupedLinear, Product
from taut.recovery.targets import Seen, Target
from taut.structure.patches import CONVOLUTIONS, choose, fan_in, groups_of, output_rows


def routed(model: nn.Module, name: str) -> bool:
    """Whether a layer is one of a stack of matrices, or all of it, of which a router may choose for every row."""
    parent = model.get_submodule(name.rpartition(".")[0])
    return isinstance(parent, Product) and len(parent.sizes) > 2 and (parent.stacked or len(parent._modules) > 1)


def of_present_rows(original: nn.Module, target: Target, inputs: Mapping[int, Tensor], *, always: bool) -> Target:
    """What a layer has to give: what it gave, or where rows are others now what the original's weights give for them.

    Other layers became smaller, so the router chooses otherwise: rows of then and of now do not belong together.

    Args:
        original: the layer.
        target: what it gave.
        inputs: what comes to it now, batch by batch.
        always: whether rows are others even where there are as many.
    """
    stacked = isinstance(original, GroupedLinear)
    if isinstance(original, CONVOLUTIONS) and not stacked:
        return target
    same = all(
        _rows_of(inputs[number], stacked) == _rows_of(seen.output, stacked) for number, seen in target.seen.items()
    )
    if same and not always:
        return target
    present: dict[int, Seen] = {}
    for number, seen in target.seen.items():
        x = inputs[number]
        width = x.shape[1] if stacked else x.shape[-1]
        count = x.numel() // max(width, 1)
        if count and width == fan_in(original) * groups_of(original):
            index = choose(count, len(seen.index), number)
            with torch.no_grad():
                output = original.forward(x)
            present[number] = Seen(index, output_rows(original, output, index).to(seen.rows), output.to("meta"))
    return replace(target, seen=present, norm="", follows=None)


def _rows_of(t: Tensor, stacked: bool) -> torch.Size:
    """The axes along which rows lie."""
    return t.shape[2:] if stacked else t.shape[:-1]

"""Narrower layers whose remaining weights make up for the inputs that are gone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from taut.criteria.channels import Reader, kept_weights
from taut.decompose.linalg import ridge
from taut.methods.channels.importance import RIDGE
from taut.methods.narrow_layers import slim
from taut.structure.channels.cuts import sides_of
from taut.structure.narrowing import Cut
from taut.structure.patches import grouped_weight, weight_of
from taut.structure.statistics import LayerStatistics


def refilled(module: nn.Module, cut: Cut, stats: LayerStatistics | None) -> nn.Module:
    """The narrower layer; where inputs went and their second moments are known, those that stay make up for them."""
    small = slim(module, cut)
    if stats is None or not stats.weighting.known or len(cut.inputs) == sides_of(module)[1]:
        return small
    if not bool(weight_of(module).all()):
        return small  # pruned before: what is zero stays zero
    made_up = _made_up(module, cut, stats)
    if made_up is not None:
        weight: Any = small.weight
        weight.data.copy_(made_up.reshape(weight.shape))
    return small


def _made_up(module: nn.Module, cut: Cut, stats: LayerStatistics) -> Tensor | None:
    """The kept columns moved so that tr(dW A dW^T) is least, of the kept rows; None where A is only sketched."""
    if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | _ConvTransposeNd):
        return None
    W = grouped_weight(module)
    weighting = stats.weighting.handy(W.shape[2])
    held = weighting.full if weighting.full is not None else weighting.channel
    if held is None:
        return None
    g, _, c, taps = W.shape
    kept = torch.zeros(c, dtype=torch.bool)
    kept[cut.inputs] = True
    found = []
    for i in range(g):
        A = ridge(held[i], RIDGE).cpu()
        wide = weighting.full is not None
        rows = W[i].flatten(1) if wide else W[i].movedim(2, 0).flatten(0, 1)
        owner = torch.arange(c).repeat_interleave(taps if wide else 1)
        moved = kept_weights(Reader(rows.cpu(), A, owner), kept)
        found.append(moved.reshape(-1, c, taps) if wide else moved.reshape(taps, -1, c).movedim(0, 2))
    made_up = torch.cat(found)[cut.outputs][:, cut.inputs]
    return made_up.transpose(0, 1) if isinstance(module, _ConvTransposeNd) else made_up

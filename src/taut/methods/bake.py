"""Bake: a weight that is computed at every call becomes a plain one; the output does not change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from taut.methods.plain_form import PlainForm
from taut.structure.baking import baked
from taut.structure.support import BAKED, COMPUTED
from taut.types import Cost, Group, Layer, Rewrite


@dataclass(frozen=True)
class Bake(PlainForm):
    """Compute the weight once: of weight norm, spectral norm, any other parametrization, and torch's pruning masks.

    What is baked is what a forward pass in eval mode sees, so the network computes the same. What is trained afterwards
    is the weight itself: spectral norm no longer bounds it in train mode (its power iteration is gone), weight norm no
    longer separates length and direction, and pruned weights may become other than zero. `taut.compress` does this
    first, without being asked; layers that no other step is about are as they were in what it gives.
    """

    name: ClassVar[str] = "bake"

    def refuses(self, group: Group) -> str | None:
        """Layers whose weight is their own."""
        if len(group.layers) != 1:
            return "bake takes one layer at a time"
        if group.layer.skip not in {None, COMPUTED}:
            return group.layer.skip
        if not group.layer.computed:
            return "bake: its weight is not computed from anything"
        return None if group.layer.kind in BAKED else f"bake: a {group.layer.kind} is not handled"

    def restored(self, module: nn.Module) -> nn.Module:
        """The layer with a weight of its own."""
        return baked(module)

    def rewrite(self, modules: Mapping[str, nn.Module], factors: object) -> Rewrite:
        """The layers with weights of their own."""
        del factors
        return Rewrite({name: baked(module) for name, module in modules.items()}, self)

    def skeleton(self, group: Group) -> Mapping[str, nn.Module]:
        """Modules that hold a weight and a bias of the right shapes."""
        return {layer.name: _shell(layer) for layer in group.layers}

    def cost(self, group: Group) -> Cost:
        """Of the plain layer."""
        layer = group.layer
        params = math.prod(layer.weight) + (math.prod(layer.bias_shape) if layer.bias else 0)
        return Cost(params, params, layer.macs, params * layer.itemsize)


def _shell(layer: Layer) -> nn.Module:
    shell = nn.Module()
    shell.register_parameter("weight", nn.Parameter(torch.empty(layer.weight, device="meta")))
    if layer.bias:
        shell.register_parameter("bias", nn.Parameter(torch.empty(layer.bias_shape, device="meta")))
    return shell

"""As layer: a weight that a network's code multiplies by becomes a layer, and the output stays."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from taut.methods.plain_form import PlainForm
from taut.nn import GroupedLinear
from taut.structure.product_uses import as_product
from taut.structure.support import MULTIPLIED, PARAMETER
from taut.structure.surgery import clone, hold, part
from taut.types import Cost, Group, Layer, Rewrite


@dataclass(frozen=True)
class AsLayer(PlainForm):
    """Put layers where code multiplies by a weight: F.linear(x, self.qkv.weight), x @ self.w, torch.einsum.

    Which weights are used so, and in no other way, is shown by running the network (`taut.structure.products`), not by
    reading its code. A `taut.nn.Product` takes the parameter's place, and hands every product to an `nn.Linear` without
    a bias inside of it, or to one for every part of the rows. `taut.compress` does this first, without being asked.

    Attributes:
        summed: the axes of the weight that products sum over. rows: how many rows are used together, from first to
            last, where they are used in parts. stacked: whether the first axis counts matrices that are all multiplied
            by at once, as of experts in a batch: they become one layer. All are read off the network.
    """

    summed: list[int] | None = None
    rows: list[int] | None = None
    stacked: bool = False

    name: ClassVar[str] = "as_layer"

    def refuses(self, group: Group) -> str | None:
        """Layers whose weight no other code uses, or not in products alone."""
        if len(group.layers) != 1:
            return "as_layer takes one layer at a time"
        skip = group.layer.skip
        return None if skip == MULTIPLIED else skip or "as_layer: it is a layer already"

    def as_traced(self, group: Group) -> AsLayer:
        """Itself with what the network tells of the weight."""
        layer = group.layer
        summed = list(layer.summed) if self.summed is None else self.summed
        rows = list(layer.rows) if self.rows is None else self.rows
        return replace(self, summed=summed, rows=rows, stacked=self.stacked or layer.stacked)

    def restored(self, module: nn.Module) -> nn.Module:
        """The layers in the place of the parameter that `module` holds as its weight."""
        weight: Any = module.weight
        return as_product(weight, self.summed or (), self.rows or (), stacked=self.stacked)

    def give_back(self, model: nn.Module, original: nn.Module, layer: Layer) -> None:
        """Put the parameter back in the place of the layers, with their values."""
        place = layer.name if layer.kind == PARAMETER else f"{layer.name}.weight"
        own: Any = clone(part(original, place))
        product: Any = model.get_submodule(place)
        with torch.no_grad():
            own.weight.copy_(product.dense())
        hold(model, place, own)

    def factor(self, modules: Mapping[str, nn.Module], stats: Mapping[str, Any]) -> None:
        """Nothing."""
        del modules, stats

    def rewrite(self, modules: Mapping[str, nn.Module], factors: object) -> Rewrite:
        """The layers."""
        del factors
        return Rewrite({name: self.restored(module) for name, module in modules.items()}, self)

    def skeleton(self, group: Group) -> Mapping[str, nn.Module]:
        """Layers with uninitialized weights, numbered."""
        layer = group.layer
        inputs = math.prod(layer.weight[axis] for axis in layer.summed)
        outputs = math.prod(layer.weight) // max(inputs, 1)
        if layer.stacked:
            count = layer.weight[0]
            stack = GroupedLinear(count * inputs, outputs, groups=count, bias=False, device="meta")
            return {layer.name: nn.Sequential(stack)}
        parts = [nn.Linear(inputs, rows, bias=False, device="meta") for rows in layer.rows or (outputs,)]
        return {layer.name: nn.Sequential(*parts)}

    def cost(self, group: Group) -> Cost:
        """As before."""
        return group.layer.cost

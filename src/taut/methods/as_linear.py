"""As linear: a layer that computes a matrix product in its own way becomes an `nn.Linear`, and the output stays."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from taut.methods.layer_factory import linear
from taut.methods.plain_form import PlainForm, fill
from taut.structure.linear_form import computed_linear, linear_form, transposed_in
from taut.structure.support import LINEAR
from taut.types import Cost, Group, Layer, Rewrite


@dataclass(frozen=True)
class AsLinear(PlainForm):
    """Put an `nn.Linear` in the place of transformers' Conv1D, and of all else that computes x W + b or x Wᵀ + b.

    Which layers do is shown by running each in float64 (`taut.structure.linear_form`), not by its name. The network
    computes the same; what was read of the old class alone (`nf` of Conv1D) is no longer there, and where the network
    needs it, the layer stays. Layers that compute their weight (standardized, scaled) are among them: what is trained
    afterwards is the weight itself. What a plain weight would lose (zeros of a mask, frozen parts, a state) stays, with
    the reason. `taut.compress` does this first, without being asked.

    Attributes:
        transposed: whether the layer holds its weight as (inputs, outputs); found out when the step is carried out.
        bias: whether the `nn.Linear` has a bias, where the layer computes its weight; likewise. None: as the layer.
    """

    transposed: bool | None = None
    bias: bool | None = None

    name: ClassVar[str] = "as_linear"

    def refuses(self, group: Group) -> str | None:
        """Layers that are linear ones already, or compute something else."""
        if len(group.layers) != 1:
            return "as_linear takes one layer at a time"
        skip = group.layer.skip
        return None if skip == LINEAR else skip or "as_linear: it is plain already"

    def restored(self, module: nn.Module) -> nn.Module:
        """The layer as an `nn.Linear`; where its weight is computed, with one that is still to be filled."""
        if self.bias is None:
            return linear_form(module, transposed=bool(self.transposed))
        weight: Any = module.weight
        return linear(weight.shape[1], weight.shape[0], bias=self.bias).to(weight)

    def own_form(self, plain: Any, own: nn.Module, layer: Layer) -> nn.Module:
        """The layer, with the values of the `nn.Linear`, as far as it holds them itself."""
        if self.bias is not None:
            return super().own_form(plain, own, layer)
        fill(own, {**plain.state_dict(), "weight": plain.weight.T if self.transposed else plain.weight})
        return own

    def rewrite(self, modules: Mapping[str, nn.Module], factors: object) -> Rewrite:
        """The layer as an `nn.Linear`."""
        del factors
        ((name, module),) = modules.items()
        transposed = transposed_in(module)
        computed = computed_linear(module) if transposed is None else None
        if computed is not None:
            return Rewrite({name: computed}, replace(self, transposed=False, bias=computed.bias is not None))
        resolved = replace(self, transposed=bool(transposed))
        return Rewrite({name: resolved.restored(module)}, resolved)

    def skeleton(self, group: Group) -> Mapping[str, nn.Module]:
        """Linear layers with uninitialized weights."""
        layer = group.layer
        inputs, outputs = layer.weight if self.transposed else layer.weight[::-1]
        bias = layer.bias if self.bias is None else self.bias
        return {layer.name: nn.Linear(inputs, outputs, bias=bias, device="meta")}

    def cost(self, group: Group) -> Cost:
        """As before, less what the weight was computed from."""
        layer = group.layer
        if self.bias is None:
            return layer.cost
        params = math.prod(layer.weight) + self.bias * layer.weight[0]
        return Cost(params, params, layer.macs, params * layer.itemsize)

"""As linear: a layer that computes a matrix product in its own way becomes an `nn.Linear`, and the output stays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from taut.methods.plain_form import PlainForm
from taut.structure.linear_form import linear_form, transposed_in
from taut.structure.support import LINEAR
from taut.types import Cost, Group, Rewrite


@dataclass(frozen=True)
class AsLinear(PlainForm):
    """Put an `nn.Linear` in the place of transformers' Conv1D, and of all else that computes x W + b or x Wᵀ + b.

    Which layers do is shown by running each in float64 (`taut.structure.linear_form`), not by its name. The network
    computes the same; what was read of the old class alone (`nf` of Conv1D) is no longer there, and where the network
    needs it, the layer stays. `taut.compress` does this first, without being asked.

    Attributes:
        transposed: whether the layer holds its weight as (inputs, outputs); found out when the step is carried out.
    """

    transposed: bool | None = None

    name: ClassVar[str] = "as_linear"

    def refuses(self, group: Group) -> str | None:
        """Layers that are linear ones already, or compute something else."""
        if len(group.layers) != 1:
            return "as_linear takes one layer at a time"
        skip = group.layer.skip
        return None if skip == LINEAR else skip or "as_linear: it is plain already"

    def restored(self, module: nn.Module) -> nn.Module:
        """The layer as an `nn.Linear`."""
        return linear_form(module, transposed=bool(self.transposed))

    def rewrite(self, modules: Mapping[str, nn.Module], factors: object) -> Rewrite:
        """The layer as an `nn.Linear`."""
        del factors
        ((name, module),) = modules.items()
        resolved = replace(self, transposed=bool(transposed_in(module)))
        return Rewrite({name: resolved.restored(module)}, resolved)

    def skeleton(self, group: Group) -> Mapping[str, nn.Module]:
        """Linear layers with uninitialized weights."""
        layer = group.layer
        inputs, outputs = layer.weight if self.transposed else layer.weight[::-1]
        return {layer.name: nn.Linear(inputs, outputs, bias=layer.bias, device="meta")}

    def cost(self, group: Group) -> Cost:
        """As before."""
        return group.layer.cost

"""Recurrent layers with a layer for every weight, on torch's own kernel: the output stays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from taut.methods.plain_form import PlainForm
from taut.nn import Recurrent
from taut.structure.support import RECURRENT
from taut.structure.surgery import carry
from taut.types import Cost, Group, Layer, Rewrite

SETTINGS = ("bidirectional", "bias", "batch_first", "dropout")
"""Of torch's layer, which no shape tells."""


@dataclass(frozen=True)
class AsRecurrent(PlainForm):
    """Put a `taut.nn.Recurrent` in the place of an `nn.LSTM`, `nn.GRU` or `nn.RNN`: the same kernel, the same output.

    The weights for the inputs of all gates and directions are one `nn.Linear` then, which other methods take, and those
    for the hidden states are layers whose units may go. `taut.compress` does this first, without being asked; where
    nothing else is done to the layer, it stays torch's. Two biases, stacked layers, both directions, packed sequences
    and states are as they were. Hidden states that are projected (`proj_size`) are left alone.

    Attributes:
        mode: as torch calls it. sizes: inputs, hidden units and layers.
        bidirectional, bias, batch_first, dropout: of torch's layer. All are found out when the step is carried out.
    """

    mode: str | None = None
    sizes: list[int] | None = None
    bidirectional: bool = False
    bias: bool = True
    batch_first: bool = False
    dropout: float = 0.0

    name: ClassVar[str] = "as_recurrent"
    plain: ClassVar[bool] = False

    def refuses(self, group: Group) -> str | None:
        """All layers that are not recurrent."""
        if len(group.layers) != 1:
            return "as_recurrent takes one layer at a time"
        skip = group.layer.skip
        return None if skip == RECURRENT else skip or "as_recurrent: it is no recurrent layer"

    def restored(self, module: Any) -> nn.Module:
        """The layer with its weights as layers; itself where it is one already."""
        return module if isinstance(module, Recurrent) else Recurrent.of(module)

    def own_form(self, plain: Any, own: nn.Module, layer: Layer) -> nn.Module:
        """Torch's layer, with the values of the plain form, which may be others."""
        del layer
        restored: nn.Module = plain.restored()
        carry(own, restored)
        return restored

    def untouched(self, now: Any, before: Any, layer: Layer) -> bool:
        """Whether the plain form has the shapes that it had, and nothing in front of torch's kernel."""
        del layer
        shapes = [{key: p.shape for key, p in module.named_parameters()} for module in (now, before)]
        return shapes[0] == shapes[1] and bool(now.fused())

    def rewrite(self, modules: Mapping[str, nn.Module], factors: object) -> Rewrite:
        """Copies of the weights as layers."""
        del factors
        ((name, module),) = modules.items()
        made: Any = self.restored(module)
        sizes = [made.input_size, made.hidden_size, made.num_layers]
        resolved = replace(self, mode=made.mode, sizes=sizes, **{key: getattr(made, key) for key in SETTINGS})
        return Rewrite({name: made}, resolved)

    def skeleton(self, group: Group) -> Mapping[str, nn.Module]:
        """The layer with uninitialized weights."""
        settings = {key: getattr(self, key) for key in SETTINGS}
        return {
            group.layer.name: Recurrent.empty(self.mode or "LSTM", self.sizes or (1, 1, 1), **settings, device="meta")
        }

    def cost(self, group: Group) -> Cost:
        """As before."""
        return group.layer.cost

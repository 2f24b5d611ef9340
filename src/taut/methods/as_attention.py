"""As attention: torch's packed `nn.MultiheadAttention` becomes layers, and the output stays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import nn

from taut.methods.plain_form import PlainForm, fill, same_values
from taut.nn import Attention
from taut.structure.attention_form import attention_form, packed, settings_of
from taut.structure.support import ATTENTION
from taut.types import Cost, Group, Layer, Rewrite


@dataclass(frozen=True)
class AsAttention(PlainForm):
    """Put a `taut.nn.Attention` in the place of an `nn.MultiheadAttention`, so that its projections are layers.

    Queries, keys, values and the output are `nn.Linear` layers then (`q_proj`, `k_proj`, `v_proj`, `out_proj` under the
    name that the module had), of which each may be factorized, pruned or made narrower. That both compute the same is
    shown by running them (`taut.structure.attention_form`). torch's encoder layers no longer take their fused path;
    those in which nothing else is changed are as they were in what `taut.compress` gives, which does this first,
    without being asked.

    Attributes:
        embed_dim: found out, as all others, when the step is carried out.
        num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first: as in `nn.MultiheadAttention`.
    """

    embed_dim: int | None = None
    num_heads: int | None = None
    dropout: float = 0.0
    bias: bool = True
    add_bias_kv: bool = False
    add_zero_attn: bool = False
    kdim: int | None = None
    vdim: int | None = None
    batch_first: bool = False

    name: ClassVar[str] = "as_attention"
    plain: ClassVar[bool] = False

    def refuses(self, group: Group) -> str | None:
        """All but packed attention."""
        if len(group.layers) != 1:
            return "as_attention takes one layer at a time"
        skip = group.layer.skip
        return None if skip == ATTENTION else skip or "as_attention: it is no packed attention"

    def restored(self, module: nn.Module) -> nn.Module:
        """The module as layers; itself where it is that already."""
        return attention_form(module) if isinstance(module, nn.MultiheadAttention) else module

    def own_form(self, plain: nn.Module, own: nn.Module, layer: Layer) -> nn.Module:
        """Torch's module, with the values of its layers, which may be others."""
        del layer
        if isinstance(plain, Attention):
            fill(own, packed(plain))
        return own

    def untouched(self, now: nn.Module, before: nn.Module, layer: Layer) -> bool:
        """Whether the projections are what they were; their biases may be others."""
        del layer
        return same_values(now, before, [name for name, _ in before.named_parameters() if not name.endswith("bias")])

    def rewrite(self, modules: Mapping[str, nn.Module], factors: object) -> Rewrite:
        """The module as layers."""
        del factors
        ((name, module),) = modules.items()
        if not isinstance(module, nn.MultiheadAttention):
            return Rewrite({name: module}, self)
        return Rewrite({name: attention_form(module)}, AsAttention(**settings_of(module)))

    def skeleton(self, group: Group) -> Mapping[str, nn.Module]:
        """Layers with uninitialized weights."""
        settings: dict[str, Any] = asdict(self)
        return {group.layer.name: Attention(**settings, device="meta")}

    def cost(self, group: Group) -> Cost:
        """As before: what its own parameters cost, without the output projection, which is a layer of its own."""
        return group.layer.cost

"""As conv: a convolution with a forward of its own becomes an ordinary one, and the output stays."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from taut.core.text import brief
from taut.errors import CallError, ModelError
from taut.methods.layer_factory import CONVOLUTIONS, empty
from taut.methods.plain_form import PlainForm
from taut.nn import SamePad
from taut.structure.conv_form import ConvForm, conv_form, own_values
from taut.structure.losses import trained
from taut.structure.own_forms import Known
from taut.structure.support import CONVOLUTION
from taut.types import Cost, Group, Rewrite

PADS: dict[str, tuple[type[nn.Module], ...]] = {
    "zeros": (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
}
"""What adds to an input that no convolution pads by itself: more on one side than on the other."""


@dataclass(frozen=True)
class AsConv(PlainForm):
    """Put an ordinary convolution in the place of one that computes its weight, scales it, or pads by itself.

    timm's StdConv2d, ScaledStdConv2d and Conv2dSame, efficientnet_pytorch's convolutions and their kin: which layers
    are ordinary convolutions of one weight is shown by running each in float64 (`taut.structure.conv_form`), not by its
    name. Where the padding depends on the size of the input, a `taut.nn.SamePad` stands in front. What is trained
    afterwards is the weight itself, no longer what it was computed from. `taut.compress` does this first, without
    being asked; layers that no other step is about are as they were in what it gives.

    Attributes:
        stride: per axis; like all others found out when the step is carried out.
        dilation: per axis.
        groups: of the convolution.
        pads: what is added in front of and behind the first axis, the second, ...; None: as the size asks for.
        mode: what is added.
        bias: whether there is one.
    """

    stride: list[int] | None = None
    dilation: list[int] | None = None
    groups: int | None = None
    pads: list[int] | None = None
    mode: str | None = None
    bias: bool | None = None

    name: ClassVar[str] = "as_conv"

    def refuses(self, group: Group) -> str | None:
        """Layers that are ordinary convolutions already, or compute something else."""
        if len(group.layers) != 1:
            return "as_conv takes one layer at a time"
        skip = group.layer.skip
        return None if skip == CONVOLUTION else skip or "as_conv: it is plain already"

    def restored(self, module: nn.Module) -> nn.Module:
        """The layer as a convolution, whose weights are still to be filled."""
        weight: Any = module.weight
        return self._built(tuple(weight.shape)).to(weight)

    def rewrite(self, modules: Mapping[str, nn.Module], factors: object) -> Rewrite:
        """The layer as a convolution.

        Args:
            modules: the layer.
            factors: what `taut.trace` showed of it (`taut.structure.own_forms.Known`); None: it is shown here.

        Raises:
            ModelError: it is none.
        """
        ((name, module),) = modules.items()
        form = factors.conv if isinstance(factors, Known) else conv_form(module)
        if form is None:
            raise ModelError(f"The layer '{name}' is no ordinary convolution.")
        resolved = self._resolved(form)
        built: Any = resolved.restored(module).train(module.training)
        conv = built[-1] if isinstance(built, nn.Sequential) else built
        weight, bias = own_values(module, form)
        weight_trained, bias_trained = trained(module)
        conv.weight = nn.Parameter(weight, requires_grad=weight_trained)
        if bias is not None:
            conv.bias = nn.Parameter(bias, requires_grad=bias_trained)
        return Rewrite({name: built}, resolved)

    def skeleton(self, group: Group) -> Mapping[str, nn.Module]:
        """Convolutions with uninitialized weights."""
        return {group.layer.name: self._built(group.layer.weight)}

    def cost(self, group: Group) -> Cost:
        """Of a weight and a bias; a bias that is computed is known when the step is carried out."""
        layer = group.layer
        biased = layer.bias if self.bias is None else self.bias
        params = math.prod(layer.weight) + layer.weight[0] * biased
        return Cost(params, params, layer.macs, params * layer.itemsize)

    def _resolved(self, form: ConvForm) -> AsConv:
        pads = None if form.pads is None else [side for pair in form.pads for side in pair]
        return replace(
            self,
            stride=list(form.stride),
            dilation=list(form.dilation),
            groups=form.groups,
            pads=pads,
            mode=form.mode,
            bias=form.bias is not None,
        )

    def _built(self, weight: tuple[int, ...]) -> nn.Module:
        """The convolution, and in front of it what pads where it cannot itself."""
        axes = len(weight) - 2
        if self.stride is None or self.dilation is None or self.groups is None or self.mode is None:
            raise CallError("The settings of as_conv are found out when the step is carried out: give none.")
        if self.mode not in PADS:
            raise CallError(f"The 'mode' of as_conv must be one of {', '.join(PADS)}. Got {brief(self.mode)} instead.")
        kernel = weight[2:]
        flat = [0] * (2 * axes) if self.pads is None else self.pads
        pairs = list(zip(flat[::2], flat[1::2], strict=True))
        even = all(left == right for left, right in pairs)
        split = [((k - 1) * d // 2, (k - 1) * d - (k - 1) * d // 2) for k, d in zip(kernel, self.dilation, strict=True)]
        same = not even and set(self.stride) == {1} and pairs == split
        inside: Any = "same" if same else tuple(left for left, _ in pairs) if even else 0
        conv = empty(
            CONVOLUTIONS[axes],
            weight[1] * self.groups,
            weight[0],
            kernel_size=kernel,
            stride=tuple(self.stride),
            padding=inside,
            dilation=tuple(self.dilation),
            groups=self.groups,
            bias=bool(self.bias),
            padding_mode=self.mode if even or same else "zeros",
        )
        if self.pads is None:
            return nn.Sequential(SamePad(kernel, self.stride, self.dilation), conv)
        if even or same:
            return conv
        return nn.Sequential(_pad(self.mode, axes, pairs), conv)


def _pad(mode: str, axes: int, pairs: list[tuple[int, int]]) -> nn.Module:
    sides = tuple(side for pair in reversed(pairs) for side in pair)
    return PADS[mode][axes - 1](sides, 0.0) if mode == "zeros" else PADS[mode][axes - 1](sides)

"""Layers of other classes that are linear layers or convolutions: which they are, and why some stay as they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from taut.core.example import Example
from taut.structure import in_use
from taut.structure.conv_form import ConvForm, computed_kernel, conv_form, fitting_inputs
from taut.structure.linear_form import any_form, computed_matrix, fitting_rows, linear_form, read_off
from taut.structure.losses import PARTLY_TRAINED, STATE, ZEROS, always_zero, keeps_state, partly_trained
from taut.structure.sameness import IN_FLOAT64, outputs_match
from taut.structure.support import CONVOLUTION, LINEAR

FORMS = LINEAR, CONVOLUTION
"""Why such layers are left alone until they are in their plain form."""

FEW = 2
"""Samples of a call that are compared: the first, and those with the largest values."""

ELSEWHERE = "on what the network gives it, it computes something else than a {} does"
"""Why a layer stays whose form holds for other inputs alone."""


@dataclass(frozen=True)
class Known:
    """What was shown of a layer's plain form, without its weight: that is computed anew, which is quick.

    Attributes:
        conv: the convolution; None: it is a linear layer.
        transposed: whether that holds its weight as (inputs, outputs); None: it computes its weight.
    """

    conv: ConvForm | None = None
    transposed: bool | None = None

    def of(self, wide: nn.Module) -> nn.Linear | ConvForm | None:
        """The form of a copy in float64."""
        if self.conv is not None:
            kernel = computed_kernel(wide)
            return None if kernel is None else self.conv.with_kernel(kernel)
        return read_off(wide) if self.transposed is None else linear_form(wide, transposed=self.transposed)


def own_form(module: nn.Module, name: str = "", known: dict[str, Known] | None = None) -> str | None:
    """Why a layer that cannot be rewritten as it is stays until it is in its plain form, or for good.

    None where it has no other form.

    Args:
        module: the layer.
        name: its own.
        known: takes in what is shown of its form.
    """
    linear = any_form(module)
    if linear is not None:
        if known is not None:
            known[name] = Known(transposed=linear.transposed)
        inputs = fitting_rows(module, linear)
        return _lost(module, linear.weight, inputs, computed_matrix, merged=linear.merged) or LINEAR
    conv = conv_form(module)
    if conv is None:
        return None
    if known is not None:
        known[name] = Known(conv.without_weight())
    return _lost(module, conv.weight, fitting_inputs(module), computed_kernel, merged=True) or CONVOLUTION


def _lost(module: nn.Module, weight: Tensor, inputs: Sequence[Tensor], weight_of: Any, *, merged: bool) -> str | None:
    """What a layer would lose in its plain form, in words.

    Args:
        module: the layer.
        weight: what it computes.
        inputs: on which it runs.
        weight_of: computes its weight.
        merged: whether several parameters become one weight.
    """
    if keeps_state(module, inputs):
        return STATE
    if merged and partly_trained(p for name, p in module.named_parameters() if name != "bias"):
        return PARTLY_TRAINED
    if bool((weight == 0).any()) and always_zero(module, ("weight",), weight_of):
        return ZEROS
    return None


def unlike_in_use(
    model: nn.Module, example: Example, names: Iterable[str], paths: Sequence[Any], known: Mapping[str, Known]
) -> dict[str, str]:
    """Which layers compute something else than their plain form on what they are given, and why they stay.

    Args:
        model: the network.
        example: how it is called.
        names: the layers.
        paths: inputs of the network.
        known: what was shown of their forms.
    """
    kinds: dict[str, str] = {}

    def same(name: str, wide: Any, args: Any, kwargs: Any) -> bool:
        form = known[name].of(wide) if name in known else _form_of(wide)
        kinds[name] = "convolution" if form is None or isinstance(form, ConvForm) else "linear layer"
        return form is not None and all(_same(wide.train(mode), form, args, kwargs) for mode in (False, True))

    unlike = in_use.unlike_in_use(model, example, names, paths, same, _few)
    return {name: ELSEWHERE.format(kinds[name]) for name in unlike}


def _form_of(wide: nn.Module) -> nn.Linear | ConvForm | None:
    linear = any_form(wide)
    return conv_form(wide) if linear is None else linear.layer


def _same(wide: nn.Module, form: Any, args: Any, kwargs: Any) -> bool:
    with torch.no_grad():
        try:
            wanted = wide.forward(*(x.clone() if isinstance(x, Tensor) else x for x in args), **kwargs)
        except Exception:  # what a layer needs besides may be no tensor of this dtype
            return False
        try:
            return outputs_match(wanted, form(*args, **kwargs), IN_FLOAT64)
        except (RuntimeError, TypeError):  # it is called in another way than a plain layer
            return False


def _few(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """A call cut to few samples, where it is one of several."""
    del module
    if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or args[0].ndim < 2 or len(args[0]) <= 2 * FEW:
        return args, kwargs
    x = args[0]
    largest = x.detach().flatten(1).abs().amax(1).topk(FEW).indices.tolist()
    return (x[sorted({*range(FEW), *largest})],), kwargs

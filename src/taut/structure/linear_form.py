"""Layers that compute x W or x Wᵀ in their own way, such as transformers' Conv1D, as the `nn.Linear` that they are."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from taut.core.copying import deep_copy
from taut.core.modes import generator
from taut.structure.sameness import IN_FLOAT64, outputs_match
from taut.structure.surgery import shallow

SHAPES = (3,), (2, 3), (2, 1, 3)
"""Leading axes of the inputs on which a layer is compared with an `nn.Linear`."""

SCALES = 1.0, 30.0
"""Sizes of these inputs: what is not linear shows at one of them."""


def transposed_in(module: nn.Module) -> bool | None:
    """Whether a layer computes x W + b, with its weight as (inputs, outputs); False: x Wᵀ + b; None: neither.

    Shown by running a copy in float64, in eval and in train mode, on random inputs of several shapes and sizes.
    """
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    names = {name for name, parameter in module._parameters.items() if parameter is not None}
    others = chain(module.children(), (buffer for buffer in module._buffers.values() if buffer is not None))
    if weight is None or weight.ndim != 2 or not weight.is_floating_point() or not weight.numel():
        return None
    if names - {"weight", "bias"} or any(True for _ in others) or weight.is_meta:
        return None
    if bias is not None and (bias.ndim != 1 or len(bias) not in weight.shape):
        return None
    ways = [way for way in (True, False) if bias is None or len(bias) == weight.shape[int(way)]]
    ways = [way for way in ways if _answers(module, weight.shape[1 - int(way)], weight)]
    return next((way for way in ways if _computes(module, transposed=way)), None)


def linear_form(module: nn.Module, *, transposed: bool) -> nn.Linear:
    """The `nn.Linear` with a layer's weight and bias; itself where it is one already.

    Args:
        module: the layer.
        transposed: whether its weight is (inputs, outputs).
    """
    if type(module) is nn.Linear:
        return module
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    values = weight.detach().T.contiguous() if transposed else weight.detach().clone()  # type: ignore[union-attr]
    linear = nn.Linear(values.shape[1], values.shape[0], bias=bias is not None, device="meta", dtype=values.dtype)
    linear.weight = nn.Parameter(values, requires_grad=weight.requires_grad)  # type: ignore[union-attr]
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return linear.train(module.training)


def _answers(module: nn.Module, inputs: int, weight: Tensor) -> bool:
    """Whether the layer takes inputs of this width at all: a table of words does not, and need not be copied."""
    copied = shallow(module)
    with torch.no_grad():
        return any(_output(copied, weight.new_zeros(*shape, inputs)) is not None for shape in SHAPES)


def _computes(module: nn.Module, *, transposed: bool) -> bool:
    """Whether the layer gives what a linear layer of its weight gives, for all inputs that it takes."""
    copied = deep_copy(module).double()
    linear = linear_form(copied, transposed=transposed)
    random = generator(0)
    compared = 0
    for shape in SHAPES:
        for scale in SCALES:
            x = torch.randn(*shape, linear.in_features, generator=random, dtype=torch.float64) * scale
            x = x.to(linear.weight.device)
            with torch.no_grad():
                wanted = linear(x)
                for output in (_output(copied.eval(), x), _output(copied.train(), x)):
                    if output is not None and not _same(wanted, output):
                        return False
                    compared += output is not None
    return compared > 0


def _output(module: nn.Module, x: Tensor) -> Any:
    """What a layer computes, without the user's hooks; None where it does not take the input."""
    try:
        return module.forward(x.clone())
    except Exception:  # whatever it says to an input that it was not made for
        return None


def _same(wanted: Tensor, output: Any) -> bool:
    same = isinstance(output, Tensor) and output.shape == wanted.shape and output.dtype == wanted.dtype
    return same and outputs_match(wanted, output, IN_FLOAT64)

"""Layers that compute x W or x Wᵀ in their own way, such as transformers' Conv1D, as the `nn.Linear` that they are.

So are layers that compute W at every call, from their weight and what else they hold: standardized, scaled,
rounded, with low-rank additions. It is read off what the layer gives for unit vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from taut.core.copying import deep_copy
from taut.core.modes import generator
from taut.structure.losses import trained
from taut.structure.sameness import IN_FLOAT64, outputs_match
from taut.structure.surgery import forget_hooks, shallow

SHAPES = (3,), (2, 3), (2, 1, 3)
"""Leading axes of the inputs on which a layer is compared with an `nn.Linear`."""

SCALES = 1.0, 30.0
"""Sizes of these inputs: what is not linear shows at one of them."""

MOST_PRODUCTS = 1 << 37
"""Multiply-accumulates, at most, with which a weight is read off: seconds."""

ROWS_AT_ONCE = 256
"""Unit vectors in one run."""

RUNS = 3
"""Runs in which a state would change."""

NEAR = 1e-3
"""Share of the largest weight by which one may differ between dtypes without having been rounded otherwise."""


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


@dataclass(frozen=True)
class LinearForm:
    """The linear layer that a layer computes.

    Attributes:
        layer: the `nn.Linear`.
        transposed: whether the layer holds this weight as (inputs, outputs); None: it computes it.
    """

    layer: nn.Linear
    transposed: bool | None

    @property
    def merged(self) -> bool:
        """Whether the weight is computed from what the layer holds; not, where it is the layer's own."""
        return self.transposed is None

    @property
    def weight(self) -> Tensor:
        """(outputs, inputs)."""
        return self.layer.weight.detach()


def any_form(module: nn.Module) -> LinearForm | None:
    """The linear layer that a layer computes, with its own weight or with one that it computes; None: it is none."""
    transposed = transposed_in(module)
    if transposed is not None:
        return LinearForm(linear_form(module, transposed=transposed), transposed)
    computed = computed_linear(module)
    return None if computed is None else LinearForm(computed, None)


def computed_matrix(module: nn.Module) -> Tensor | None:
    """The weight that a layer computes by now, (outputs, inputs); None where it computes no linear layer."""
    read = read_off(module)
    return None if read is None else read.weight.detach()


def read_off(module: nn.Module) -> nn.Linear | None:
    """The linear layer that a layer computes by now, if it is one; None where it is certain to be none."""
    weight: Any = module._parameters["weight"]
    for inputs in dict.fromkeys(reversed(weight.shape)):
        if _answers(module, inputs, weight):
            return _read_off(module, weight.new_empty(1, inputs))
    return None


def fitting_rows(module: nn.Module, form: LinearForm) -> list[Tensor]:
    """Inputs of one shape on which a layer runs, in float64."""
    random, copied = generator(2), deep_copy(module).double()
    for shape in SHAPES[::-1]:
        drawn = torch.randn(RUNS, *shape, form.layer.in_features, generator=random, dtype=torch.float64)
        inputs = [x.to(form.weight.device) for x in drawn]
        with torch.no_grad():
            if _output(copied, inputs[0]) is not None:
                return inputs
    return []


def computed_linear(module: nn.Module) -> nn.Linear | None:
    """The `nn.Linear` that a layer computes, with a weight that it computes from its own; None: it computes none.

    Shown as by `transposed_in`. The weight is that of a run in eval mode.
    """
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 2 or not weight.is_floating_point() or not weight.numel() or weight.is_meta:
        return None
    outputs, inputs = weight.shape
    if inputs * weight.numel() > MOST_PRODUCTS or not _answers(module, inputs, weight):
        return None
    copied = deep_copy(module).double().eval()
    forget_hooks(copied)
    wide_weight: Any = copied._parameters["weight"]
    if not _additive(copied, wide_weight):
        return None
    wide = _read_off(copied, wide_weight)
    if wide is None or len(wide.weight) != outputs or not _as(copied, wide):
        return None
    own = _read_off(shallow(module).eval(), weight)
    if own is None or (own.bias is None) != (wide.bias is None):
        return None
    exact = wide.to(weight.dtype)
    # what the layer rounds may be rounded otherwise in float64: then its own dtype decides
    linear = exact if _near(exact.weight, own.weight) else own
    weight_trained, bias_trained = trained(module)
    linear.weight.requires_grad_(weight_trained)
    if linear.bias is not None:
        linear.bias.requires_grad_(bias_trained)
    return linear.train(module.training)


def _additive(copied: nn.Module, weight: Tensor) -> bool:
    """Whether a copy in float64 gives for the sum of two inputs what it gives for both: a few rows say at once."""
    first, second = torch.randn(2, 1, weight.shape[1], generator=generator(1), dtype=weight.dtype).to(weight.device)
    for scale in SCALES:
        xs = (scale * first, scale * second, scale * (first + second), torch.zeros_like(first))
        made = [_output(copied, x) for x in xs]
        if not all(isinstance(t, Tensor) for t in made) or not _same(made[0] + made[1], made[2] + made[3]):
            return False
    return True


def _read_off(module: nn.Module, like: Tensor) -> nn.Linear | None:
    """What a layer gives for zeros is its bias, what it gives for unit vectors besides its weight."""
    inputs = like.shape[1]
    zero = _output(module, like.new_zeros(1, inputs))
    if not isinstance(zero, Tensor) or zero.ndim != 2 or zero.dtype != like.dtype or not zero.isfinite().all():
        return None
    linear = nn.Linear(inputs, zero.shape[1], bias=bool(zero.any()), device="meta", dtype=like.dtype)
    weight = like.new_empty(zero.shape[1], inputs)
    for first in range(0, inputs, ROWS_AT_ONCE):
        rows = like.new_zeros(min(ROWS_AT_ONCE, inputs - first), inputs)
        rows.diagonal(first).fill_(1)
        made = _output(module, rows)
        if not isinstance(made, Tensor) or made.shape != (len(rows), zero.shape[1]):
            return None
        weight[:, first : first + len(rows)] = (made - zero).detach().T
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if linear.bias is not None:
        linear.bias = nn.Parameter(zero[0].clone(), requires_grad=False)
    return linear


def _near(first: Tensor, second: Tensor) -> bool:
    return bool(((first - second).abs() <= NEAR * first.abs().max()).all())


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
    return _as(copied, linear_form(copied, transposed=transposed))


def _as(copied: nn.Module, linear: nn.Linear) -> bool:
    """Whether a copy in float64 gives what a linear layer gives."""
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
        with torch.no_grad():
            return module.forward(x.clone())
    except Exception:  # whatever it says to an input that it was not made for
        return None


def _same(wanted: Tensor, output: Any) -> bool:
    same = isinstance(output, Tensor) and output.shape == wanted.shape and output.dtype == wanted.dtype
    return same and outputs_match(wanted, output, IN_FLOAT64)

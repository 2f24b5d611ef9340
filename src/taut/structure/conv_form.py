"""Convolutions with a forward of their own (weights standardized or scaled, padding by size) as what they are.

Nothing is taken from a layer's code or class: a copy is run in float64, in eval and in train mode, on inputs of several
sizes, and what torch's convolution is given there is noted. The layer is an ordinary convolution where it gives that
convolution of a padded input, for one weight and one bias, whatever the input; how it pads is read off the input that
the convolution gets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from operator import ge
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvTransposeNd
from torch.utils._python_dispatch import TorchDispatchMode

from taut.core.copying import deep_copy
from taut.core.modes import generator
from taut.errors import ModelError
from taut.nn.padding import same_pads
from taut.structure.patches import PAD_MODES
from taut.structure.sameness import IN_FLOAT64, Tolerance, outputs_match
from taut.structure.surgery import forget_hooks, shallow

TRAINED = 2
"""Sizes at which it is run in train mode, too."""

RUNS = 3
"""Runs in which a state would change."""

BATCHES = 2, 1, 3
"""Samples of the inputs: what mixes them shows."""

ROUNDING = 1e-11
"""Share by which numbers in float64 may differ that are the same."""

NEAR = Tolerance(share=1e-4, epsilons=8)
"""How far a bias in the layer's own dtype may lie from that in float64."""

Settings = tuple[tuple[int, ...], tuple[int, ...], int]
"""Stride, dilation and groups of a convolution."""

Pads = tuple[tuple[int, int], ...]
"""Per axis what is added in front and behind."""

SCALES = 1.0, 30.0
"""Sizes of the inputs: what is not linear shows at one of them."""

SIZES = 5
"""Sizes of inputs along every axis at least; of a stride s at least 2 s, so that every remainder occurs."""


@dataclass(frozen=True)
class ConvForm:
    """The ordinary convolution that a layer computes.

    Attributes:
        weight: (o, c, *kernel), float64.
        bias: (o,), or None.
        gain: (o,), by which the layer multiplies what it gives torch's convolution as its weight; None: by nothing.
        stride: per axis. dilation: likewise. groups: of channels.
        pads: the same for every size of the input; None: as many zeros as the size asks for (`taut.nn.SamePad`).
        mode: what is added, as torch's convolutions call it.
    """

    weight: Tensor
    bias: Tensor | None
    gain: Tensor | None
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    pads: Pads | None
    mode: str = "zeros"

    def pads_of(self, size: Sequence[int]) -> Pads:
        """What is added to an input of this size."""
        if self.pads is not None:
            return self.pads
        axes = zip(size, self.weight.shape[2:], self.stride, self.dilation, strict=True)
        return tuple(same_pads(*axis) for axis in axes)

    def with_kernel(self, kernel: Tensor) -> ConvForm:
        """The same form of another weight that the layer gives torch's convolution."""
        weight = kernel.detach()
        return replace(self, weight=weight if self.gain is None else weight * _per_output(self.gain, weight))

    def without_weight(self) -> ConvForm:
        """The same form to be filled again: nothing in it is large."""
        return replace(self, weight=self.weight.new_empty(0))

    def __call__(self, x: Tensor) -> Tensor:
        """What the convolution gives for a batch."""
        padded = _padded(x, self.pads_of(x.shape[2:]), self.mode)
        return _convolved(padded, self.weight, self.bias, (self.stride, self.dilation, self.groups))


@dataclass(frozen=True)
class _Call:
    """One run of a layer: its input and output, and the one convolution that it computed."""

    x: Tensor
    output: Tensor
    inner: Tensor
    weight: Tensor
    bias: Tensor | None
    settings: Settings
    padding: tuple[int, ...]


class _Convolutions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what torch's convolution is given."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Sequence[Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func is torch.ops.aten.convolution.default:
            self.calls.append(args)
        return func(*args, **(kwargs or {}))


def conv_form(module: nn.Module) -> ConvForm | None:
    """The ordinary convolution that a layer computes; None where it could not be shown to be one."""
    weight = module._parameters.get("weight")
    if weight is None or not 3 <= weight.ndim <= 5 or not weight.is_floating_point() or not weight.numel():
        return None
    if weight.is_meta or isinstance(module, _ConvTransposeNd) or not _convolves(module, weight):
        return None
    calls = _calls(_wide(module), module, weight)
    return None if calls is None or len({call.x.shape for call in calls}) < 2 else _form(calls)


def _calls(copied: nn.Module, module: nn.Module, weight: Tensor) -> list[_Call] | None:
    """Runs at all sizes, the first of them in train mode, too; None where one of them is not one convolution."""
    calls: list[_Call] = []
    for number, x in enumerate(_inputs(module, weight)):
        for training in (False, True) if number < TRAINED else (False,):
            ran = _run(copied.train(training), x)
            if ran == "refused":
                continue
            if not isinstance(ran, _Call) or ran.weight.shape != weight.shape:
                return None
            if calls and not outputs_match(calls[0].weight, ran.weight, IN_FLOAT64):
                return None
            calls.append(replace(ran, weight=calls[0].weight) if calls else ran)  # one of them, not of every run
    return calls


def computed_kernel(module: nn.Module) -> Tensor | None:
    """The weight that a layer gives torch's convolution; None where it computes none."""
    ran = _run(module, _zeros(module, module._parameters["weight"]))  # type: ignore[arg-type]
    return ran.weight if isinstance(ran, _Call) else None


def fitting_inputs(module: nn.Module) -> list[Tensor]:
    """Inputs of one shape on which a layer runs, in float64."""
    random, copied = generator(2), _wide(module)
    for x in _inputs(module, module._parameters["weight"]):  # type: ignore[arg-type]
        if isinstance(_run(copied, x), _Call):
            drawn = torch.randn(RUNS, *x.shape, generator=random, dtype=torch.float64)
            return [one.to(x.device) for one in drawn]
    return []


def own_values(module: nn.Module, form: ConvForm) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the form in the layer's own dtype, as a run in eval mode computes them."""
    weight = module._parameters["weight"]
    ran = _run(shallow(module).eval(), _zeros(module, weight))  # type: ignore[arg-type]
    if not isinstance(ran, _Call):
        raise ModelError(f"A {type(module).__name__} computed a convolution, and does so no more.")
    own = ran.weight.detach().clone()
    own = own if form.gain is None else (own.double() * _per_output(form.gain, own)).to(own)
    if form.bias is None:
        return own, None
    same = form.gain is None and ran.bias is not None and outputs_match(ran.bias, form.bias.to(ran.bias), NEAR)
    return own, ran.bias.detach().clone() if same and ran.bias is not None else form.bias.to(own)


def _wide(module: nn.Module) -> nn.Module:
    copied = deep_copy(module).double()
    forget_hooks(copied)
    return copied


def _convolves(module: nn.Module, weight: Tensor) -> bool:
    """Whether a run is one convolution at all: what is none need not be copied."""
    ran = _run(shallow(module).eval(), _zeros(module, weight))
    return isinstance(ran, _Call) and ran.weight.shape == weight.shape


def _zeros(module: nn.Module, weight: Tensor) -> Tensor:
    dilation = _most(getattr(module, "dilation", 1))
    size = [(k - 1) * dilation + 2 for k in weight.shape[2:]]
    return weight.new_zeros(1, weight.shape[1] * _groups(module), *size)


def _most(setting: Any) -> int:
    """The largest of a setting per axis."""
    values = setting if isinstance(setting, tuple | list) else (setting,)
    return max((value for value in values if isinstance(value, int)), default=1)


def _per_output(values: Tensor, weight: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (weight.ndim - 1))


def _groups(module: nn.Module) -> int:
    groups = getattr(module, "groups", 1)
    return groups if isinstance(groups, int) and groups > 0 else 1


def _inputs(module: nn.Module, weight: Tensor) -> Iterator[Tensor]:
    """Random inputs of several sizes, even and odd ones and all remainders of a stride along every axis."""
    random = generator(0)
    steps, apart = _most(getattr(module, "stride", 1)), _most(getattr(module, "dilation", 1))
    kernel = weight.shape[2:]
    for number in range(max(SIZES, 2 * steps)):
        extents = [
            (k - 1) * apart + 1 + (1 + number * (axis + 1)) % max(SIZES, 2 * steps) for axis, k in enumerate(kernel)
        ]
        batch = BATCHES[number % len(BATCHES)]
        x = torch.randn(batch, weight.shape[1] * _groups(module), *extents, generator=random, dtype=torch.float64)
        yield x.to(weight.device) * SCALES[number % len(SCALES)]
    one = torch.randn(1, weight.shape[1] * _groups(module), *[1] * len(kernel), generator=random, dtype=torch.float64)
    yield one.to(weight.device)


def _run(module: nn.Module, x: Tensor) -> _Call | str | None:
    """What a layer computes, without the user's hooks: None where that is not one convolution, or it refuses."""
    noted = _Convolutions()
    try:
        with torch.no_grad(), noted:
            output = module.forward(x.clone())
    except Exception:  # whatever it says to an input that it was not made for
        return "refused"
    if len(noted.calls) != 1 or not isinstance(output, Tensor) or output.dtype != x.dtype:
        return None
    inner, weight, bias, stride, padding, dilation, transposed, _, groups = noted.calls[0]
    if transposed or inner.ndim != x.ndim or inner.dtype != x.dtype or weight.dtype != x.dtype:
        return None
    return _Call(x, output, inner, weight, bias, (tuple(stride), tuple(dilation), groups), tuple(padding))


def _form(calls: Sequence[_Call]) -> ConvForm | None:
    """The one convolution that all runs were."""
    first = calls[0]
    if any(call.settings != first.settings or not _grows(call) for call in calls):
        return None
    weight, bias, gain = _affine(max(calls, key=lambda call: call.output.numel()))
    for mode in PAD_MODES:
        every: list[Pads] = list(takewhile(bool, (_added(call, mode) for call in calls)))
        if len(every) < len(calls):
            continue
        alike = every[0] if all(pads == every[0] for pads in every) else None
        form = ConvForm(weight, bias, gain, *first.settings, alike, mode)
        sized = [form.pads_of(call.x.shape[2:]) for call in calls]
        if sized == every and (alike is not None or mode == "zeros") and all(_same(form, call) for call in calls):
            return form
    return None


def _affine(call: _Call) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weight, bias, and what is done to the convolution's output per channel: y = a (W * x) + b."""
    plain = _convolved(_padded(call.inner, _pairs(call.padding), "zeros"), call.weight, None, call.settings)
    if plain.shape != call.output.shape:
        return call.weight, call.bias, None
    u, y = (t.transpose(0, 1).flatten(1) for t in (plain, call.output))
    centred = u - u.mean(1, keepdim=True)
    energy = centred.square().sum(1)
    slope = torch.where(energy > 0, (centred * y).sum(1) / energy.clamp_min(1e-300), 1.0)
    slope = torch.where((slope - 1).abs() <= ROUNDING, 1.0, slope)
    rest = y.mean(1) - slope * u.mean(1)
    gain = slope * _inner_scale(call)
    if bool((gain == 1).all()) and (call.bias is not None or not _some(rest, y)):
        return call.weight.detach().clone(), None if call.bias is None else call.bias.detach().clone(), None
    bias = rest if call.bias is not None or _some(rest, y) else None
    return call.weight * _per_output(gain, call.weight), bias, None if bool((gain == 1).all()) else gain


def _some(rest: Tensor, y: Tensor) -> bool:
    """Whether anything is added."""
    return float(rest.abs().max()) > ROUNDING * float(y.abs().max())


def _inner_scale(call: _Call) -> float:
    """What the convolution's input was multiplied by."""
    largest = float(call.x.abs().max())
    ratio = float(call.inner.abs().max()) / largest if largest else 1.0
    return 1.0 if abs(ratio - 1) <= ROUNDING or not ratio else ratio


def _grows(call: _Call) -> bool:
    """Whether the convolution gets as many samples and channels as the layer, at no fewer positions."""
    return call.inner.shape[:2] == call.x.shape[:2] and all(map(ge, call.inner.shape[2:], call.x.shape[2:]))


def _added(call: _Call, mode: str) -> Pads:
    """What the layer adds around its input in this mode, zeros and nothing included; () where it does otherwise."""
    more = [inner - own for inner, own in zip(call.inner.shape[2:], call.x.shape[2:], strict=True)]
    if mode != "zeros" and any(call.padding):
        return ()
    scaled = call.x * _inner_scale(call)
    for lefts in _places(call.inner, scaled):
        pads = tuple((left, m - left) for left, m in zip(lefts, more, strict=True))
        if _is_padded(call.inner, scaled, pads, mode):
            own = call.padding if mode == "zeros" else (0,) * len(more)
            return tuple((a + p, b + p) for (a, b), p in zip(pads, own, strict=True))
    return ()


def _places(inner: Tensor, x: Tensor) -> list[list[int]]:
    """Where in a tensor another one may begin, per axis, judged by its first channel."""
    windows = inner[0, 0]
    for axis, size in enumerate(x.shape[2:]):
        windows = windows.unfold(axis, size, 1)
    apart = (windows - x[0, 0]).abs().flatten(x.ndim - 2).amax(-1)
    return (apart <= IN_FLOAT64.share * float(x.abs().max()) + IN_FLOAT64.least).nonzero().tolist()


def _is_padded(inner: Tensor, x: Tensor, pads: Pads, mode: str) -> bool:
    """Whether a tensor is another one with something around it."""
    try:
        return outputs_match(_padded(x, pads, mode), inner, IN_FLOAT64)
    except (RuntimeError, NotImplementedError):  # more is reflected than there is
        return False


def _same(form: ConvForm, call: _Call) -> bool:
    try:
        return outputs_match(form(call.x), call.output, IN_FLOAT64)
    except RuntimeError:
        return False


def _pairs(padding: Sequence[int]) -> Pads:
    return tuple((p, p) for p in padding)


def _padded(x: Tensor, pads: Pads, mode: str) -> Tensor:
    if not any(map(any, pads)):
        return x
    return functional.pad(x, [side for pair in reversed(pads) for side in pair], PAD_MODES[mode])


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings) -> Tensor:
    stride, dilation, groups = (list(settings[0]), list(settings[1]), settings[2])
    none = [0] * len(stride)
    return torch.convolution(x, weight, bias, stride, none, dilation, False, none, groups)

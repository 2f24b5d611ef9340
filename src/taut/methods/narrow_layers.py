"""Layers with fewer channels: what they look like, what they cost, and the weights that they keep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from taut.core.example import Example
from taut.methods.layer_factory import conv, empty, linear
from taut.nn import StateLinear
from taut.structure.channels.cuts import sides_of
from taut.structure.narrowing import Cut, left_of
from taut.structure.probing import record_calls
from taut.structure.rules import UNIT, narrowed_unit
from taut.structure.surgery import forget_hooks
from taut.structure.tracing import describe_layer
from taut.types import Invocation, Layer

Sizes = tuple[int, int]
"""Outputs, and inputs that each of them reads."""

PER_CHANNEL: dict[str, type[nn.Module]] = {
    "BatchNorm1d": nn.BatchNorm1d,
    "BatchNorm2d": nn.BatchNorm2d,
    "BatchNorm3d": nn.BatchNorm3d,
    "SyncBatchNorm": nn.SyncBatchNorm,
    "InstanceNorm1d": nn.InstanceNorm1d,
    "InstanceNorm2d": nn.InstanceNorm2d,
    "InstanceNorm3d": nn.InstanceNorm3d,
    "PReLU": nn.PReLU,
    "LayerNorm": nn.LayerNorm,
    "RMSNorm": nn.RMSNorm,
}
"""Layers with one value per channel, made from their width."""

LINEAR = ("Linear", "StateLinear")
"""Matrix products on the last axis."""

TRANSPOSED = ("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")


def sizes_of(layer: Layer) -> Sizes:
    """Outputs and inputs of a layer as it was described; (0, 0) where its width is not known."""
    if layer.kind in TRANSPOSED:
        if layer.groups > 1:
            return layer.weight[1] * layer.groups, 1
        return layer.weight[1], layer.weight[0]
    if layer.kind == "Embedding":
        return layer.weight[1], layer.weight[0]
    if not layer.weight:
        return 0, 0
    return layer.weight[0], layer.weight[min(1, len(layer.weight) - 1)]


def is_kept(layer: Layer, sizes: Sizes) -> bool:
    """Whether these are the sizes that a layer has anyway."""
    return sizes in {sizes_of(layer), (0, 0)}


def groups_left(now: Layer, before: Layer) -> int:
    """Groups of a narrower layer: of a depthwise one as many fewer as it has channels fewer."""
    alone = before.groups > 1 and len(before.weight) > 2 and before.weight[1] == 1
    return before.groups * now.weight[0] // before.weight[0] if alone else before.groups


def slimmed(layer: Layer, sizes: Sizes) -> Layer:
    """The description of a layer with other sizes, its calls and costs included."""
    outputs, inputs = sizes
    weight, groups = _weight(layer, sizes), layer.groups
    if _depthwise(layer):
        groups = groups * outputs // max(sizes_of(layer)[0], 1)
    elif layer.kind == "GroupNorm" and layer.weight and groups == layer.weight[0]:
        groups = outputs
    before, after = _count(layer.weight), _count(weight)
    if layer.skip == UNIT:  # beside values per channel it may hold a few that are none
        lost = sizes_of(layer)[0] - outputs if layer.bias else 0
        held = (layer.params - (sizes_of(layer)[0] if layer.bias else 0)) // max(before, 1)
        macs = layer.macs * after // max(before, 1)
        return replace(layer, weight=weight, params=layer.params - lost - (before - after) * held, macs=macs)
    params = after + (outputs if layer.bias else 0) if layer.params else 0
    arriving = inputs * groups if layer.kernel and layer.kind not in TRANSPOSED else inputs
    calls = tuple(_call(layer, call, arriving, outputs) for call in layer.calls)
    macs = layer.macs * after // before if before and layer.macs else layer.macs
    return replace(layer, weight=weight, groups=groups, params=params, calls=calls, macs=macs)


def _weight(layer: Layer, sizes: Sizes) -> tuple[int, ...]:
    outputs, inputs = sizes
    if not layer.weight:
        return ()
    if layer.kind in TRANSPOSED and layer.groups > 1:
        return (outputs * layer.weight[0] // sizes_of(layer)[0], *layer.weight[1:])
    if layer.kind in TRANSPOSED or layer.kind == "Embedding":
        return (inputs, outputs, *layer.weight[2:])
    return (outputs, *((inputs,) if len(layer.weight) > 1 else ()), *layer.weight[2:])


def _depthwise(layer: Layer) -> bool:
    return bool(layer.kernel) and layer.groups > 1 and layer.weight[1] == 1 and layer.kind != "Embedding"


def _count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel()) if shape else 0


def _call(layer: Layer, call: Invocation, inputs: int, outputs: int) -> Invocation:
    """The channel axis of a call of a Linear or a convolution in its new width."""
    if layer.kind not in LINEAR and not layer.kind.startswith("Conv"):
        return call
    axes = len(layer.kernel)
    given, made = list(call.input), list(call.output)
    if len(given) <= axes or len(made) <= axes:
        return call
    given[-axes - 1], made[-axes - 1] = inputs, outputs
    return Invocation(tuple(given), tuple(made))


def empty_layer(layer: Layer, sizes: Sizes) -> nn.Module:
    """A layer with uninitialized weights; settings that are not told by the description are handed over later."""
    outputs, inputs = sizes
    small = slimmed(layer, sizes)
    if layer.kind in PER_CHANNEL or layer.kind == "GroupNorm":
        return _empty_norm(layer, outputs, small.groups)
    if layer.kind in TRANSPOSED:
        alone = layer.groups > 1
        into, groups = (outputs, outputs) if alone else (inputs, 1)
        kind = getattr(nn, layer.kind)
        return empty(kind, into, outputs, kernel_size=layer.kernel, groups=groups, bias=layer.bias)
    if layer.kind == "Embedding":
        return empty(nn.Embedding, inputs, outputs)
    if layer.kind == "Linear":
        return linear(inputs, outputs, bias=layer.bias)
    if layer.kind == "StateLinear":
        built = empty(StateLinear, inputs, outputs, bias=layer.bias)
        built._buffers["kept"] = torch.zeros(inputs, dtype=torch.int64) if inputs < layer.weight[1] else None
        return built
    channels = (inputs * small.groups, outputs)
    return conv(channels, layer, range(len(layer.kernel)), groups=small.groups, bias=layer.bias)


def _empty_norm(layer: Layer, width: int, groups: int) -> nn.Module:
    """A layer with one value per channel, or without any."""
    held = bool(layer.weight)
    if layer.kind == "GroupNorm":
        return empty(nn.GroupNorm, groups, width, affine=held)
    settings: dict[str, bool] = {"affine": held}
    if layer.kind == "PReLU":
        settings = {}
    elif layer.kind == "RMSNorm":
        settings = {"elementwise_affine": held}
    elif layer.kind == "LayerNorm":
        settings = {"elementwise_affine": held, "bias": layer.bias}
    return empty(PER_CHANNEL[layer.kind], width, **settings)


def slim(module: nn.Module, cut: Cut) -> nn.Module:
    """A narrower layer with what is left of the weights; hooks and flags are handed over by who puts it in place."""
    unit = narrowed_unit(module, cut.outputs, cut.inputs)
    if unit is not None:
        forget_hooks(unit)
        return unit
    layer = describe_layer("", module, (), 1)
    built = empty_layer(layer, (len(cut.outputs), len(cut.inputs)))
    for key, t in left_of(module, cut).items():
        old = getattr(module, key)
        if isinstance(old, nn.Parameter):
            built._parameters[key] = nn.Parameter(t, requires_grad=old.requires_grad)
        else:
            built._buffers[key] = t
    tensors = [*module.parameters(), *module.buffers()]
    return built.to(tensors[0].device) if tensors else built


def sizes_after(module: nn.Module, cut: Cut | None) -> Sizes:
    """Outputs and inputs that are left."""
    return sides_of(module) if cut is None else (len(cut.outputs), len(cut.inputs))


def described(model: nn.Module, example: Example, names: Mapping[str, str]) -> list[Layer]:
    """The layers as they are now, by where they stand, with their calls and multiply-accumulates."""
    calls, _ = record_calls(model, example)
    found = []
    for place in names:
        module = model.get_submodule(place)
        layer = describe_layer(place, module, tuple(calls.get(place, ())), example.batch)
        params = sum(p.numel() for p in module.parameters(recurse=False))
        found.append(replace(layer, params=params, macs=_macs(layer)))
    return found


def _macs(layer: Layer) -> int:
    weights = math.prod(layer.weight)
    if layer.kind in TRANSPOSED:
        return layer.per_sample(weights * sum(math.prod(call.input) for call in layer.calls) // layer.weight[0])
    if layer.kind in LINEAR or layer.kernel:
        return layer.per_sample(weights * layer.positions)
    return 0


def flat_sizes(model: nn.Module, places: Mapping[str, str], cuts: Mapping[str, Cut]) -> list[int]:
    """Outputs and inputs of all layers in a row; zeros for a norm without parameters that keeps its width."""
    flat: list[int] = []
    for name, place in places.items():
        module = model.get_submodule(place)
        if name not in cuts and not any(True for _ in module.parameters(recurse=False)):
            flat += [0, 0]
        else:
            flat += sizes_after(module, cuts.get(name))
    return flat

"""Random layers of every kind for the tests of methods, and their measured costs."""

import torch
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cases import sequential
from taut.core.example import Example
from taut.methods.narrow_layers import described
from taut.types import Cost, Group

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@st.composite
def layers(draw, dims=(0, 1, 2, 3), least=1):
    """A layer and an input for it, batch 2 or 3; kernel sizes from `least`."""
    axes = draw(st.sampled_from(dims))
    bias, batch = draw(st.booleans()), draw(st.integers(2, 3))
    if not axes:
        extra = draw(st.sampled_from([(), (3,), (2, 2)]))
        inputs, outputs = draw(st.integers(1, 12)), draw(st.integers(1, 12))
        return nn.Linear(inputs, outputs, bias=bias), (batch, *extra, inputs)
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    c, o = groups * draw(st.integers(1, 6)), groups * draw(st.integers(1, 6))

    def per_axis(low, high):
        return tuple(draw(st.lists(st.integers(low, high), min_size=axes, max_size=axes)))

    kernel, dilation, stride = per_axis(least, max(3, least)), per_axis(1, 2), per_axis(1, 2)
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    padding = draw(st.sampled_from(["same", *(per_axis(0, 2),) * 3]))
    if padding == "same":
        stride = (1,) * axes
    size = per_axis(6, 7)
    conv = KINDS[axes](c, o, kernel, stride, padding, dilation=dilation, groups=groups, bias=bias, padding_mode=mode)
    return conv, (batch, c, *size)


def group_of(module, size):
    """The group of a layer of its own, described as tracing does but for its live taps, and the input."""
    x, model = torch.zeros(size), sequential(layer=module)
    with torch.no_grad():
        return Group(tuple(described(model, Example(model, x), {"layer": "layer"}))), x


def measured(module, x):
    """Parameters, MACs per sample and bytes of a built module, by torch."""
    params = sum(p.numel() for p in module.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(x)
    macs = counter.get_total_flops() / 2 / len(x)
    return Cost(params, params, round(macs), sum(p.numel() * p.element_size() for p in module.parameters()))


def check_costs(method, group, module, x):
    """The predicted cost is the built module's, and its output has the layer's shape."""
    built = method.skeleton(group)["layer"]
    assert built(x).shape == module(x).shape
    assert method.cost(group) == measured(built, x)
    assert group.cost == measured(module, x)
    assert isinstance(group, Group)

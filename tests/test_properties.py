"""Random nets from hypothesis: whatever the settings, a result within the budget or a BudgetError, and never growth."""

from __future__ import annotations

import os
from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

import taut
from cases import run, seeded, untouched
from taut import Budget, BudgetError, Plan

NETS = int(os.environ.get("TAUT_RANDOM_NETS", "60")) * 2 // 5
"""How many nets the four tests draw together; with HYPOTHESIS_PROFILE=search others each time. The others are drawn by
test_as_written.py."""

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
ACTIVATIONS = st.sampled_from([nn.ReLU, lambda: nn.ReLU(inplace=True), nn.Tanh, nn.Identity])
FEATURES = st.integers(1, 24)


@st.composite
def conv_layer(draw, dims, inputs, size):
    """A convolution that fits its input, with the sizes of its output."""
    groups = draw(st.sampled_from([g for g in (1, 2, 3, inputs) if inputs % g == 0]))
    outputs = groups * draw(st.integers(1, max(1, 24 // groups)))
    dilation = draw(st.integers(1, 2))
    kernel = tuple(draw(st.integers(1, 4)) for _ in range(dims))
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    reach = [dilation * (k - 1) for k in kernel]
    most = [s - 1 if mode == "reflect" else s if mode == "circular" else 4 for s in size]
    least = [max(0, -(-(r + 1 - s) // 2)) for r, s in zip(reach, size, strict=True)]
    if any(a > b for a, b in zip(least, most, strict=True)):
        mode, most = "zeros", [4] * dims
    padding = tuple(draw(st.integers(a, max(a, min(b, a + 1)))) for a, b in zip(least, most, strict=True))
    stride = draw(st.integers(1, 2))
    bias = draw(st.booleans())
    same = mode == "zeros" and draw(st.booleans())
    layer = CONVS[dims - 1](
        inputs,
        outputs,
        kernel,
        stride=1 if same else stride,
        padding="same" if same else padding,
        dilation=dilation,
        groups=groups,
        bias=bias,
        padding_mode=mode,
    )
    return layer, outputs


@st.composite
def conv_net(draw):
    """One to three convolutions of one dimension, with norms and activations, and perhaps a linear head."""
    dims = draw(st.integers(1, 3))
    size = tuple(draw(st.integers(1, {1: 12, 2: 7, 3: 4}[dims])) for _ in range(dims))
    width = draw(st.integers(1, 12))
    layers, shape = [], (width, *size)
    for _ in range(draw(st.integers(1, 3))):
        layer, width = draw(conv_layer(dims, width, shape[1:]))
        layers.append(layer)
        with torch.no_grad():
            shape = tuple(layer(torch.zeros(1, *shape)).shape[1:])
        if draw(st.booleans()):
            layers.append(NORMS[dims - 1](width))
        layers.append(draw(ACTIVATIONS)())
    if draw(st.booleans()):
        layers += [nn.Flatten(), nn.Linear(torch.Size(shape).numel(), draw(FEATURES), bias=draw(st.booleans()))]
    return nn.Sequential(*layers).eval(), torch.randn(2, layers[0].in_channels, *size)


@st.composite
def linear_net(draw):
    """One to four linear layers on inputs with up to two axes in between."""
    widths = draw(st.lists(FEATURES, min_size=2, max_size=5))
    layers = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b, bias=draw(st.booleans())), draw(ACTIVATIONS)()]
    axes = draw(st.lists(st.integers(1, 4), max_size=2))
    return nn.Sequential(*layers).eval(), torch.randn(2, *axes, widths[0])


@st.composite
def nets(draw, kind):
    """A net with weights that are normal, of low rank, sparse or zero, in one of two types."""
    with seeded(draw(st.integers(0, 2**16))):
        model, example = draw(kind)
        spoil = draw(st.sampled_from(["normal", "normal", "rank 1", "zeros", "sparse", "tiny", "huge"]))
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, (nn.Linear, *CONVS)):
                    spoiled(module.weight, spoil)
        dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float64]))
        return model.to(dtype), example.to(dtype)


def spoiled(weight, how):
    """Weights that decompositions stumble over."""
    if how == "rank 1":
        weight.copy_(weight[:1] * torch.randn(len(weight), *[1] * (weight.ndim - 1)))
    elif how == "zeros":
        weight.zero_()
    elif how == "sparse":
        weight.mul_(torch.rand_like(weight) < 0.1)
    elif how in {"tiny", "huge"}:
        weight.mul_(1e-6 if how == "tiny" else 1e3)


BUDGETS = st.one_of(
    st.builds(lambda key, value: Budget(**{key: value}), st.sampled_from(["params", "macs"]), st.floats(0.02, 1.0)),
    st.builds(lambda a, b: Budget(params=a, macs=b), st.floats(0.1, 1.0), st.floats(0.1, 1.0)),
    st.builds(lambda value: Budget(bytes=value), st.floats(0.3, 1.0)),
    st.builds(lambda value: Budget(params=value), st.integers(2, 500)),
)
METHODS = st.sampled_from([None, None, ["svd"], ["svd", "tucker", "dead_taps"]])


def check(drawn, budget, methods, samples):
    """The property: within the budget or a BudgetError with the best there is; finite, same shape, never larger."""
    model, example = drawn
    with seeded(0):
        data = [torch.randn(samples, *example.shape[1:]).to(example.dtype)] if samples else None
    met = True
    with untouched(model):
        try:
            result = taut.compress(model, example, budget=budget, data=data, methods=methods, compare=False)
        except BudgetError as error:
            result, met = error.best, False
    net = taut.trace(model, example)
    small = taut.trace(result.model, example).cost
    for key, limit in budget.limits(net.cost).items():
        assert getattr(small, key) <= limit or not met
    assert small.params <= net.cost.params
    assert small.macs <= net.cost.macs
    assert all(step.after.lowers(step.before) for step in result.plan.steps)
    for wanted, found in zip(run(model, example), run(result.model, example), strict=True):
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
        assert bool(found.isfinite().all()) or not bool(wanted.isfinite().all())
    assert Plan.from_json(result.plan.to_json()) == result.plan


def drawn_from(kind, samples):
    """A test over random nets of one kind."""

    @settings(max_examples=NETS // 4, suppress_health_check=list(HealthCheck))
    @given(drawn=nets(kind), budget=BUDGETS, methods=METHODS)
    def test(drawn, budget, methods):
        check(drawn, budget, methods, samples)

    return test


test_convolutions_with_data = drawn_from(conv_net(), 8)
test_convolutions_by_weights_alone = drawn_from(conv_net(), 0)
test_linears_with_data = drawn_from(linear_net(), 8)
test_one_sample = drawn_from(st.one_of(linear_net(), conv_net()), 1)


@pytest.mark.parametrize("kind", [conv_net(), linear_net()], ids=["conv", "linear"])
def test_random_nets_are_random(kind):
    """The strategies reach what they promise; else the tests above would be hollow."""
    seen = set()

    @settings(max_examples=80, database=None, suppress_health_check=list(HealthCheck))
    @given(nets(kind))
    def collect(drawn):
        seen.update(str(type(module).__name__) for module in drawn[0].modules())
        seen.update(getattr(module, "padding_mode", "") for module in drawn[0].modules())

    collect()
    wanted = {"Linear", "Tanh", "ReLU"}
    if "Conv1d" in seen:
        wanted |= {"Conv2d", "Conv3d", "BatchNorm2d", "zeros", "reflect", "replicate", "circular"}
    assert wanted <= seen

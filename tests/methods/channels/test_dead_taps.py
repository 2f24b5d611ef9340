"""Dead taps: cut exactly, at what the trace found."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import taut
from cases import sequential
from methods.samples import measured
from taut.errors import CallError
from taut.methods.channels.dead_taps import DeadTaps


def cut(conv, x):
    """The group, the one candidate or None, and the rewritten layer."""
    net = taut.trace(sequential(layer=conv), x)
    group = net.group(["layer"])
    offered = DeadTaps().candidates(group, None)
    assert len(offered) <= 1
    if not offered:
        return group, None, None
    return group, offered[0], offered[0].rewrite({"layer": conv}, None).modules["layer"]


CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@given(st.data())
def test_the_output_stays_equal_and_the_cost_is_the_built_modules(data):
    axes = data.draw(st.sampled_from([1, 2, 3]))
    size = data.draw(st.lists(st.integers(1, 4), min_size=axes, max_size=axes))
    kernel = data.draw(st.lists(st.integers(1, 9 if axes == 1 else 5), min_size=axes, max_size=axes))
    dilation, stride = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    groups, bias = data.draw(st.sampled_from([1, 2])), data.draw(st.booleans())
    same = data.draw(st.booleans())
    padding = "same" if same else tuple(dilation * (k - 1) // 2 + 1 for k in kernel)
    conv = CONV[axes](2, 4, kernel, 1 if same else stride, padding, dilation=dilation, groups=groups, bias=bias)
    x = torch.randn(2, 2, *size)
    group, method, built = cut(conv, x)
    if method is None:
        assert group.layer.live == tuple((0, k) for k in kernel)
        return
    torch.testing.assert_close(built(x), conv(x), rtol=1e-5, atol=1e-5)
    assert method.cost(group) == measured(built, x)
    assert method.cost(group).lowers(group.cost)
    again = method.skeleton(group)["layer"]
    again.load_state_dict(built.state_dict())
    assert torch.equal(again(x), built(x))


def test_bit_equal_where_the_same_kernel_runs():
    """Integer weights: nothing is rounded, so equality is exact."""
    conv = nn.Conv1d(3, 4, 64, padding=32)
    conv.weight.data = torch.randint(-3, 4, conv.weight.shape).float()
    conv.bias.data.zero_()
    x = torch.randint(-3, 4, (2, 3, 4)).float()
    _, method, built = cut(conv, x)
    assert method.ranges == [28, 36]
    assert torch.equal(built(x), conv(x))


def test_padding_that_the_model_adds_itself_is_cut_too():
    class Crepe(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(2, 3, 64)

        def forward(self, x):
            return self.conv(nn.functional.pad(x, (31, 32)))

    model, x = Crepe(), torch.randn(2, 2, 4)
    net = taut.trace(model, x)
    (method,) = DeadTaps().candidates(net.group(["conv"]), None)
    built = method.rewrite({"conv": model.conv}, None).modules["conv"]
    assert method.ranges == [28, 35]
    assert isinstance(built, nn.Sequential)
    before = model(x)
    model.conv = built
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


def test_bias_and_frozen_state_stay():
    conv = nn.Conv1d(2, 3, 9, padding=4)
    conv.weight.requires_grad_(requires_grad=False)
    _, _, built = cut(conv, torch.randn(2, 2, 2))
    flags = {name.rpartition(".")[2]: p.requires_grad for name, p in built.named_parameters()}
    assert flags == {"weight": False, "bias": True}
    assert torch.equal(built.bias if isinstance(built, nn.Conv1d) else built[-1].bias, conv.bias)


@pytest.mark.parametrize(
    ("layer", "size", "words"),
    [
        (nn.Linear(4, 4), (2, 4), "zero padding"),
        (nn.Conv1d(2, 2, 9, padding=2, padding_mode="circular"), (2, 2, 8), "zero padding"),
        (nn.Conv1d(2, 2, 3, padding=1), (2, 2, 8), "every tap meets the input"),
    ],
    ids=lambda v: repr(v) if isinstance(v, nn.Module) else "",
)
def test_what_is_refused(layer, size, words):
    group, method, _ = cut(layer, torch.randn(size))
    assert words in DeadTaps().refuses(group)
    assert method is None
    assert DeadTaps().exact_case(group) is None


@pytest.mark.parametrize("ranges", [None, [], [0], [0, 65], [5, 5], [-1, 3], [0, 1, 0, 1]])
def test_ranges_outside_the_kernel_are_named(ranges):
    group, _, _ = cut(nn.Conv1d(2, 3, 64, padding=32), torch.randn(2, 2, 4))
    with pytest.raises(CallError, match=r"'ranges' of dead_taps on layer 'layer'.*within the kernel"):
        DeadTaps(ranges=ranges).cost(group)


def test_it_is_exact_not_default_and_does_no_damage():
    assert DeadTaps.exact
    assert not DeadTaps.default
    assert DeadTaps(ranges=[0, 1]).damage(None) == 0.0

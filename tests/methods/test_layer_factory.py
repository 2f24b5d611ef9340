"""Layers from shapes, ranks on offer, and what they cost."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import taut
from cases import CONVS, sequential
from methods.samples import group_of, layers
from taut.methods.layer_factory import (
    GRID,
    chain_cost,
    conv,
    empty,
    input_places,
    linear,
    output_places,
    random_layer,
    rank_grid,
    refuse_layer,
)
from taut.nn import GroupedLinear
from taut.structure.tracing import describe_layer
from taut.types import Group, Layer


@given(st.integers(0, 5000))
def test_rank_grid_rises_within_its_limit_in_steps_of_at_most_a_third(limit):
    grid = rank_grid(limit)
    assert all(1 <= r <= limit for r in grid)
    assert all(a < b <= max(a + 1, a * 4 / 3) for a, b in pairwise(grid))
    assert (grid[:1] == [1]) == (limit >= 1)
    if limit >= 8:
        assert grid[-1] > limit * 0.74


def test_rank_grid_falls_on_multiples_that_kernels_like():
    grid = rank_grid(4096)
    assert grid[: len(GRID)] == list(GRID)
    assert all(r % 16 == 0 for r in grid if r > 64)
    assert all(r % 32 == 0 for r in grid if r > 128)
    assert all(r % 64 == 0 for r in grid if r > 512)


@pytest.mark.parametrize("name", [one.name for one in CONVS])
def test_conv_along_all_axes_is_the_layer_again(name):
    model, x = next(one for one in CONVS if one.name == name).make()
    layer = taut.trace(model, x)["conv"]
    sizes = (layer.weight[1] * layer.groups, layer.weight[0])
    again = conv(sizes, layer, range(len(layer.kernel)), groups=layer.groups, bias=layer.bias)
    again.load_state_dict({key: value.float() for key, value in model.conv.state_dict().items()})
    torch.testing.assert_close(again(x.float()), model.conv(x).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
def test_conv_along_one_axis_leaves_the_other_alone(axis):
    layer = describe_layer("c", nn.Conv2d(4, 6, (3, 5), (2, 3), (1, 2), (2, 1), padding_mode="circular"), (), 1)
    built = conv((4, 7), layer, (axis,), groups=1, bias=False)
    expected = [(3, 5), (2, 3), (1, 2), (2, 1)]
    for key, pair in zip(("kernel_size", "stride", "padding", "dilation"), expected, strict=True):
        plain = 0 if key == "padding" else 1
        wanted = tuple(value if i == axis else plain for i, value in enumerate(pair))
        assert getattr(built, key) == wanted
    assert (built.in_channels, built.out_channels, built.bias, built.padding_mode) == (4, 7, None, "circular")


def test_layers_are_built_without_drawing_random_numbers():
    layer = describe_layer("c", nn.Conv2d(4, 3, 3), (), 1)
    before = torch.get_rng_state()
    built = linear(4, 3, bias=True)
    conv((4, 3), layer, (0, 1), groups=1, bias=True)
    assert torch.equal(before, torch.get_rng_state())
    assert built.weight.shape == (3, 4)
    assert built.weight.device.type == "cpu"


def test_random_layer_is_seeded_and_of_the_layers_shape():
    for module in (nn.Linear(4, 3, bias=False), nn.Conv2d(4, 6, (3, 2), groups=2, padding=1, dilation=(1, 2))):
        layer = describe_layer("l", module, (), 1)
        one, two = random_layer(layer), random_layer(layer)
        assert repr(one) == repr(module)
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
        assert [p.shape for p in one.parameters()] == [p.shape for p in module.parameters()]


def test_places_and_chain_cost_by_hand():
    model = sequential(conv=nn.Conv2d(4, 6, 3, stride=2, groups=2))
    layer = taut.trace(model, torch.randn(3, 4, 9, 7))["conv"]
    assert output_places(layer) == 3 * 4 * 3
    assert input_places(layer) == 3 * 9 * 7
    cost = chain_cost(layer, ((10, 36), (20, 189)))
    assert cost == taut.types.Cost(36, 36, (360 + 3780) // 3, 144)


def test_what_no_factorization_takes():
    assert refuse_layer(Layer("x", "Linear", (3, 3), skip="because of this")) == "because of this"
    assert refuse_layer(Layer("x", "Embedding", (3, 3))) == "Embedding is not factorized"
    assert refuse_layer(Layer("x", "Conv2d", (3, 3))) == "Conv2d is not factorized"
    assert refuse_layer(Layer("x", "Linear", (3, 3))) is None
    assert refuse_layer(Layer("x", "Conv1d", (3, 3, 1))) is None


@pytest.mark.parametrize(
    ("kind", "sizes", "settings"),
    [
        (nn.Linear, (3, 5), {"bias": True}),
        (nn.Conv2d, (4, 6), {"kernel_size": (3, 1), "groups": 2, "padding": "same", "padding_mode": "reflect"}),
        (nn.ConvTranspose1d, (4, 6), {"kernel_size": 3}),
        (nn.Embedding, (7, 3), {"padding_idx": 2}),
        (nn.BatchNorm2d, (5,), {"affine": False}),
        (nn.GroupNorm, (2, 6), {}),
        (GroupedLinear, (4, 6), {"groups": 2, "bias": False}),
    ],
)
def test_an_empty_layer_is_one_of_its_class_and_draws_nothing(kind, sizes, settings):
    before = torch.get_rng_state()
    made = empty(kind, *sizes, **settings)
    assert torch.equal(torch.get_rng_state(), before)
    wanted = kind(*sizes, **settings)
    assert type(made) is kind
    assert repr(made) == repr(wanted)
    assert vars(made).keys() == vars(wanted).keys()
    made.load_state_dict(wanted.state_dict(), strict=True)
    made.reset_parameters()
    assert not torch.equal(torch.get_rng_state(), before) or kind in {nn.BatchNorm2d, nn.GroupNorm}


@settings(max_examples=30)
@given(layers())
def test_samples_are_described_as_tracing_describes_them(sample):
    module, size = sample
    group, x = group_of(module, size)
    traced = taut.trace(sequential(layer=module), x).group(["layer"])
    assert group == Group((replace(traced.layer, live=group.layer.live),))

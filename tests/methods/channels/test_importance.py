"""Orders of removal from whichever second moment of the inputs is held."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import taut
from cases import sequential
from taut.core.example import Example
from taut.core.modes import quiet
from taut.criteria.channels import removal
from taut.decompose.weighting import Weighting
from taut.methods.channels import importance
from taut.methods.channels.compensation import refilled
from taut.methods.channels.importance import curves_of
from taut.structure.asides import transposed_outputs
from taut.structure.channels.groups import coupled
from taut.structure.narrowing import Cut
from taut.structure.support import TRANSPOSED_KINDS


@pytest.fixture(scope="module")
def seen():
    """A net with a grouped reader and a dense one, its groups, and statistics with full second moments."""
    torch.manual_seed(0)
    net = sequential(
        a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 10, 3, groups=2), r=nn.ReLU(), f=nn.Flatten(), c=nn.Linear(40, 4)
    ).eval()
    x = torch.randn(64, 3, 6, 6)
    with quiet():
        groups = coupled(net, Example(net, x[:2])).groups
    return net, groups, taut.observe(taut.trace(net, x[:2]), net, x).layers


def curves(seen, criterion, form):
    net, groups, layers = seen
    known = {name: replace(stats, weighting=form(stats.weighting)) for name, stats in layers.items()}
    return curves_of(net, groups, known, criterion, {name: name for name in layers})


def full(held):
    return held


def sketched(held):
    """Rows whose second moment is the full one."""
    return Weighting(sketch=torch.linalg.cholesky(held.full.double()).mT)


def of_channels(held):
    """As if all taps saw the same, and apart."""
    taps = 9 if held.full.shape[-1] % 9 == 0 else 1
    return Weighting(channel=held.full[:, ::taps, ::taps].contiguous())


def test_a_sketch_of_everything_tells_what_the_full_moment_tells(seen):
    for one, two in zip(curves(seen, "obd", full), curves(seen, "obd", sketched), strict=True):
        np.testing.assert_array_equal(one.order, two.order)
        np.testing.assert_allclose(one.damages, two.damages, rtol=1e-5)


@pytest.mark.parametrize("form", [full, sketched, of_channels])
@pytest.mark.parametrize("criterion", ["obs", "obd"])
def test_damages_rise_from_nothing_over_every_order(seen, criterion, form):
    for group, curve in zip(seen[1], curves(seen, criterion, form), strict=True):
        assert sorted(curve.order.tolist()) == list(range(group.size))
        assert curve.damages[0] == 0
        assert (np.diff(curve.damages) >= 0).all()


def test_the_exact_move_of_all_others_costs_less_than_none(seen):
    for exact, bare in zip(curves(seen, "obs", full), curves(seen, "obd", full), strict=True):
        assert (exact.damages[1:-1] <= bare.damages[1:-1] * (1 + 1e-2)).all()


@pytest.mark.parametrize("criterion", ["obs", "obd"])
def test_without_statistics_channels_that_nobody_weighs_go_first(seen, criterion):
    net, groups, _ = seen
    weight = net.c.weight.detach().clone()
    with torch.no_grad():
        net.c.weight.view(4, 10, 4)[:, [2, 7]] = 0
    (curve,) = curves_of(net, groups[1:], {}, criterion, {})
    with torch.no_grad():
        net.c.weight.copy_(weight)
    assert curve.order[0] == 2
    assert curve.damages[1] == 0 < curve.damages[2]


def test_an_order_is_searched_once_for_the_same_weights_and_observations(seen, monkeypatch):
    net, groups, layers = seen
    net = copy.deepcopy(net)
    searched = []
    monkeypatch.setattr(importance, "removal", lambda *a: searched.append(1) or removal(*a))
    names = {name: name for name in layers}
    fresh = {name: replace(stats) for name, stats in layers.items()}
    first = curves_of(net, groups, fresh, "obs", names)
    again = curves_of(copy.deepcopy(net), groups, fresh, "obs", names)
    assert len(searched) == len(groups)
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.order, two.order)
        assert one.comparable == two.comparable
    with torch.no_grad():
        net.c.weight[:, :20] *= 3  # reads the second group
    moved = curves_of(net, groups, fresh, "obs", names)
    assert len(searched) == len(groups) + 1
    assert not np.array_equal(moved[-1].damages, first[-1].damages)
    curves_of(net, groups, {name: replace(stats) for name, stats in layers.items()}, "obs", names)
    assert len(searched) == 2 * len(groups) + 1, "others were observed"


def transposed(stride, kernel=2, axes=2):
    """A net whose channels a transposed convolution reads, its groups, statistics, and what that layer reads."""
    torch.manual_seed(0)
    conv, reader = ((nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1], TRANSPOSED_KINDS[axes - 1])
    up = reader(8, 6, kernel, stride=stride, padding=(kernel - stride) // 2 if kernel > stride else 0)
    net = sequential(a=conv(3, 8, 3), r=nn.ReLU(), b=up, mixes=conv(6, 2, 1)).eval()
    x = torch.randn(64, 3, *[6] * axes)
    stats = taut.observe(taut.trace(net, x[:2]), net, x, output="values")
    with quiet(), torch.no_grad():
        groups = [group for group in coupled(net, Example(net, x[:2])).groups if group.name == "a"]
        return net, groups, stats.seen("b"), net.r(net.a(x))


def lost(net, seen, read, weight):
    """What outputs by another weight add to the loss, run position by position."""
    with torch.no_grad():
        rows = transposed_outputs(net.b, (net.b.weight - weight).double(), read)
    return float((rows @ seen.outputs.full[0].double() * rows).sum()) / len(read) / (2 * seen.positions)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_what_a_transposed_convolution_loses_with_each_channel_is_what_it_gives_otherwise(axes):
    net, groups, seen, read = transposed(stride=2, axes=axes)
    (curve,) = curves_of(net, groups, {"b": seen}, "obd", {"b": "b"})
    assert curve.comparable
    wanted = []
    for gone in range(8):
        weight = net.b.weight.detach().clone()
        weight[gone] = 0
        wanted.append(lost(net, seen, read, weight))
    # a hundredth of its mean is added to B, which has one direction in three here
    np.testing.assert_allclose(np.diff(curve.damages), sorted(wanted), rtol=0.05, atol=0.01 * max(wanted))


@pytest.mark.parametrize(("stride", "kernel"), [(2, 2), (1, 3), (2, 4)])
def test_without_any_channel_a_transposed_convolution_loses_all_that_it_gave(stride, kernel):
    net, groups, seen, read = transposed(stride, kernel)
    (curve,) = curves_of(net, groups, {"b": seen}, "obs", {"b": "b"})
    assert curve.damages[-1] == pytest.approx(lost(net, seen, read, torch.zeros_like(net.b.weight)), rel=0.1)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_the_weights_that_a_transposed_convolution_keeps_make_up_for_the_others(axes):
    net, groups, seen, read = transposed(stride=2, axes=axes)
    (curve,) = curves_of(net, groups, {"b": seen}, "obs", {"b": "b"})
    kept = np.sort(curve.order[3:])
    cut = Cut(torch.arange(6), torch.from_numpy(kept))
    weight = torch.zeros_like(net.b.weight)
    weight[kept] = refilled(net.b, cut, seen).weight.detach()
    bare = torch.zeros_like(weight)
    bare[kept] = net.b.weight.detach()[kept]
    assert lost(net, seen, read, weight) == pytest.approx(curve.damages[3], rel=0.1)
    assert lost(net, seen, read, weight) < 0.9 * lost(net, seen, read, bare)


def test_channels_that_a_transposed_convolution_reads_have_an_order_where_no_gradient_is_known():
    net, groups, seen, _ = transposed(stride=2)
    (curve,) = curves_of(net, groups, {"b": replace(seen, outputs=None, scale=3.0)}, "obd", {"b": "b"})
    (weighed,) = curves_of(net, groups, {"b": seen}, "obd", {"b": "b"})
    assert curve.comparable
    assert np.diff(curve.damages).sum() < 2 * 3.0  # shares of its energy, each for itself, in units of the loss
    assert sorted(curve.order) == sorted(weighed.order)

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
from taut.methods.channels.importance import curves_of
from taut.structure.channels.groups import coupled


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

"""Transposed convolutions along one axis after the other: exact at full rank, and what is predicted is what is lost."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import taut
from taut.types import Plan, Step

FLAVOURS = {
    "no overlap": {"kernel_size": 2, "stride": 2},
    "gaps": {"kernel_size": 2, "stride": 3, "output_padding": (1, 0), "bias": False},
    "overlap": {"kernel_size": 4, "stride": 2, "padding": 1},
    "other along each axis": {"kernel_size": (3, 5), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
}


@pytest.fixture(params=FLAVOURS)
def layer(request):
    """A net of one layer whose inputs are smooth in space, its data, and what is known of it."""
    torch.manual_seed(0)
    x = torch.randn(48, 12, 6, 7)
    x = x + x.roll(1, -2) + x.roll(2, -2) + x.roll(1, -1)
    x = torch.einsum("dc,nchw->ndhw", torch.randn(12, 12), x * torch.logspace(0, -2, 12)[:, None, None]) + 0.5
    model = nn.Sequential(nn.ConvTranspose2d(12, 10, **FLAVOURS[request.param])).eval()
    net = taut.trace(model, x[:2])
    return model, x, net, taut.observe(net, model, x, output="values")


def step(rank, **settings):
    return Step(("0",), "transposed_spatial", {"rank": rank, **settings}, allow_growth=True)


@torch.no_grad()
def lost(model, small, x):
    return float((small(x) - model(x)).double().square().sum() / (2 * len(x)))


def test_full_rank_is_the_layer(layer):
    model, x, net, stats = layer
    (c, o), (height, width) = model[0].weight.shape[:2], model[0].kernel_size
    small = taut.apply(model, Plan.of(net, [step(min(c * height, o * width))]), stats)
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-4)
    assert [type(part) for part in small[0]] == [nn.ConvTranspose2d] * 2


@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize("metric", ["data", "frobenius"])
def test_damage_is_what_the_output_loses(layer, rank, metric):
    model, x, net, stats = layer
    plan = Plan.of(net, [step(rank, metric=metric)])
    small = taut.apply(model, plan, stats)
    measured = lost(model, small, x)
    assert stats.damage(net.group(["0"]), taut.methods.resolve(plan.steps[0])) == pytest.approx(measured, rel=0.05)
    if metric == "frobenius":
        assert measured > lost(model, taut.apply(model, Plan.of(net, [step(rank)]), stats), x)
    cost, counted = taut.methods.resolve(plan.steps[0]).cost(net.group(["0"])), taut.measure.count(small, net.example)
    assert (cost.params, cost.macs) == (counted.params, counted.macs)


def test_no_better_pair_of_the_same_rank_is_found_by_descent(layer):
    """An oracle of its own: both kernels trained on the very inputs, from where the method leaves them."""
    model, x, net, stats = layer
    small = taut.apply(model, Plan.of(net, [step(4)]), stats)
    start, wanted = lost(model, small, x), model(x).detach()
    trained = taut.apply(model, Plan.of(net, [step(4)]), stats).double()
    for p in trained.parameters():
        p.requires_grad_(True)
    solver = torch.optim.LBFGS(trained.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        loss = (trained(x.double()) - wanted).square().mean()
        loss.backward()
        return loss

    solver.step(closure)
    assert start <= 1.3 * lost(model.double(), trained, x.double())


def test_kernels_along_one_axis_alone_are_left_to_the_others():
    for kernel in (1, (1, 4), (4, 1)):
        model = nn.Sequential(nn.ConvTranspose2d(8, 8, kernel)).eval()
        net = taut.trace(model, torch.randn(2, 8, 4, 4))
        assert "larger than 1 along both axes" in taut.methods.resolve(step(2)).refuses(net.group(["0"]))


@pytest.mark.parametrize("known", ["everything", "no gradients", "nothing"])
def test_damage_is_in_the_unit_of_what_is_known(known):
    """Without gradients it is the share of the output that is lost: nearly all of it at a rank of one."""
    model, x = (
        nn.Sequential(nn.ConvTranspose2d(32, 32, 4, 2, 1), nn.Flatten(), nn.LazyLinear(5)).eval(),
        torch.randn(16, 32, 4, 4),
    )
    model(x)
    net = taut.trace(model, x[:2])
    stats = taut.observe(net, model) if known == "nothing" else taut.observe(net, model, x, output="values")
    if known == "no gradients":
        module, seen = stats.asides["0"]
        stats = replace(stats, asides={"0": (module, replace(seen, outputs=None))})
    full, one = (taut.methods.resolve(step(rank)) for rank in (128, 1))
    group = net.group(["0"])
    assert stats.damage(group, full) == pytest.approx(0, abs=1e-9)
    if known != "everything":
        assert 0.8 < stats.damage(group, one) <= 1
        return
    fisher, data = (taut.methods.resolve(step(8, metric=metric)) for metric in ("fisher", "data"))
    assert stats.damage(group, fisher) < stats.damage(group, data)

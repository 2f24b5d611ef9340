"""Pruned layers refitted: the least-squares solution among weights with the same zeros."""

import pytest
import torch
from torch import nn

import taut
from cases import case, sequential, untouched
from taut import Plan
from taut.recovery.solving import Moments
from taut.recovery.sparse import RIDGE, keep_zeros


def related(samples, size, seed=0):
    mixing = torch.randn(size, size, generator=torch.Generator().manual_seed(99))
    return torch.randn(samples, size, generator=torch.Generator().manual_seed(seed)) @ mixing


def test_the_solution_among_those_with_the_same_zeros():
    torch.manual_seed(0)
    dense, pruned, x = nn.Linear(10, 4), nn.Linear(10, 4), related(200, 10)
    with torch.no_grad():
        pruned.weight[torch.rand(4, 10) < 0.5] = 0
    before = dense.weight.detach().clone()
    keep_zeros(dense, pruned, Moments.of(x[None].clone(), centred=False))
    A = (x.double().T @ x.double() / 200) + RIDGE * float((x.square().mean(0)).mean()) * torch.eye(10)
    L = torch.linalg.cholesky(A)
    for row, found, kept in zip(before.double(), dense.weight.detach(), pruned.weight != 0, strict=True):
        wanted = torch.zeros(10, dtype=torch.float64)
        wanted[kept] = torch.linalg.lstsq(L.T[:, kept], (L.T @ row)[:, None]).solution[:, 0]
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("method", ["magnitude", "mfbp", "obs"])
def test_the_outputs_come_nearer_and_the_zeros_stay(method, bias):
    torch.manual_seed(0)
    net = sequential(a=nn.Linear(16, 24, bias=bias), r=nn.ReLU(), b=nn.Linear(24, 12, bias=bias), s=nn.ReLU())
    net.append(nn.Linear(12, 4, bias=bias))
    data, fresh = related(600, 16), related(300, 16, seed=1)
    network = taut.trace(net, data[:2])
    stats, plan = taut.observe(network, net, [data]), Plan((taut.whole(network, method, sparsity=0.7),))
    with untouched(net):
        bare, refitted = taut.apply(net, plan, stats), taut.apply(net, plan, stats, data=[data])
    for one, other in zip(bare.parameters(), refitted.parameters(), strict=True):
        assert torch.equal(one == 0, other == 0)
    wanted = net(fresh)
    errors = [float((small(fresh) - wanted).detach().square().mean()) for small in (bare, refitted)]
    assert errors[1] < (1.0 if method == "obs" else 0.6) * errors[0]  # obs has made up for its own layer already


def test_a_normalized_convolution_is_refitted_too():
    model, example = case("vgg").make()
    batches = case("vgg").data(batches=4, size=16)
    network = taut.trace(model, example)
    stats, plan = taut.observe(network, model, batches), Plan((taut.whole(network, "magnitude", sparsity=0.6),))
    with untouched(model):
        bare, refitted = taut.apply(model, plan, stats), taut.apply(model, plan, stats, data=batches)
    x = torch.cat(batches)
    errors = [float((small(x) - model(x)).detach().square().mean()) for small in (bare, refitted)]
    assert errors[1] < 0.5 * errors[0]


def test_with_nothing_pruned_nothing_moves():
    torch.manual_seed(0)
    net, x = sequential(a=nn.Linear(8, 6), r=nn.ReLU(), b=nn.Linear(6, 3)), related(300, 8)
    network = taut.trace(net, x[:2])
    steps = [taut.Step((name,), "magnitude", {"sparsity": 0.0}, allow_growth=True) for name in ("a", "b")]
    small = taut.apply(net, Plan.of(network, steps), taut.observe(network, net), data=[x])
    torch.testing.assert_close(small(x), net(x), rtol=1e-4, atol=1e-4)


def test_an_input_that_is_always_zero_leaves_weights_finite():
    torch.manual_seed(0)
    net, x = sequential(a=nn.Linear(8, 6), r=nn.ReLU(), b=nn.Linear(6, 3)), related(300, 8)
    x[:, :4] = 0
    network = taut.trace(net, x[:2])
    plan = Plan((taut.whole(network, "obs", sparsity=0.5),))
    small = taut.apply(net, plan, taut.observe(network, net, [x]), data=[x])
    assert all(bool(p.isfinite().all()) for p in small.parameters())


def test_zeros_of_layers_that_a_plan_does_not_touch_stay():
    torch.manual_seed(0)
    net, x = (
        sequential(a=nn.Linear(16, 24), r=nn.ReLU(), b=nn.Linear(24, 12), s=nn.ReLU(), c=nn.Linear(12, 4)),
        related(400, 16),
    )
    network = taut.trace(net, x[:2])
    pruned = taut.apply(net, Plan((taut.whole(network, "magnitude", sparsity=0.6),)), taut.observe(network, net))
    network = taut.trace(pruned, x[:2])
    plan = Plan.of(network, [taut.Step(("a",), "svd", {"rank": 6})])
    small = taut.apply(pruned, plan, taut.observe(network, pruned, [x]), data=[x])
    for name in ("b", "c"):
        before, after = pruned.get_submodule(name).weight, small.get_submodule(name).weight
        assert not bool(((before == 0) & (after != 0)).any())

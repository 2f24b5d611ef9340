"""Sums of rank-1 terms as layers: the kernel that the chain computes, damage, costs, padding modes, what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812

import taut
from cases import FLAVOURS, KERNEL, RECTANGULAR, SIZE, sequential
from methods.kernels import brute_force, statistics
from methods.samples import check_costs, group_of, layers
from taut import CallError
from taut.decompose.weighting import Weighting
from taut.methods.low_rank.cp import CP, max_rank, most_terms
from taut.structure.statistics import LayerStatistics

KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def flavours():
    for dims in (1, 2, 3):
        for name, flavour in {**FLAVOURS, **(RECTANGULAR if dims == 2 else {})}.items():
            yield pytest.param(dims, flavour, id=f"{dims}d {name}")


def rewritten(method, conv, stats=None):
    factors = method.factor({"c": conv}, {} if stats is None else {"c": stats})
    return method.rewrite({"c": conv}, factors).modules["c"].eval(), factors


def composed(factors, rank, shape):
    """The kernel of the fitted factors by one einsum in float64, group after group, in the shape of the weight."""
    outputs, inputs, *axes = factors.fit(rank)[0]
    letters = "xyz"[: len(axes)]
    kernel = torch.einsum(f"gor,gcr,{','.join(f'g{m}r' for m in letters)}->goc{letters}", outputs, inputs, *axes)
    return kernel.reshape(shape)


# Costs.


@settings(max_examples=25)
@given(layers(dims=(1, 2, 3)), st.data())
def test_cost_is_that_of_the_built_module(sample, data):
    module, size = sample
    group, x = group_of(module, size)
    if CP().refuses(group) is None:
        check_costs(CP(rank=data.draw(st.integers(1, max_rank(group.layer)))), group, module, x)


@settings(max_examples=20)
@given(layers(dims=(1, 2, 3)))
def test_candidates_shrink_and_are_few(sample):
    module, size = sample
    group, _ = group_of(module, size)
    offered = CP().candidates(group, None) if CP().refuses(group) is None else []
    assert all(one.cost(group).lowers(group.cost) for one in offered)
    assert len(set(offered)) == len(offered) <= 6


def test_the_sources_formula():
    """R (S + d1 + d2 + T) weights; the first layer at the input's positions, each axis at those that it leaves."""
    group, _ = group_of(nn.Conv2d(48, 64, (5, 3), (2, 1), (2, 1), bias=False), (1, 48, 12, 10))
    cost = CP(rank=16).cost(group)
    assert cost.params == 16 * (48 + 5 + 3 + 64)
    assert cost.macs == 16 * (48 * 12 * 10 + 5 * 6 * 10 + 3 * 6 * 10 + 64 * 6 * 10)


# What is built.


@pytest.mark.parametrize(("dims", "flavour"), list(flavours()))
def test_the_chain_computes_the_kernel_of_its_factors(dims, flavour):
    """Every stride, dilation, padding mode and grouping: the layer itself, with the composed kernel."""
    conv = KINDS[dims](**({"in_channels": 8, "out_channels": 12, "kernel_size": KERNEL} | flavour)).double()
    group, _ = group_of(conv.float(), (2, 8, *SIZE[dims]))
    if CP().refuses(group) is not None:
        assert max(group.layer.kernel) == 1 or group.layer.weight[1] == group.layer.weight[0] // group.layer.groups == 1
        return
    conv = conv.double()
    method = CP(rank=min(4, max_rank(group.layer)), metric="frobenius")
    built, factors = rewritten(method, conv)
    x = torch.randn(2, 8, *SIZE[dims]).double()
    conv.weight.data = composed(factors, method.rank, conv.weight.shape)
    torch.testing.assert_close(built(x), conv(x), rtol=0, atol=1e-11)


def test_against_functional_convolution():
    """No layer of taut or torch.nn in between."""
    conv = nn.Conv2d(6, 8, 3, stride=2, padding=1).double()
    built, factors = rewritten(CP(rank=5), conv, statistics(conv))
    x = torch.randn(2, 6, 9, 9).double()
    wanted = F.conv2d(x, composed(factors, 5, conv.weight.shape), conv.bias, 2, 1)
    torch.testing.assert_close(built(x), wanted, rtol=0, atol=1e-11)


def test_stride_and_padding_sit_with_their_axis():
    group, _ = group_of(nn.Conv2d(4, 6, (5, 3), (2, 1), (2, 1), dilation=(1, 2)), (2, 4, 9, 9))
    first, rows, columns, last = CP(rank=3).skeleton(group)["layer"]
    assert (first.kernel_size, first.stride, first.padding, first.bias) == ((1, 1), (1, 1), (0, 0), None)
    assert (rows.kernel_size, rows.stride, rows.padding, rows.dilation) == ((5, 1), (2, 1), (2, 0), (1, 1))
    assert (columns.kernel_size, columns.stride, columns.padding) == ((1, 3), (1, 1), (0, 1))
    assert columns.dilation == (1, 2)
    assert rows.groups == rows.in_channels == rows.out_channels == 3
    assert (last.kernel_size, last.bias is None) == ((1, 1), False)


def test_axes_of_one_tap_have_no_layer():
    """Their stride and padding are the first layer's, which then runs at fewer positions."""
    group, _ = group_of(nn.Conv2d(4, 6, (1, 3), 2, 1), (2, 4, 9, 9))
    first, middle, last = CP(rank=3).skeleton(group)["layer"]
    assert (first.stride, first.padding) == ((2, 1), (1, 0))
    assert (middle.kernel_size, middle.stride, middle.padding) == ((1, 3), (1, 2), (0, 1))
    assert last.kernel_size == (1, 1)


@pytest.mark.parametrize("metric", ["data", "fisher", "mahalanobis", "frobenius"])
def test_planted_terms_are_found(metric):
    conv = nn.Conv2d(12, 10, 3).double()
    conv.weight.data = torch.einsum("or,cr,yr,xr->ocyx", *(torch.randn(n, 5).double() for n in (10, 12, 3, 3)))
    _, factors = rewritten(CP(rank=5, metric=metric), conv, statistics(conv, fisher=True))
    torch.testing.assert_close(composed(factors, 5, conv.weight.shape), conv.weight.detach(), rtol=0, atol=1e-8)


def test_the_columns_of_a_term_have_even_norms():
    conv = nn.Conv2d(12, 10, 3)
    first, rows, columns, last = rewritten(CP(rank=4), conv, statistics(conv))[0]
    norms = [part.weight.flatten(1).norm(dim=1) for part in (first, rows, columns)]
    for norm in [*norms, last.weight.flatten(1).norm(dim=0)]:
        torch.testing.assert_close(norm, norms[0], rtol=1e-4, atol=0)


def test_more_terms_than_an_exact_fit_needs():
    conv = nn.Conv2d(2, 4, 3).double()
    group, _ = group_of(nn.Conv2d(2, 4, 3), (2, 2, 5, 5))
    for rank in (max_rank(group.layer), 40, most_terms(group.layer)):
        _, factors = rewritten(CP(rank=rank), conv, statistics(conv))
        torch.testing.assert_close(composed(factors, rank, conv.weight.shape), conv.weight.detach(), rtol=0, atol=1e-3)


# Damage.


@pytest.mark.parametrize("metric", ["data", "fisher", "mahalanobis", "frobenius"])
@pytest.mark.parametrize("form", ["full", "channel"])
@pytest.mark.parametrize("fisher", [False, True], ids=["inputs alone", "with gradients"])
def test_damage_is_that_of_the_kernel_which_is_built(metric, form, fisher):
    """In one unit, whatever metric chose the factors."""
    conv = nn.Conv2d(6, 8, 3).double()
    stats = statistics(conv, fisher=fisher, form=form)
    for rank in (1, 5):
        method = CP(rank=rank, metric=metric)
        built, factors = rewritten(method, conv, stats)
        assert method.damage(factors) == pytest.approx(brute_force(conv, built, stats), rel=1e-6, abs=1e-12)


def test_the_metric_lowers_the_error_that_it_measures():
    conv = nn.Conv2d(8, 16, 3).double()
    stats = statistics(conv)
    damage = {}
    for metric in ("data", "frobenius"):
        method = CP(rank=6, metric=metric)
        damage[metric] = method.damage(method.factor({"c": conv}, {"c": stats}))
    assert damage["data"] < 0.5 * damage["frobenius"]


def test_outputs_cannot_be_improved():
    """The last layer is the least-squares solution on what the layers before it give, in the whole metric."""
    conv = nn.Conv2d(6, 8, 3).double()
    stats = statistics(conv)
    _, factors = rewritten(CP(rank=4), conv, stats)
    _, inputs, rows, columns = (factor[0] for factor in factors.fit(4)[0])
    terms = torch.einsum("cr,yr,xr->rcyx", inputs, rows, columns).flatten(1)
    left = conv.weight.detach().flatten(1) - composed(factors, 4, conv.weight.shape).flatten(1)
    A = stats.weighting.regular()[0]
    slope = left @ A @ terms.T
    assert float(slope.abs().max()) <= 1e-8 * float((conv.weight.detach().flatten(1) @ A @ terms.T).abs().max())


def test_more_terms_less_damage_and_one_fit_each():
    conv = nn.Conv2d(8, 12, 3).double()
    factors = CP().factor({"c": conv}, {"c": statistics(conv, fisher=True)})
    damages = [CP(rank=r).damage(factors) for r in (1, 2, 4, 8)]
    assert damages == sorted(damages, reverse=True)
    assert factors.fit(8) is factors.fit(8)


def test_groups_are_fitted_on_their_own():
    conv = nn.Conv2d(8, 12, 3, groups=2).double()
    both = composed(rewritten(CP(rank=3), conv)[1], 3, conv.weight.shape)
    for half in range(2):
        alone = nn.Conv2d(4, 6, 3).double()
        alone.weight.data = conv.weight.data[6 * half : 6 * half + 6]
        wanted = composed(rewritten(CP(rank=3), alone)[1], 3, alone.weight.shape)
        wrong = (both[6 * half : 6 * half + 6] - alone.weight).norm(), (wanted - alone.weight).norm()
        assert float(wrong[0].detach()) == pytest.approx(float(wrong[1].detach()), rel=0.02)


def test_zero_kernels_and_blind_inputs():
    conv = nn.Conv2d(4, 6, 3).double()
    stats = LayerStatistics(Weighting(full=torch.zeros(1, 36, 36).double()))
    assert bool(composed(rewritten(CP(rank=3), conv, stats)[1], 3, conv.weight.shape).isfinite().all())
    conv.weight.data.zero_()
    built, factors = rewritten(CP(rank=3), conv, statistics(conv))
    assert CP(rank=3).damage(factors) == 0
    assert not any(bool(part.weight.any()) for part in built)


# In a net.


def test_apply_with_data_refits_the_chain():
    torch.manual_seed(0)
    net = sequential(conv=nn.Conv2d(8, 12, 3, padding=1), act=nn.ReLU(), last=nn.Conv2d(12, 6, 3))
    data = torch.randn(64, 8, 6, 6)
    traced = taut.trace(net, data[:2])
    stats = taut.observe(traced, net, data)
    plan = taut.Plan.of(traced, [taut.Step((name,), "cp", {"rank": 10}) for name in ("conv", "last")])
    wrong = {}
    for given_data in (None, data):
        small = taut.apply(net, plan, stats, data=given_data)
        assert [len(small.conv), len(small.last)] == [4, 4]
        wrong[given_data is None] = float((small(data) - net(data)).detach().norm() / net(data).detach().norm())
    assert wrong[False] < wrong[True] < 1


# What is refused.


@pytest.mark.parametrize(
    ("layer", "size", "words"),
    [
        (nn.Conv2d(4, 4, 1), (2, 4, 5, 5), "cp: needs a kernel larger than 1; svd takes the others"),
        (nn.Linear(4, 4), (2, 4), "cp: needs a kernel larger than 1; svd takes the others"),
        (nn.Conv2d(4, 4, 3, groups=4), (2, 4, 5, 5), "one input and one output per group"),
    ],
    ids=lambda value: repr(value) if isinstance(value, nn.Module) else "",
)
def test_what_is_refused(layer, size, words):
    group, _ = group_of(layer, size)
    assert words in CP().refuses(group)


@pytest.mark.parametrize("rank", [0, -1, 865, 2.5, True, "8", None])
def test_ranks_that_do_not_fit_are_named(rank):
    group, _ = group_of(nn.Conv2d(8, 12, 3), (2, 8, 5, 5))
    for call in (CP(rank=rank).cost, CP(rank=rank).skeleton):
        with pytest.raises(
            CallError, match=rf"'rank' of cp on layer 'layer' must be between 1 and 864\. Got {rank} in"
        ):
            call(group)


def test_unknown_metrics_are_named():
    with pytest.raises(CallError, match="'metric' of cp must be one of data, fisher, mahalanobis, frobenius"):
        CP(rank=1, metric="cosine").factor({"c": nn.Conv2d(4, 8, 3)}, {})

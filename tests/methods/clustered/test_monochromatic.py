"""Monochromatic: the source's formulas, the kernel that is built, damage by brute force, whole nets, saved folders."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import taut
from cases import KERNEL, SIZE, sequential
from methods.kernels import brute_force, flavours, rewritten, statistics, with_kernel
from methods.samples import check_costs, group_of, layers
from taut import CallError, Plan, Step
from taut.methods.clustered.clusters import divisors
from taut.methods.clustered.monochromatic import Monochromatic
from taut.nn import Reorder

KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


# Costs.


@given(layers(dims=(1, 2, 3)), st.data())
def test_cost_is_that_of_the_built_module(sample, data):
    module, size = sample
    group, x = group_of(module, size)
    if Monochromatic().refuses(group) is None:
        k = data.draw(st.sampled_from(divisors(group.layer.weight[0])))
        sides = data.draw(st.sampled_from(["", "o"]))
        check_costs(Monochromatic(colours=k, reorders=sides), group, module, x)


@given(layers(dims=(1, 2, 3)))
def test_candidates_shrink(sample):
    module, size = sample
    group, _ = group_of(module, size)
    offered = Monochromatic().candidates(group, None) if Monochromatic().refuses(group) is None else []
    assert all(one.cost(group).lowers(group.cost) for one in offered)
    assert len({one.colours for one in offered}) == len(offered)


def test_the_sources_first_layer():
    """Table 1: C C' + X Y F weights, C C' N M + X Y F N M D^-2 operations; 3x published, 2.99 by the formula."""
    group, _ = group_of(nn.Conv2d(3, 96, 7, 2, 3, bias=False), (1, 3, 32, 32))
    cost = Monochromatic(colours=6).cost(group)
    assert cost.params == 3 * 6 + 49 * 96
    assert cost.macs == 3 * 6 * 32 * 32 + 49 * 96 * 16 * 16
    assert group.cost.params / cost.params == pytest.approx(2.99, abs=0.005)


def test_candidates_prefer_groups_of_a_multiple_of_sixteen():
    group, _ = group_of(nn.Conv2d(3, 96, 7, bias=False), (1, 3, 16, 16))
    offered = [one.colours for one in Monochromatic().candidates(group, None)]
    assert offered == [1, 2, 3, 6]
    group, _ = group_of(nn.Conv2d(3, 20, 7, bias=False), (1, 3, 16, 16))  # no divisor leaves such groups
    assert [one.colours for one in Monochromatic().candidates(group, None)] == [1, 2, 4, 5, 10, 20]


# What is built.


@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize(("dims", "flavour"), list(flavours()))
def test_the_built_layers_compute_the_fitted_kernel(dims, flavour, paper):
    conv = KINDS[dims](**({"in_channels": 8, "out_channels": 12, "kernel_size": KERNEL} | flavour)).double()
    method = Monochromatic(colours=3, metric="frobenius", paper=paper)
    built, W, _ = rewritten(method, conv)
    x = torch.randn(2, 8, *SIZE[dims]).double()
    torch.testing.assert_close(built(x), with_kernel(conv, W)(x), rtol=0, atol=1e-10)


def test_unit_impulses_read_the_kernel_back():
    conv = nn.Conv2d(3, 8, 3, padding=2, bias=False).double()
    built, W, _ = rewritten(Monochromatic(colours=2), conv, statistics(conv))
    impulses = torch.eye(27).double().reshape(27, 3, 3, 3)
    answers = built(impulses)[:, :, 2, 2]  # the one position whose taps meet all nine offsets in order
    torch.testing.assert_close(answers.T, W.flatten(1), rtol=0, atol=1e-10)


def test_padding_stride_and_dilation_sit_in_the_second_layer_and_outputs_come_back_in_order():
    group, _ = group_of(nn.Conv2d(4, 6, 3, 2, 1, dilation=2), (2, 4, 9, 9))
    first, second, order = Monochromatic(colours=3).skeleton(group)["layer"]
    assert (first.padding, first.stride, first.bias, first.groups) == ((0, 0), (1, 1), None, 1)
    assert (second.padding, second.stride, second.dilation, second.groups) == ((1, 1), (2, 2), (2, 2), 3)
    assert second.bias is not None
    assert isinstance(order, Reorder)
    assert len(Monochromatic(colours=3, reorders="").skeleton(group)["layer"]) == 2


@pytest.mark.parametrize("bias", [False, True])
def test_no_order_is_left_where_the_outputs_are_sorted_already(bias):
    conv = nn.Conv2d(4, 6, 3, bias=bias)
    net = taut.trace(sequential(layer=conv), torch.zeros(1, 4, 5, 5))
    plan = Plan.of(net, [Step(("layer",), "monochromatic", {"colours": 1, "metric": "frobenius"})])
    model = sequential(layer=conv)
    built = taut.apply(model, plan, taut.observe(net, model)).layer
    assert [type(part) for part in built] == [nn.Conv2d, nn.Conv2d]
    assert (built[1].bias is not None) == bias


@pytest.mark.parametrize("dims", KINDS)
def test_inputs_without_a_batch(dims):
    conv = KINDS[dims](8, 12, 3, padding=1).double()
    built, W, _ = rewritten(Monochromatic(colours=3), conv, statistics(conv))
    x = torch.randn(8, *SIZE[dims]).double()
    torch.testing.assert_close(built(x), with_kernel(conv, W)(x), rtol=0, atol=1e-9)


# Damage.


@pytest.mark.parametrize("metric", ["data", "fisher"])
@pytest.mark.parametrize("form", ["full", "channel"])
@pytest.mark.parametrize("fisher", [False, True], ids=["inputs alone", "with gradients"])
def test_damage_is_that_of_the_kernel_which_is_built(metric, form, fisher):
    conv = nn.Conv2d(6, 8, 3).double()
    stats = statistics(conv, fisher=fisher, form=form)
    for k in (1, 2, 8):
        method = Monochromatic(colours=k, metric=metric)
        built, _, factors = rewritten(method, conv, stats)
        assert method.damage(factors) == pytest.approx(brute_force(conv, built, stats), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("metric", ["mahalanobis", "frobenius"])
@pytest.mark.parametrize("fisher", [False, True], ids=["inputs alone", "with gradients"])
def test_damage_has_one_unit_whatever_metric_chose_the_factors(metric, fisher):
    """A planner compares it with the damages of other methods and metrics."""
    conv = nn.Conv2d(6, 8, 3).double()
    stats = statistics(conv, fisher=fisher)
    method = Monochromatic(colours=2, metric=metric)
    built, _, factors = rewritten(method, conv, stats)
    assert method.damage(factors) == pytest.approx(brute_force(conv, built, stats), rel=1e-6)


def test_each_metric_is_best_in_what_it_measures():
    conv = nn.Conv2d(6, 16, 3).double()
    stats = statistics(conv, fisher=True)
    loss, wrong = {}, {}
    for metric in ("data", "fisher", "mahalanobis", "frobenius"):
        built, W, _ = rewritten(Monochromatic(colours=4, metric=metric), conv, stats)
        loss[metric] = brute_force(conv, built, stats)
        dW = (conv.weight.detach().reshape(16, -1) - W.reshape(16, -1)).double()
        wrong[metric] = float((dW @ stats.weighting.full[0] @ dW.T).trace()), float(dW.square().sum())
    assert min(wrong, key=lambda metric: wrong[metric][0]) == "data"
    assert min(wrong, key=lambda metric: wrong[metric][1]) == "frobenius"
    assert max(loss["fisher"], loss["mahalanobis"]) < loss["frobenius"]


def test_more_colours_less_damage_and_none_where_every_filter_is_planted():
    conv = nn.Conv2d(6, 8, 3).double()
    stats = statistics(conv, fisher=True)
    factors = Monochromatic().factor({"c": conv}, {"c": stats})
    damages = [Monochromatic(colours=k).damage(factors) for k in (1, 2, 4, 8)]
    assert damages == sorted(damages, reverse=True)
    conv.weight.data = (conv.weight[:, :1, :1, :1] * conv.weight[:, :, :1, :1]) * conv.weight[:1, :1]
    assert Monochromatic(colours=8).damage(Monochromatic().factor({"c": conv}, {"c": stats})) <= 1e-12


# What is refused.


@pytest.mark.parametrize(
    ("layer", "size", "words"),
    [
        (nn.Conv2d(4, 4, 1), (2, 4, 5, 5), "kernel larger than 1"),
        (nn.Conv2d(1, 4, 3), (2, 1, 5, 5), "one input has one colour already"),
        (nn.Linear(4, 4), (2, 4), "kernel larger than 1"),
        (nn.Conv2d(4, 4, 3, groups=2), (2, 4, 5, 5), "grouped convolution are split already"),
    ],
    ids=lambda value: repr(value) if isinstance(value, nn.Module) else "",
)
def test_what_is_refused(layer, size, words):
    group, _ = group_of(layer, size)
    assert words in Monochromatic().refuses(group)


@pytest.mark.parametrize("colours", [0, -2, 5, 13, 24, None, 2.0, "2", True])
def test_colours_that_do_not_divide_are_named(colours):
    group, _ = group_of(nn.Conv2d(4, 12, 3), (2, 4, 5, 5))
    words = r"must be (between 1 and 12|a divisor of its 12 channels)"
    for call in (Monochromatic(colours=colours).cost, Monochromatic(colours=colours).skeleton):
        with pytest.raises(CallError, match=rf"'colours' of monochromatic on layer 'layer' {words}\. Got {colours} in"):
            call(group)


def test_paper_mode_knows_the_frobenius_norm_alone_and_metrics_are_checked():
    conv = nn.Conv2d(4, 8, 3)
    with pytest.raises(CallError, match=r"paper=True of monochromatic knows the metric 'frobenius' alone\. Got 'data'"):
        Monochromatic(colours=2, paper=True).factor({"c": conv}, {})
    with pytest.raises(
        CallError, match="'metric' of monochromatic must be one of data, fisher, mahalanobis, frobenius"
    ):
        Monochromatic(colours=2, metric="cosine").factor({"c": conv}, {})


def test_settings_make_families_and_plans_replace_them():
    assert Monochromatic(paper=True, metric="frobenius").family() != Monochromatic(metric="frobenius").family()
    assert Monochromatic(colours=2).family() == Monochromatic(colours=4).family()
    assert replace(Monochromatic(colours=2), reorders="").family() == Monochromatic().family()

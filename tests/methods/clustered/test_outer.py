"""Biclusters with outer products: the source's formulas, the kernel that is built, damage, nets, saved folders."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import taut
from cases import KERNEL, SIZE, sequential
from methods.kernels import brute_force, flavours, rewritten, statistics, turned, with_kernel
from methods.samples import check_costs, group_of, layers
from taut import CallError
from taut.decompose.outputs import OutputMoment
from taut.decompose.weighting import Weighting
from taut.methods.clustered.clusters import divisors
from taut.methods.clustered.outer import Outer
from taut.nn import Reorder
from taut.structure.statistics import LayerStatistics

KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


# Costs.


@settings(max_examples=40)
@given(layers(dims=(1, 2, 3)), st.data())
def test_cost_is_that_of_the_built_module(sample, data):
    module, size = sample
    group, x = group_of(module, size)
    if Outer().refuses(group) is None:
        G, H = (data.draw(st.sampled_from(divisors(size))) for size in group.layer.weight[1::-1])
        sides = sorted((group.layer.weight[1] // G, torch.Size(group.layer.kernel).numel(), group.layer.weight[0] // H))
        rank, left = data.draw(st.integers(1, sides[0] * sides[1])), data.draw(st.sampled_from(["", "i", "o", "io"]))
        check_costs(Outer(inputs=G, outputs=H, rank=rank, reorders=left), group, module, x)


@given(layers(dims=(1, 2, 3)))
def test_candidates_shrink(sample):
    module, size = sample
    group, _ = group_of(module, size)
    offered = Outer().candidates(group, None) if Outer().refuses(group) is None else []
    assert all(one.cost(group).lowers(group.cost) for one in offered)
    assert len(set(offered)) == len(offered)


def test_the_sources_second_layer():
    """Table 2: 5.3x published; the formula gives 6.88x at K = 6 and 5.16x at K = 8."""
    group, _ = group_of(nn.Conv2d(96, 256, 5, 1, 2, bias=False), (1, 96, 12, 12))
    for rank, fold in ((6, 6.88), (8, 5.16)):
        cost = Outer(inputs=48, outputs=2, rank=rank).cost(group)
        assert cost.params == cost.nonzero == 48 * 2 * rank * (96 // 48 + 25 + 256 // 2)
        assert cost.macs == 12 * 12 * cost.params
        assert group.cost.params / cost.params == pytest.approx(fold, abs=0.005)


def test_operations_before_a_stride_are_at_the_inputs_positions():
    """Table 1: G H K N M (C / G + X Y D^-2 + F / H D^-2)."""
    group, _ = group_of(nn.Conv2d(8, 12, 3, 2, 1, bias=False), (1, 8, 16, 16))
    cost = Outer(inputs=4, outputs=3, rank=2).cost(group)
    assert cost.macs == 4 * 3 * 2 * (16 * 16 * 2 + 8 * 8 * (9 + 4))


def test_candidates_of_a_usual_layer_offer_small_input_clusters():
    group, _ = group_of(nn.Conv2d(16, 32, 3, bias=False), (1, 16, 8, 8))
    offered = Outer().candidates(group, None)
    assert {(16 // one.inputs, one.outputs) for one in offered} == {(2, 1), (2, 2), (4, 1), (4, 2)}
    costs = [one.cost(group).params / group.cost.params for one in offered]
    assert min(costs) < 0.2
    assert max(costs) > 0.7


# What is built.


MODES = {
    "default": {},
    "euclidean": {"distance": "euclidean"},
    "paper": {"metric": "frobenius", "paper": True},
}


@pytest.mark.parametrize("mode", ["default", "paper"])
@pytest.mark.parametrize(("G", "H"), [(4, 1), (1, 3), (4, 3)])
@pytest.mark.parametrize(("dims", "flavour"), list(flavours())[::3])
def test_the_built_layers_compute_the_fitted_kernel(dims, flavour, G, H, mode):
    conv = KINDS[dims](**({"in_channels": 8, "out_channels": 12, "kernel_size": KERNEL} | flavour)).double()
    method = Outer(inputs=G, outputs=H, rank=2, **MODES[mode])
    built, W, _ = rewritten(method, conv, statistics(conv))
    x = torch.randn(2, 8, *SIZE[dims]).double()
    torch.testing.assert_close(built(x), with_kernel(conv, W)(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rank", [1, 9, 24])
def test_every_rank_within_the_limits_is_built(mode, rank):
    """Up to the product of the two smaller sides of a block."""
    conv = nn.Conv2d(8, 12, 3).double()
    built, W, _ = rewritten(Outer(inputs=2, outputs=2, rank=rank, **MODES[mode]), conv)
    x = torch.randn(2, 8, 5, 5).double()
    torch.testing.assert_close(built(x), with_kernel(conv, W)(x), rtol=0, atol=1e-8)
    if rank == 24:
        limit = 0.2 if mode == "paper" else 1e-2
        assert float((W - conv.weight.detach().flatten(2)).norm()) <= limit * float(conv.weight.detach().norm())


@pytest.mark.parametrize("mode", MODES)
def test_planted_blocks_are_found(mode):
    """Clusters in shuffled order, one term per block."""
    rows, columns = torch.arange(3).repeat(4)[torch.randperm(12)], torch.arange(2).repeat(4)[torch.randperm(8)]
    blocks = torch.randn(3, 2, 3, 3).double()[rows][:, columns]
    conv = nn.Conv2d(8, 12, 3).double()
    conv.weight.data = blocks * (1 + torch.rand(12, 1, 1, 1)) * (1 + torch.rand(1, 8, 1, 1))
    _, W, factors = rewritten(Outer(inputs=2, outputs=3, rank=1, **MODES[mode]), conv, statistics(conv))
    if mode != "euclidean":  # lengths differ: only lines are alike
        torch.testing.assert_close(W.reshape(conv.weight.shape), conv.weight.detach(), rtol=0, atol=1e-5)
        assert Outer(inputs=2, outputs=3, rank=1, **MODES[mode]).damage(factors) <= 1e-8


def test_paper_mode_makes_no_use_of_the_data():
    conv = nn.Conv2d(8, 12, 3).double()
    method = Outer(inputs=2, outputs=3, rank=2, **MODES["paper"])
    torch.testing.assert_close(rewritten(method, conv, statistics(conv))[1], rewritten(method, conv)[1])


def test_padding_stride_and_dilation_sit_in_the_middle_layer_between_two_orders():
    group, _ = group_of(nn.Conv2d(4, 6, 3, 2, 1, dilation=2), (2, 4, 9, 9))
    chain = Outer(inputs=2, outputs=3, rank=2).skeleton(group)["layer"]
    before, first, shuffle, middle, last, behind = chain
    assert isinstance(before, Reorder)
    assert isinstance(behind, Reorder)
    assert isinstance(shuffle, nn.ChannelShuffle)
    assert (first.padding, first.stride, first.bias, first.groups) == ((0, 0), (1, 1), None, 2)
    assert (middle.padding, middle.stride, middle.dilation, middle.bias) == ((1, 1), (2, 2), (2, 2), None)
    assert middle.groups == middle.in_channels == middle.out_channels == 12
    assert (last.padding, last.stride, last.bias is None, last.groups) == ((0, 0), (1, 1), False, 3)
    for sides in ("", "i", "o"):
        parts = list(Outer(inputs=2, outputs=3, rank=2, reorders=sides).skeleton(group)["layer"])
        assert isinstance(parts[0], Reorder) == (sides == "i")
        assert isinstance(parts[-1], Reorder) == (sides == "o")


def test_calls_without_a_batch_are_refused():
    net = taut.trace(sequential(layer=nn.Conv2d(4, 8, 3)), torch.randn(4, 6, 6))
    assert "needs inputs with a batch" in Outer().refuses(net.group(["layer"]))


# Damage.


@pytest.mark.parametrize("metric", ["data", "fisher"])
@pytest.mark.parametrize("form", ["full", "channel"])
@pytest.mark.parametrize("fisher", [False, True], ids=["inputs alone", "with gradients"])
def test_damage_is_that_of_the_kernel_which_is_built(metric, form, fisher):
    conv = nn.Conv2d(6, 8, 3).double()
    stats = statistics(conv, fisher=fisher, form=form)
    for rank in (1, 2, 5):
        method = Outer(inputs=2, outputs=2, rank=rank, metric=metric)
        built, _, factors = rewritten(method, conv, stats)
        assert method.damage(factors) == pytest.approx(brute_force(conv, built, stats), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("metric", ["mahalanobis", "frobenius"])
@pytest.mark.parametrize("fisher", [False, True], ids=["inputs alone", "with gradients"])
def test_damage_has_one_unit_whatever_metric_chose_the_factors(metric, fisher):
    """A planner compares it with the damages of other methods and metrics."""
    conv = nn.Conv2d(6, 8, 3).double()
    stats = statistics(conv, fisher=fisher)
    method = Outer(inputs=2, outputs=2, rank=2, metric=metric)
    built, _, factors = rewritten(method, conv, stats)
    assert method.damage(factors) == pytest.approx(brute_force(conv, built, stats), rel=1e-6)


def test_each_metric_is_best_in_what_it_measures():
    conv = nn.Conv2d(8, 16, 3).double()
    A, B = (turn @ torch.diag(torch.logspace(2, -2, len(turn)).double()) @ turn.T for turn in map(turned, (72, 16)))
    stats = LayerStatistics(Weighting(full=A[None]), OutputMoment(B[None]), positions=5.0)
    loss, wrong = {}, {}
    for metric in ("data", "fisher", "mahalanobis", "frobenius"):
        method = Outer(inputs=2, outputs=2, rank=3, metric=metric)
        built, W, _ = rewritten(method, conv, stats)
        loss[metric] = brute_force(conv, built, stats)
        dW = (conv.weight.detach().reshape(16, -1) - W.reshape(16, -1)).double()
        wrong[metric] = float((dW @ stats.weighting.full[0] @ dW.T).trace()), float(dW.square().sum())
    assert wrong["data"][0] < min(wrong["mahalanobis"][0], wrong["frobenius"][0])  # fits are local: "fisher" may win
    assert min(wrong, key=lambda metric: wrong[metric][1]) == "frobenius"
    assert min(loss, key=loss.get) == "fisher"


def test_more_terms_less_damage():
    conv = nn.Conv2d(8, 12, 3).double()
    factors = Outer().factor({"c": conv}, {"c": statistics(conv, fisher=True)})
    damages = [Outer(inputs=2, outputs=2, rank=r).damage(factors) for r in (1, 2, 4, 8)]
    assert damages == sorted(damages, reverse=True)


@pytest.mark.parametrize("seed", range(3))
def test_the_default_beats_the_sources_way_on_the_weights_too(seed):
    """Terms fitted together, and the last layer at once."""
    torch.manual_seed(seed)
    conv = nn.Conv2d(16, 24, 3).double()
    W, wrong = conv.weight.detach().flatten(2), {}
    for paper in (False, True):
        method = Outer(inputs=4, outputs=2, rank=4, metric="frobenius", paper=paper)
        wrong[paper] = float((W - rewritten(method, conv)[1]).norm())
    assert wrong[False] < wrong[True]


# What is refused.


@pytest.mark.parametrize(
    ("layer", "size", "words"),
    [
        (nn.Conv2d(4, 4, 1), (2, 4, 5, 5), "kernel larger than 1"),
        (nn.Linear(4, 4), (2, 4), "kernel larger than 1"),
        (nn.Conv2d(4, 4, 3, groups=2), (2, 4, 5, 5), "grouped convolution are split already"),
    ],
    ids=lambda value: repr(value) if isinstance(value, nn.Module) else "",
)
def test_what_is_refused(layer, size, words):
    group, _ = group_of(layer, size)
    assert words in Outer().refuses(group)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inputs": 3}, r"'inputs' of outer on layer 'layer' must be a divisor of its 8 channels\. Got 3 instead"),
        ({"inputs": 0}, r"'inputs' of outer on layer 'layer' must be a divisor of its 8 channels\. Got 0 instead"),
        (
            {"outputs": 5},
            r"'outputs' of outer on layer 'layer' must be a divisor of its 12 channels\. Got 5 instead",
        ),
        ({"outputs": None}, r"'outputs' of outer .* a divisor of its 12 channels\. Got None instead"),
        ({"outputs": "2"}, r"'outputs' of outer .* a divisor of its 12 channels\. Got 2 instead"),
        ({"rank": 17}, r"'rank' of outer on layer 'layer' must be between 1 and 16\. Got 17 instead"),
        ({"rank": 0}, r"'rank' of outer on layer 'layer' must be between 1 and 16\. Got 0 instead"),
        ({"rank": None}, r"'rank' of outer on layer 'layer' must be between 1 and 16\. Got None instead"),
    ],
)
def test_settings_that_do_not_fit_are_named(change, words):
    group, _ = group_of(nn.Conv2d(8, 12, 3), (2, 8, 5, 5))
    method = Outer(**({"inputs": 2, "outputs": 3, "rank": 2} | change))
    for call in (method.cost, method.skeleton):
        with pytest.raises(CallError, match=words):
            call(group)


def test_unknown_metrics_and_distances_are_named():
    conv, made = nn.Conv2d(4, 8, 3), {"inputs": 2, "outputs": 2, "rank": 1}
    with pytest.raises(CallError, match=r"paper=True of outer knows the metric 'frobenius' alone\. Got 'data'"):
        Outer(paper=True, **made).factor({"c": conv}, {})
    with pytest.raises(CallError, match="'metric' of outer must be one of data, fisher, mahalanobis, frobenius"):
        Outer(metric="cosine", **made).factor({"c": conv}, {})
    method = Outer(distance="cosine", **made)
    with pytest.raises(CallError, match="'distance' must be one of euclidean, projection"):
        method.damage(method.factor({"c": conv}, {}))


def test_settings_make_families():
    families = [one.family() for one in (Outer(), Outer(distance="euclidean"), Outer(metric="fisher"))]
    families.append(Outer(paper=True, metric="frobenius").family())
    assert len(set(families)) == len(families)
    assert Outer(inputs=2, outputs=4, rank=3).family() == Outer().family()

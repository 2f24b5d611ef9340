"""Biclusters with two SVDs: the source's formulas, the kernel that is built, damage, whole nets, saved folders."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import taut
from cases import KERNEL, SIZE
from methods.kernels import brute_force, flavours, rewritten, statistics, turned, with_kernel
from methods.samples import group_of, layers, measured
from taut import CallError, Plan, Step
from taut.decompose.outputs import OutputMoment
from taut.decompose.weighting import Weighting
from taut.methods.clustered.bicluster import Bicluster
from taut.methods.clustered.clusters import divisors
from taut.nn import Reorder
from taut.structure.statistics import LayerStatistics

KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


# Costs.


def resolved(layer, draw):
    """Clusters and ranks within their limits."""
    G, H = draw(st.sampled_from(divisors(layer.weight[1]))), draw(st.sampled_from(divisors(layer.weight[0])))
    taps = torch.Size(layer.kernel).numel()
    i = draw(st.integers(1, min(layer.weight[1] // G, layer.weight[0] // H * taps)))
    o = draw(st.integers(1, min(layer.weight[0] // H, i * taps)))
    return Bicluster(inputs=G, outputs=H, rank_in=i, rank_out=o, reorders=draw(st.sampled_from(["", "o"])))


@given(layers(dims=(1, 2, 3)), st.data())
def test_cost_is_that_of_the_built_module(sample, data):
    """All but one in G of the first layer's weights start at zero: `nonzero` leaves them out, all else counts them."""
    module, size = sample
    group, x = group_of(module, size)
    if Bicluster().refuses(group) is None:
        method = resolved(group.layer, data.draw)
        built, cost = method.skeleton(group)["layer"], method.cost(group)
        assert built(x).shape == module(x).shape
        found = measured(built, x)
        assert (cost.params, cost.macs, cost.bytes) == (found.params, found.macs, found.bytes)
        filled = method.rewrite({"layer": module}, method.factor({"layer": module}, {})).modules["layer"]
        first = next(part for part in filled if isinstance(part, type(module))).weight
        own = {int(row.count_nonzero()) for row in first.detach().flatten(1)}
        assert max(own) <= group.layer.weight[1] // method.inputs
        assert cost.params - cost.nonzero == first.numel() - first.numel() // method.inputs


@given(layers(dims=(1, 2, 3)))
def test_candidates_shrink(sample):
    module, size = sample
    group, _ = group_of(module, size)
    offered = Bicluster().candidates(group, None) if Bicluster().refuses(group) is None else []
    assert all(one.cost(group).lowers(group.cost) for one in offered)
    assert len(set(offered)) == len(offered)


def test_the_sources_second_layer():
    """Table 2: 3.9x published; 9.98x by its formula, 9.43x with the zeros of a dense first layer."""
    group, _ = group_of(nn.Conv2d(96, 256, 5, 1, 2, bias=False), (1, 96, 12, 12))
    cost = Bicluster(inputs=2, outputs=2, rank_in=19, rank_out=24).cost(group)
    kernel, last = 4 * 19 * 25 * 24, 4 * 24 * 128
    assert cost.nonzero == 4 * 48 * 19 + kernel + last
    assert cost.params == 96 * 4 * 19 + kernel + last
    assert cost.macs == 12 * 12 * cost.params
    assert group.cost.params / cost.nonzero == pytest.approx(9.98, abs=0.005)
    assert group.cost.params / cost.params == pytest.approx(9.43, abs=0.005)
    wide = Bicluster(inputs=2, outputs=2, rank_in=19, rank_out=64).cost(group)
    assert group.cost.params / wide.nonzero == pytest.approx(3.89, abs=0.005)


def test_operations_before_a_stride_are_at_the_inputs_positions():
    """Table 1: G H N M (C / G K1 + K1 X Y K2 D^-2 + K2 F / H D^-2), the first term here with its zeros."""
    group, _ = group_of(nn.Conv2d(8, 12, 3, 2, 1, bias=False), (1, 8, 16, 16))
    cost = Bicluster(inputs=2, outputs=3, rank_in=2, rank_out=3).cost(group)
    assert cost.macs == 16 * 16 * 8 * 6 * 2 + 8 * 8 * (6 * 2 * 9 * 3 + 6 * 3 * 4)


def test_candidates_of_a_usual_layer_offer_two_and_four_clusters():
    group, _ = group_of(nn.Conv2d(16, 32, 3, bias=False), (1, 16, 8, 8))
    offered = Bicluster().candidates(group, None)
    assert {(one.inputs, one.outputs) for one in offered} == {(2, 2), (4, 4)}
    costs = [one.cost(group).params / group.cost.params for one in offered]
    assert min(costs) < 0.1
    assert max(costs) > 0.7


# What is built.


MODES = {
    "default": {},
    "euclidean": {"distance": "euclidean"},
    "paper": {"metric": "frobenius", "paper": True},
    "outputs first": {"metric": "frobenius", "paper": True, "outputs_first": True},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dims", "flavour"), list(flavours()))
def test_the_built_layers_compute_the_fitted_kernel(dims, flavour, mode):
    conv = KINDS[dims](**({"in_channels": 8, "out_channels": 12, "kernel_size": KERNEL} | flavour)).double()
    method = Bicluster(inputs=2, outputs=3, rank_in=3, rank_out=2, **MODES[mode])
    built, W, _ = rewritten(method, conv, statistics(conv))
    x = torch.randn(2, 8, *SIZE[dims]).double()
    torch.testing.assert_close(built(x), with_kernel(conv, W)(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ranks", [(1, 1), (10, 1), (1, 6), (10, 6), (4, 2)])
def test_every_rank_within_the_limits_is_built(mode, ranks):
    """Up to min(C / G, S F / H) before the kernel and min(F / H, S K1) behind it; outputs first the other way round."""
    conv = nn.Conv2d(20, 12, 3).double()
    method = Bicluster(inputs=2, outputs=2, rank_in=ranks[0], rank_out=ranks[1], **MODES[mode])
    if method.outputs_first and ranks == (10, 1):
        with pytest.raises(CallError, match=r"'rank_in' of bicluster.*between 1 and 9. Got 10"):
            rewritten(method, conv)
        return
    built, W, _ = rewritten(method, conv)
    x = torch.randn(2, 20, 5, 5).double()
    torch.testing.assert_close(built(x), with_kernel(conv, W)(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_full_ranks_are_exact(mode):
    conv = nn.Conv2d(8, 12, 3).double()
    method = Bicluster(inputs=2, outputs=3, rank_in=4, rank_out=4, **MODES[mode])
    built, W, _ = rewritten(method, conv, statistics(conv))
    torch.testing.assert_close(W.reshape(conv.weight.shape), conv.weight.detach(), rtol=0, atol=1e-8)
    x = torch.randn(2, 8, 5, 5).double()
    torch.testing.assert_close(built(x), conv(x), rtol=0, atol=1e-8)


def test_paper_mode_makes_no_use_of_the_data():
    conv = nn.Conv2d(8, 12, 3).double()
    method = Bicluster(inputs=2, outputs=3, rank_in=2, rank_out=2, **MODES["paper"])
    torch.testing.assert_close(rewritten(method, conv, statistics(conv))[1], rewritten(method, conv)[1])


def test_padding_stride_and_dilation_sit_in_the_core_and_outputs_come_back_in_order():
    group, _ = group_of(nn.Conv2d(4, 6, 3, 2, 1, dilation=2), (2, 4, 9, 9))
    chain = Bicluster(inputs=2, outputs=3, rank_in=2, rank_out=1).skeleton(group)["layer"]
    first, core, last, order = chain
    assert (first.padding, first.stride, first.bias, first.groups) == ((0, 0), (1, 1), None, 1)
    assert (core.padding, core.stride, core.dilation, core.bias, core.groups) == ((1, 1), (2, 2), (2, 2), None, 6)
    assert (last.padding, last.stride, last.bias is None, last.groups) == ((0, 0), (1, 1), False, 3)
    assert isinstance(order, Reorder)


def test_outer_factors_are_orthogonal():
    conv = nn.Conv2d(8, 12, 3).double()
    built, _, _ = rewritten(Bicluster(inputs=2, outputs=2, rank_in=3, rank_out=3), conv, statistics(conv))
    first = built[0].weight.detach().flatten(1).reshape(4, 3, 8)
    gram = first @ first.mT
    torch.testing.assert_close(gram, torch.diag_embed(gram.diagonal(dim1=1, dim2=2)), rtol=0, atol=1e-8)


@pytest.mark.parametrize("dims", KINDS)
def test_inputs_without_a_batch(dims):
    conv = KINDS[dims](8, 12, 3, padding=1).double()
    built, W, _ = rewritten(Bicluster(inputs=2, outputs=3, rank_in=3, rank_out=2), conv, statistics(conv))
    x = torch.randn(8, *SIZE[dims]).double()
    torch.testing.assert_close(built(x), with_kernel(conv, W)(x), rtol=0, atol=1e-9)


# Damage.


@pytest.mark.parametrize("metric", ["data", "fisher"])
@pytest.mark.parametrize("form", ["full", "channel"])
@pytest.mark.parametrize("fisher", [False, True], ids=["inputs alone", "with gradients"])
def test_damage_is_that_of_the_kernel_which_is_built(metric, form, fisher):
    conv = nn.Conv2d(6, 8, 3).double()
    stats = statistics(conv, fisher=fisher, form=form)
    for i, o in ((1, 1), (2, 3), (3, 2)):
        method = Bicluster(inputs=2, outputs=2, rank_in=i, rank_out=o, metric=metric)
        built, _, factors = rewritten(method, conv, stats)
        assert method.damage(factors) == pytest.approx(brute_force(conv, built, stats), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("metric", ["mahalanobis", "frobenius"])
@pytest.mark.parametrize("fisher", [False, True], ids=["inputs alone", "with gradients"])
def test_damage_has_one_unit_whatever_metric_chose_the_factors(metric, fisher):
    """A planner compares it with the damages of other methods and metrics."""
    conv = nn.Conv2d(6, 8, 3).double()
    stats = statistics(conv, fisher=fisher)
    method = Bicluster(inputs=2, outputs=2, rank_in=2, rank_out=2, metric=metric)
    built, _, factors = rewritten(method, conv, stats)
    assert method.damage(factors) == pytest.approx(brute_force(conv, built, stats), rel=1e-6)


def test_each_metric_is_best_in_what_it_measures():
    conv = nn.Conv2d(8, 16, 3).double()
    A, B = (turn @ torch.diag(torch.logspace(2, -2, len(turn)).double()) @ turn.T for turn in map(turned, (72, 16)))
    stats = LayerStatistics(Weighting(full=A[None]), OutputMoment(B[None]), positions=5.0)
    loss, wrong = {}, {}
    for metric in ("data", "fisher", "mahalanobis", "frobenius"):
        method = Bicluster(inputs=2, outputs=2, rank_in=2, rank_out=3, metric=metric)
        built, W, _ = rewritten(method, conv, stats)
        loss[metric] = brute_force(conv, built, stats)
        dW = (conv.weight.detach().reshape(16, -1) - W.reshape(16, -1)).double()
        wrong[metric] = float((dW @ stats.weighting.full[0] @ dW.T).trace()), float(dW.square().sum())
    assert min(wrong, key=lambda metric: wrong[metric][0]) == "data"
    assert min(wrong, key=lambda metric: wrong[metric][1]) == "frobenius"
    assert min(loss, key=loss.get) == "fisher"


def test_more_rank_less_damage_and_none_at_full_rank():
    conv = nn.Conv2d(8, 12, 3).double()
    factors = Bicluster().factor({"c": conv}, {"c": statistics(conv, fisher=True)})
    made = [Bicluster(inputs=2, outputs=2, rank_in=r, rank_out=r) for r in (1, 2, 3, 4)]
    full = Bicluster(inputs=2, outputs=2, rank_in=4, rank_out=6)
    damages = [one.damage(factors) for one in (*made, full)]
    assert damages == sorted(damages, reverse=True)
    assert damages[-1] <= 1e-9 * damages[0]


@pytest.mark.parametrize("seed", range(3))
def test_the_default_beats_the_sources_way_on_the_weights_too(seed):
    """The first SVD and clusters are alike: what is gained is the second SVD's and the last solve's."""
    torch.manual_seed(seed)
    conv = nn.Conv2d(16, 24, 3).double()
    W, wrong = conv.weight.detach().flatten(2), {}
    for mode in ("paper", "outputs first", "default"):
        settings = {"metric": "frobenius"} | MODES[mode]
        method = Bicluster(inputs=2, outputs=2, rank_in=3, rank_out=4, **settings)
        wrong[mode] = float((W - rewritten(method, conv)[1]).norm())
    assert wrong["default"] < min(wrong["paper"], wrong["outputs first"])


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
    assert words in Bicluster().refuses(group)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inputs": 3}, r"'inputs' of bicluster on layer 'layer' must be a divisor of its 8 channels\. Got 3 instead"),
        ({"inputs": 0}, r"'inputs' of bicluster on layer 'layer' must be a divisor of its 8 channels\. Got 0 instead"),
        (
            {"outputs": 5},
            r"'outputs' of bicluster on layer 'layer' must be a divisor of its 12 channels\. Got 5 instead",
        ),
        ({"outputs": None}, r"'outputs' of bicluster .* a divisor of its 12 channels\. Got None instead"),
        ({"outputs": "2"}, r"'outputs' of bicluster .* a divisor of its 12 channels\. Got 2 instead"),
        ({"rank_in": 5}, r"'rank_in' of bicluster on layer 'layer' must be between 1 and 4\. Got 5 instead"),
        ({"rank_in": 0}, r"'rank_in' of bicluster on layer 'layer' must be between 1 and 4\. Got 0 instead"),
        ({"rank_out": 5}, r"'rank_out' of bicluster on layer 'layer' must be between 1 and 4\. Got 5 instead"),
        ({"rank_out": True}, r"'rank_out' of bicluster on layer 'layer' must be between 1 and 4\. Got True instead"),
    ],
)
def test_settings_that_do_not_fit_are_named(change, words):
    group, _ = group_of(nn.Conv2d(8, 12, 3), (2, 8, 5, 5))
    method = Bicluster(**({"inputs": 2, "outputs": 3, "rank_in": 2, "rank_out": 2} | change))
    for call in (method.cost, method.skeleton):
        with pytest.raises(CallError, match=words):
            call(group)


def test_unknown_metrics_and_distances_are_named():
    conv, made = nn.Conv2d(4, 8, 3), {"inputs": 2, "outputs": 2, "rank_in": 1, "rank_out": 1}
    with pytest.raises(CallError, match=r"paper=True of bicluster knows the metric 'frobenius' alone\. Got 'data'"):
        Bicluster(paper=True, **made).factor({"c": conv}, {})
    with pytest.raises(CallError, match="'metric' of bicluster must be one of data, fisher, mahalanobis, frobenius"):
        Bicluster(metric="cosine", **made).factor({"c": conv}, {})
    method = Bicluster(distance="cosine", **made)
    with pytest.raises(CallError, match="'distance' must be one of euclidean, projection"):
        method.damage(method.factor({"c": conv}, {}))


def test_settings_make_families():
    plain_, base = Bicluster(), {"paper": True, "metric": "frobenius"}
    families = [one.family() for one in (plain_, Bicluster(distance="euclidean"), Bicluster(metric="fisher"))]
    families += [Bicluster(**base).family(), Bicluster(**base, outputs_first=True).family()]
    assert len(set(families)) == len(families)
    assert Bicluster(inputs=2, outputs=4, rank_in=3, rank_out=1).family() == plain_.family()


def test_a_later_step_inside_the_chain_is_saved_and_loaded(tmp_path):
    """An order that is left at a residual connection, and one of the chain's layers factorized once more."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 4)

        def forward(self, x):
            x = self.first(x).relu()
            return self.last((x + self.second(x)).mean((2, 3)))

    model, x = Residual().eval(), torch.randn(4, 3, 9, 9)
    net = taut.trace(model, x)
    settings = {"inputs": 2, "outputs": 2, "rank_in": 3, "rank_out": 3}
    small = taut.apply(model, Plan.of(net, [Step(("second",), "bicluster", settings)]), taut.observe(net, model, [x]))
    inner = taut.trace(small, x)
    assert isinstance(small.second[-1], Reorder)
    plan = Plan.of(inner, [Step(("second.0",), "svd", {"rank": 4}, allow_growth=True)])
    smaller = taut.apply(small, plan, taut.observe(inner, small))
    first = Plan.of(net, [Step(("second",), "bicluster", settings)]).steps[0]
    step = copy.deepcopy(plan.steps[0])
    both = Plan((first, Step(("second",), step.method, step.settings, _renamed(step.group, "second"))))
    taut.save(smaller, both, tmp_path / "small")
    again = taut.load(tmp_path / "small", base=Residual)
    with torch.no_grad():
        assert torch.equal(again(x), smaller(x))


def _renamed(group, name):
    return type(group)(tuple(replace(layer, name=name) for layer in group.layers))

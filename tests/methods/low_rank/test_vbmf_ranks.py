"""Ranks that the weights decide: planted ones come back, at the time of the step, and every record holds them."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

import taut
from cases import run, sequential, untouched
from methods.samples import group_of
from taut import CallError, Plan, Stage, Step
from taut.decompose.vbmf import evbmf
from taut.methods import METHODS, resolve
from taut.methods.low_rank.svd import SVD
from taut.methods.low_rank.tucker import Tucker
from taut.methods.low_rank.vbmf_ranks import built_ranks, scaled
from taut.planning.application import apply_plan
from taut.training.finetuning import Finetune, carry_out
from taut.types import Automatic


def low(o, c, s, r_out, r_in, noise=0.02):
    """A kernel (o, c, s) of Tucker ranks r_out, r_in, and noise far below it."""
    U, V = (torch.linalg.qr(torch.randn(size, rank))[0] for size, rank in ((o, r_out), (c, r_in)))
    return torch.einsum("oq,qrs,cr->ocs", U, torch.randn(r_out, r_in, s), V) + noise * torch.randn(o, c, s)


def build():
    return sequential(
        stem=nn.Conv2d(3, 24, 3, padding=1),
        act=nn.ReLU(),
        conv=nn.Conv2d(24, 32, 3, padding=1),
        act2=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(),
        fc=nn.Linear(32, 24),
    )


class Planted:
    """A net whose `conv` has Tucker ranks 5 and 6, whose `fc` has rank 4, and whose `stem` is noise."""

    def __init__(self):
        torch.manual_seed(3)
        self.model = build().eval()
        self.model.conv.weight.data = low(32, 24, 9, 6, 5).reshape(32, 24, 3, 3)
        self.model.fc.weight.data = low(24, 32, 1, 4, 4)[..., 0]
        self.data = [torch.randn(8, 3, 6, 6) for _ in range(2)]
        self.net = taut.trace(self.model, self.data[0][:2])
        self.stats = taut.observe(self.net, self.model, self.data)

    def plan(self, *steps):
        return Plan.of(self.net, steps)


CONV, FC = Step(("conv",), "tucker", {"vbmf": 1.0}), Step(("fc",), "svd", {"vbmf": 1.0})


@pytest.fixture
def net():
    return Planted()


# The ranks.


def test_planted_ranks_come_back_and_the_knob_scales_them(net):
    modules = {"conv": net.model.conv}
    for knob, ranks in (
        (1, (5, 6)),
        (1.5, (8, 9)),
        (0.5, (2, 3)),
        (0.01, (1, 1)),
        (100.0, (24, 32)),
        (1e308, (24, 32)),
    ):
        method = Tucker(vbmf=knob)
        assert method.decided(modules) == replace(method, rank_in=ranks[0], rank_out=ranks[1])
        assert SVD(vbmf=knob).decided(modules) == SVD(rank=ranks[1], vbmf=knob)
    assert SVD(vbmf=1).decided({"fc": net.model.fc}).rank == 4


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_in_groups_the_one_that_needs_most_decides(kind, groups):
    conv = kind(24 * groups, 32 * groups, 3, groups=groups)
    size = conv.weight[0, 0].numel()
    kernels = [low(32, 24, size, r_out, r_in) for r_out, r_in in ((6, 4), (3, 5))[:groups]]
    conv.weight.data = torch.cat(kernels).reshape(conv.weight.shape)
    most = (6, 4) if groups == 1 else (6, 5)
    found = Tucker(vbmf=1.0).decided({"c": conv})
    assert (found.rank_out, found.rank_in) == most
    assert SVD(vbmf=1.0).decided({"c": conv}).rank == most[0]


@pytest.mark.parametrize("fill", [0.0, None], ids=["zeros", "noise"])
def test_what_is_no_more_than_noise_keeps_one_component(fill):
    conv, fc = nn.Conv2d(12, 16, 3), nn.Linear(16, 12)
    for layer in (conv, fc):
        nn.init.normal_(layer.weight) if fill is None else nn.init.constant_(layer.weight, fill)
    found = Tucker(vbmf=1.0).decided({"c": conv})
    assert (found.rank_in, found.rank_out) == (1, 1)
    assert SVD(vbmf=2.0).decided({"f": fc}).rank == 1


def test_given_ranks_are_left_alone(net):
    for method in (Tucker(3, 4, vbmf=1.0), Tucker(3, 4), Tucker(), SVD(3, vbmf=2.0), SVD()):
        assert isinstance(method, Automatic)
        assert method.decided({"conv": net.model.conv}) is method
    assert not isinstance(METHODS["cp"](), Automatic)


def test_scaled_is_rounded_and_clamped():
    assert [scaled(k, 6, 20) for k in (None, 1, 1.4, 0.01, 9)] == [6, 6, 8, 1, 20]
    assert scaled(3.0, 0, 20) == 1


@pytest.mark.parametrize("method", [Tucker(vbmf=1.0), SVD(vbmf=1.0)], ids=lambda m: m.name)
def test_until_the_weights_decide_the_cost_is_the_layers_own_and_the_planner_chooses_freely(method, net):
    group = net.net.group(["conv"])
    assert method.cost(group) == group.cost
    plain = METHODS[method.name]()
    offered = method.candidates(group, None)
    assert offered == plain.candidates(group, None)
    assert offered


# Errors.


@pytest.mark.parametrize("bad", [0, -1.0, float("nan"), float("inf"), True, "1"])
@pytest.mark.parametrize("method", [SVD, Tucker])
def test_a_knob_that_is_no_number_above_zero_is_refused(method, bad, net):
    group = net.net.group(["conv"])
    given = {"rank": 3} if method is SVD else {"rank_in": 3, "rank_out": 3}
    for settings in ({}, given):
        with pytest.raises(CallError, match=rf"'vbmf' of {method.name} must be a number above 0\. Got {bad!r}"):
            method(vbmf=bad, **settings).cost(group)
    step = Step(("conv",), method.name, {"vbmf": bad})
    with untouched(net.model), pytest.raises(CallError, match="must be a number above 0"):
        taut.apply(net.model, net.plan(step), net.stats)


def test_one_rank_beside_the_knob_is_refused():
    group, _ = group_of(nn.Conv2d(4, 6, 3), (2, 4, 5, 5))
    with pytest.raises(CallError, match=r"'rank_out' of tucker must be given together.*Got rank_in=2, rank_out=None"):
        Tucker(rank_in=2, vbmf=1.0).cost(group)
    with pytest.raises(CallError, match=r"'rank_in' of tucker must be given together"):
        Tucker(rank_out=2, vbmf=1.0).decided({"c": nn.Conv2d(4, 6, 3)})


# Steps, plans, folders.


@pytest.mark.parametrize("refit", [False, True], ids=["bare", "refit"])
def test_apply_writes_the_ranks_into_the_plan_and_builds_them(net, refit, tmp_path):
    plan = net.plan(CONV, FC)
    with untouched(net.model):
        small, done = apply_plan(net.model, plan, net.stats, net.data if refit else None)
    assert [step.settings for step in done.steps] == [
        {"rank_in": 5, "rank_out": 6, "metric": "data", "vbmf": 1.0},
        {"rank": 4, "metric": "data", "vbmf": 1.0},
    ]
    assert [part.weight.shape[0] for part in small.conv] == [5, 6, 32]
    assert [part.weight.shape[0] for part in small.fc] == [4, 24]
    for step in done.steps:
        assert step.after.params == sum(p.numel() for p in small.get_submodule(step.layers[0]).parameters())
    assert Plan.from_json(done.to_json()) == done
    again = taut.apply(net.model, Plan.from_json(done.to_json()), net.stats, net.data if refit else None)
    assert all(torch.equal(a, b) for a, b in zip(small.state_dict().values(), again.state_dict().values(), strict=True))
    for name, saved in (("resolved", done), ("as_asked", Plan.from_json(plan.to_json()))):
        taut.save(small, saved, tmp_path / name)
        written = json.loads((tmp_path / name / "manifest.json").read_text())
        assert '"rank_in": 5' in json.dumps(written)
        loaded = taut.load(tmp_path / name, base=build)
        assert all(torch.equal(a, b) for a, b in zip(run(loaded, net.data[0]), run(small, net.data[0]), strict=True))


def test_metrics_and_growth_go_with_it(net):
    step = Step(("conv",), "tucker", {"vbmf": 50.0, "metric": "frobenius"}, allow_growth=True)
    small, done = apply_plan(net.model, net.plan(step), net.stats)
    assert done.steps[0].settings == {"rank_in": 24, "rank_out": 32, "metric": "frobenius", "vbmf": 50.0}
    torch.testing.assert_close(small(net.data[0]), net.model(net.data[0]), rtol=1e-4, atol=1e-4)


def test_a_layer_that_would_not_shrink_is_kept_with_its_reason_and_no_warning(net, tmp_path):
    wide = [replace(step, settings={"vbmf": 50.0}) for step in (CONV, FC)]
    plan = net.plan(*wide, Step(("stem",), "svd", {"vbmf": 1.0}))
    with untouched(net.model), warnings.catch_warnings():
        warnings.simplefilter("error")
        small, done = apply_plan(net.model, plan, net.stats)
    assert [step.layers for step in done.steps] == [("stem",)]
    assert [kept.layer for kept in done.kept] == ["conv", "fc"]
    assert done.kept[0].reason == (
        "what its weights decide for tucker would not shrink it: rank_in=24, rank_out=32, vbmf=50.0"
    )
    assert done.kept[0].cost == net.net["conv"].cost
    assert torch.equal(small.conv.weight, net.model.conv.weight)
    assert small.conv.weight.data_ptr() != net.model.conv.weight.data_ptr()
    for name, saved in (("resolved", done), ("as_asked", plan)):
        taut.save(small, saved, tmp_path / name)
        loaded = taut.load(tmp_path / name, base=build)
        assert all(torch.equal(a, b) for a, b in zip(run(loaded, net.data[0]), run(small, net.data[0]), strict=True))


def test_the_ranks_of_a_chain_are_found_inside_what_an_earlier_step_built(net):
    layer = net.net["conv"]
    outer = {"0.weight": (9, 24, 3, 1), "1.weight": (32, 9, 1, 3), "1.bias": (32,)}
    inner = {"1.0.weight": (5, 24, 1, 1), "1.1.weight": (6, 5, 3, 3), "1.2.weight": (32, 6, 1, 1), "1.2.bias": (32,)}
    assert built_ranks(layer, {"0.0.weight": (9, 9, 1, 1)} | inner, 3) == [5, 6]
    assert built_ranks(layer, outer, 2) == [9]
    assert built_ranks(layer, {"weight": layer.weight, "bias": (32,)}, 3) == [1, 1]


# Training.


def test_a_later_stage_decides_by_the_weights_that_training_left(net, tmp_path):
    plan = net.plan(FC, CONV)
    train = [(x, torch.randint(0, 24, (len(x),))) for x in net.data * 4]
    first = Stage((0,), epochs=2, rate=3e-2)

    def trained(steps, stages, folder=None):
        wish = Finetune(train, train, nn.functional.cross_entropy, stages, folder)
        return carry_out(net.model, steps, net.stats, wish, teacher=None)

    between, _ = trained(replace(plan, steps=plan.steps[:1]), (first,))
    small, done = trained(plan, (first, Stage((1,), epochs=1)), tmp_path / "state")
    wanted = Tucker(vbmf=1.0).decided({"conv": between.conv})
    assert resolve(done.steps[1]) == wanted
    assert resolve(done.steps[1]) != Tucker(vbmf=1.0).decided({"conv": net.model.conv})
    assert wanted.rank_out == evbmf(between.conv.weight.flatten(1)).rank
    assert small.conv[1].weight.shape[:2] == (wanted.rank_out, wanted.rank_in)
    resumed, again = trained(plan, (first, Stage((1,), epochs=1)), tmp_path / "state")
    assert again == done
    assert all(
        torch.equal(a, b) for a, b in zip(small.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


def test_a_stage_keeps_what_would_not_shrink(net):
    plan = net.plan(replace(CONV, settings={"vbmf": 50.0}))
    wish = Finetune(net.data, net.data, schedule=(Stage((0,), epochs=1),))
    small, done = carry_out(net.model, plan, net.stats, wish, teacher=net.model)
    assert not done.steps
    assert [kept.layer for kept in done.kept] == ["conv"]
    assert isinstance(small.conv, nn.Conv2d)


def test_a_bad_knob_of_a_later_stage_is_said_before_anything_is_trained(net):
    plan = net.plan(FC, replace(CONV, settings={"vbmf": 0}))
    with untouched(net.model), pytest.raises(CallError, match="'vbmf' of tucker must be a number above 0"):
        taut.finetune(net.model, plan, net.stats, net.data, net.data, schedule=taut.cascade(plan))

"""Nets on which narrowing is hard to check: outputs in objects, randomness; and what is said where nothing can go."""

import copy
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import taut
from cases import sequential
from taut import CallError, Plan
from taut.planning.application import apply_plan


@dataclass
class Outputs:
    logits: Tensor
    features: Tensor


class InObject(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x):
        features = torch.relu(self.a(x))
        return Outputs(self.c(torch.relu(self.b(features))), features)


class AlwaysDrops(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.b(functional.dropout(torch.relu(self.a(x)), 0.5, training=True))


class HoldsMore(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.other = nn.Linear(6, 16), nn.Linear(16, 3), nn.Linear(16, 2)

    def forward(self, x):
        y = torch.relu(self.a(x))
        return self.b(y) if x.mean() > -9 else self.other(y)


class Named(OrderedDict):
    """Outputs by name, of a class that torch's containers do not know."""


class InMapping(InObject):
    def forward(self, x):
        made = super().forward(x)
        return Named(logits=made.logits, features=made.features)


class BehindNorm(nn.Module):
    """A softmax over places that a fixed number of channels lays side by side, behind a norm over channels."""

    def __init__(self, norm):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
        self.norm, self.c = norm, nn.Linear(8, 3)

    def forward(self, x):
        h = self.norm(self.a(x))
        shared = h.view(len(h), 16, -1).softmax(-1).view(len(h), -1, 4, 4)
        return self.c(torch.relu(self.b(shared)).mean((2, 3)))


class UnderAutocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 64), nn.Linear(64, 48), nn.Linear(48, 3)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.c(torch.relu(self.b(torch.relu(self.a(x))))).float()


def chain():
    return sequential(a=nn.Linear(6, 16), r=nn.ReLU(), b=nn.Linear(16, 12), s=nn.ReLU(), c=nn.Linear(12, 3))


def pruned(model, x, **asked):
    net = taut.trace(model, x)
    step = taut.whole(net, "channels", criterion="l2", **asked)
    return apply_plan(model, Plan.of(net, [step]), taut.observe(net, model))


def test_channels_in_an_object_that_the_model_returns_stay():
    x = torch.randn(4, 6)
    small, _ = pruned(InObject().eval(), x, sparsity=0.4)
    assert small(x).features.shape == (4, 16)
    assert small.b.out_features < 12


def test_so_do_those_in_a_mapping_of_its_own_kind():
    small, _ = pruned(InMapping().eval(), torch.randn(4, 6), sparsity=0.4)
    assert small(torch.randn(4, 6))["features"].shape == (4, 16)
    assert small.b.out_features < 12


@pytest.mark.parametrize("norm", [nn.Identity(), nn.GroupNorm(1, 16), nn.GroupNorm(4, 16)], ids=str)
def test_a_norm_over_channels_hides_no_wrong_cut(norm):
    model = BehindNorm(norm).eval()
    small, plan = pruned(model, torch.randn(2, 3, 4, 4), sparsity=0.4)
    assert small.a.out_channels == 16
    assert small.b.out_channels < 8
    assert any(kept.layer == "a" for kept in plan.kept)


def test_a_layer_with_tensors_of_its_own_stays():
    model = chain()
    model.b.register_buffer("scales", torch.ones(12))
    small, _ = pruned(model.eval(), torch.randn(4, 6), sparsity=0.3)
    assert small.b is not model.b
    assert small.b.weight.shape == (12, 16)


def test_pruned_weights_stay_zero_when_channels_go():
    model = chain().eval()
    with torch.no_grad():
        model.b.weight[torch.rand(12, 16) < 0.7] = 0
        model.c.weight[torch.rand(3, 12) < 0.7] = 0
    x = torch.randn(64, 6)
    net = taut.trace(model, x[:4])
    step = taut.whole(net, "channels", sparsity=0.3)
    small, _ = apply_plan(model, Plan.of(net, [step]), taut.observe(net, model, [x]), [x])
    left = {id(p): p for p in small.parameters()}.values()
    assert sum(int((p == 0).sum()) for p in left) > 0.4 * (small.b.weight.numel() + small.c.weight.numel())


def test_a_copy_of_the_model_is_saved_with_the_plan_as_made(tmp_path):
    model, x = chain().eval(), torch.randn(4, 6)
    net = taut.trace(model, x)
    plan = Plan.of(net, [taut.whole(net, "channels", sparsity=0.4, criterion="l2")])
    small = copy.deepcopy(taut.apply(model, plan, taut.observe(net, model)))
    taut.save(small, plan, tmp_path / "small")
    assert torch.equal(taut.load(tmp_path / "small", chain)(x), small.eval()(x))


def test_a_model_that_computes_in_half_precision_inside_is_pruned_by_curvature():
    model, x = UnderAutocast().eval(), torch.randn(64, 6)
    net = taut.trace(model, x[:4])
    small = taut.apply(model, Plan.of(net, [taut.whole(net, "channels", macs=0.5)]), taut.observe(net, model, [x]), [x])
    assert small.a.out_features < 64


def test_joint_plans_take_one_method_for_channels():
    data = [torch.randn(16, 6)]
    with pytest.raises(CallError, match="give channels once"):
        taut.compress(chain(), data[0][:4], budget=taut.Budget(macs=0.5), data=data, methods=("channels", "channels"))


def test_a_joint_plan_in_stages():
    """Prune, train, factorize, train: the schedule that `cascade` makes of a plan of both."""
    data = [torch.randn(32, 6) for _ in range(4)]
    tune = taut.Finetune(data, data[:1], schedule=lambda plan: taut.cascade(plan, epochs=1))
    asked = {"budget": taut.Budget(macs=0.5), "data": data, "methods": ("channels", "svd"), "finetune": tune}
    result = taut.compress(chain().eval(), data[0][:4], **asked)
    assert result.comparison.after.macs <= 0.5 * result.comparison.before.macs


def test_a_model_that_draws_random_numbers_in_eval_mode_is_pruned():
    x = torch.randn(4, 6)
    small, plan = pruned(AlwaysDrops().eval(), x, sparsity=0.4)
    assert small.a.out_features < 16
    assert plan.kept[0].layer == "b"


def test_a_wish_that_cannot_be_granted_is_told():
    with pytest.warns(UserWarning, match="does not reach 'other'"):
        small, plan = pruned(HoldsMore().eval(), torch.randn(4, 6), sparsity=0.4)
    assert plan.steps == ()
    assert small.a.out_features == 16

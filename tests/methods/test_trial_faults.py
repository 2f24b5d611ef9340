"""Nets on which narrowing is hard to check: outputs in objects, randomness; and what is said where nothing can go."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import taut
from taut import Plan
from taut.applying import apply_plan


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
        self.a, self.b, self.unused = nn.Linear(6, 16), nn.Linear(16, 3), nn.Linear(2, 2)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def pruned(model, x, **asked):
    net = taut.trace(model, x)
    step = taut.whole(net, "channels", criterion="l2", **asked)
    return apply_plan(model, Plan.of(net, [step]), taut.observe(net, model))


def test_channels_in_an_object_that_the_model_returns_stay():
    x = torch.randn(4, 6)
    small, _ = pruned(InObject().eval(), x, sparsity=0.4)
    assert small(x).features.shape == (4, 16)
    assert small.b.out_features < 12


def test_a_model_that_draws_random_numbers_in_eval_mode_is_pruned():
    x = torch.randn(4, 6)
    small, plan = pruned(AlwaysDrops().eval(), x, sparsity=0.4)
    assert small.a.out_features < 16
    assert plan.kept[0].layer == "b"


def test_a_wish_that_cannot_be_granted_is_told():
    with pytest.warns(UserWarning, match="does not reach 'unused'"):
        small, plan = pruned(HoldsMore().eval(), torch.randn(4, 6), sparsity=0.4)
    assert plan.steps == ()
    assert small.a.out_features == 16

"""Sparse training: the penalty written out, and channels that it drives to zero."""

import pytest
import torch
from torch import nn

import taut
from cases import sequential
from taut import CallError
from taut.core.example import Example
from taut.structure.tracing import trace
from taut.training.sparsifying import LEAST, GroupLasso


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inner, self.outer = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, 3, padding=1)
        self.up, self.last = nn.ConvTranspose2d(6, 5, 2), nn.Linear(5, 2)

    def forward(self, x):
        x = self.norm(self.first(x))
        x = x + self.outer(torch.relu(self.inner(x)))
        return self.last(self.up(torch.relu(x)).mean((2, 3)))


def test_the_penalty_is_that_of_the_weights_of_coupled_channels():
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(2, 3, 5, 5)
    example = Example(model, x)
    trace(model, example)
    stream = [
        [
            model.first.weight[i],
            model.norm.weight[i],
            model.inner.weight[:, i],
            model.outer.weight[i],
            model.up.weight[i],
        ]
        for i in range(6)
    ]
    inner = [[model.inner.weight[i], model.outer.weight[:, i]] for i in range(4)]
    raised = [[model.up.weight[:, i], model.last.weight[:, i]] for i in range(5)]
    channels = [torch.cat([part.flatten() for part in parts]) for parts in (*stream, *inner, *raised)]
    wanted = sum((w.square().sum() + LEAST).sqrt() * len(w) ** 0.5 for w in channels)
    torch.testing.assert_close(GroupLasso(model, example, 0.1)(), 0.1 * wanted)


def test_channels_are_driven_to_zero_and_then_cost_little():
    torch.manual_seed(0)
    net = sequential(a=nn.Linear(6, 24), r=nn.ReLU(), b=nn.Linear(24, 2))
    data = [torch.randn(64, 6) for _ in range(4)]
    network = taut.trace(net, data[0])
    stats = taut.observe(network, net, data)

    def trained(strength):
        stages = (taut.Stage(epochs=20, sparsify=strength, rate=1e-2),)
        return taut.finetune(net, None, stats, data, lambda model: 0.0, schedule=stages, teacher=net)

    def low(model):
        norms = next(GroupLasso(model, stats.network.example, 1.0).norms())
        return int((norms < 0.05 * norms.max()).sum())

    assert low(trained(3e-3)) >= low(trained(0.0)) + 6


def test_its_strength_is_not_negative():
    with pytest.raises(CallError, match="'sparsify' of a stage must be at least 0"):
        taut.Stage(sparsify=-1.0)


def test_what_is_kept_is_not_driven_and_nets_without_channels_are_refused():
    torch.manual_seed(0)
    net = sequential(a=nn.Linear(6, 12), r=nn.ReLU(), b=nn.Linear(12, 12), s=nn.ReLU(), c=nn.Linear(12, 2))
    example = Example(net, torch.randn(4, 6))
    trace(net, example)
    assert len(GroupLasso(net, example, 1.0)._groups) == 2
    assert [group.name for group in GroupLasso(net, example, 1.0, {"a"})._groups] == ["b"]
    single = sequential(a=nn.Linear(6, 2))
    example = Example(single, torch.randn(4, 6))
    trace(single, example)
    with pytest.raises(CallError, match="'sparsify' drives whole channels towards zero, and none of this network"):
        GroupLasso(single, example, 1.0)

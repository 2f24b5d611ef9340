"""What labelled runs note beside the channels: origins of tensors, and layers that are not reached."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that every torch user knows

from cases import untouched
from structure import wired
from structure.wired import Net, chain, draw
from taut.core.example import Example
from taut.core.modes import quiet
from taut.structure.channels.groups import coupled
from taut.structure.channels.runs import run_labelled


def runs_of(model, *inputs, tying=True):
    value = inputs[0] if len(inputs) == 1 else inputs
    with untouched(model.eval()), quiet():
        return run_labelled(model, Example(model, value), tying=tying)


class Masked(nn.Module):
    def __init__(self, times):
        super().__init__()
        self.one, self.two, self.times = nn.Linear(6, 8), nn.Linear(8, 5), times
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("gain", torch.rand(8))

    def forward(self, x):
        return self.two(self.times(self, x, F.relu(self.one(x))))


@pytest.mark.parametrize(
    ("times", "foreign"),
    [
        (lambda net, x, h: h * 2 + 1, False),
        (lambda net, x, h: h * net.gain.view(1, -1), False),
        (lambda net, x, h: h * (2 * net.gain + net.gain.sum()), False),
        (lambda net, x, h: h * h.sigmoid(), False),
        (lambda net, x, h: h * net.one(x + 1).detach(), False),
        (lambda net, x, h: h * (x != 0).any(-1, keepdim=True), True),
        (lambda net, x, h: h.add_((x != 0).any(-1, keepdim=True)).tanh(), True),
        (lambda net, x, h: torch.where(x[:, :1] > 0, h, 0), True),
        (lambda net, x, h: h - x[:, :1], True),
        (lambda net, x, h: h * torch.linspace(0, 1, 8), True),
        (lambda net, x, h: h * torch.rand_like(h), True),
        (lambda net, x, h: h * (h > 0), True),
        (lambda net, x, h: h + net.gain * x.mean(), True),
        (lambda net, x, h: net.norm(h * x[:, :1]), True),
        (lambda net, x, h: net.one(h[:, :6] * x), False),
    ],
)
def test_layers_that_read_behind_a_tensor_from_elsewhere(times, foreign):
    assert ("two" in runs_of(Masked(times), draw(3, 6)).foreign) is foreign


def test_layers_that_are_not_reached_are_named():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
    model[0].add_module("aux", nn.Linear(8, 2))
    assert runs_of(model, draw(3, 6)).unreached() == ("0.aux",)
    assert coupled(model, Example(model, draw(3, 6))).unreached == ()  # no code names it


def test_norms_that_hold_statistics_alone_may_read_channels_and_weights_of_classes_do_not():
    net, _ = chain(nn.ReLU(), 8)
    net.norm, net.loss = nn.BatchNorm2d(8, affine=False), nn.CrossEntropyLoss(weight=torch.ones(8))
    assert runs_of(net, draw(2, 3, 4, 4)).unreached() == ("norm",)


def test_without_ties_channels_are_the_same_one_by_one():
    """Two groups lose theirs in pairs, but each has its own."""
    net, x, _ = wired.grouped()
    tied, apart = (runs_of(net, x, tying=tying).classes() for tying in (True, False))
    assert len(tied["a", "out"].unique()) == 4
    assert len(apart["a", "out"].unique()) == 8
    assert torch.equal(apart["a", "out"], apart["g", "in"])


def test_tensors_that_share_memory_are_seen():
    net = Net(lambda s, x: s.c(s.b(s.a(x))), a=nn.Linear(8, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 3))
    net.b.weight.data = net.a.weight.data
    assert runs_of(net, draw(2, 8)).sharing() == {"a", "b"}
    assert not coupled(net, Example(net, draw(2, 8))).groups


def test_a_users_hook_before_a_layer_is_followed():
    net, x, wanted = wired.sequential()
    net.b.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    groups = coupled(net.eval(), Example(net, x)).groups
    assert {group.name: group.size for group in groups} == {name: size for name, (size, _) in wanted.items()}

"""What is negative in front of a ReLU: proved to make no difference by changing it, or not relied on."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that every torch user knows

import taut
from taut.recovery.successors import Follows
from taut.recovery.verification import FEW, unseen

X = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two layers with a skip connection; what is done with their outputs is the test's."""

    def __init__(self, forward):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.norm.weight.data.copy_(torch.tensor([1.0, -1.0, 2.0, -0.5, 0.0, 1.0]))
        self.norm.bias.data.uniform_(-1, 1)
        self.made = forward

    def forward(self, x):
        return self.made(self, x)


def rectified(*, scale=None, shift=None, total=None):
    """A ReLU follows, behind what is given."""
    ones = torch.ones(1, 1, 6) if scale is None else scale.reshape(1, 1, -1)
    zeros = torch.zeros(1, 1, 6) if shift is None else shift.reshape(1, 1, -1)
    return Follows(ones, zeros, total, None, rectified=True)


SUM = torch.zeros(1, 1, 6)
"""Stands for the sum that was noted; the proof looks at its own samples."""


def proved(forward, follows, batch=X):
    model = Net(forward).eval()
    return unseen(model, taut.trace(model, X), batch, follows(model) if callable(follows) else follows)


def test_a_relu_right_behind_uses_nothing_else():
    assert proved(lambda m, x: m.b(F.relu(m.a(x))), {"a": rectified()}) == ["a"]


@pytest.mark.parametrize(
    "read",
    [
        lambda y: torch.cat([F.relu(y), y], 1),
        F.leaky_relu,
        lambda y: F.relu(y) + y.min(),
        lambda y: F.relu(y) * y.pow(2).sum(1, keepdim=True),
    ],
    ids=["beside", "leaky", "its least", "its norm"],
)
def test_whoever_reads_what_is_negative_is_seen(read):
    assert proved(lambda m, x: read(m.a(x)), {"a": rectified()}) == []


def test_what_no_look_at_the_operations_finds_is_seen():
    def forward(m, x):
        y = m.a(x)
        return F.relu(y) + float(y.numpy().min())

    assert proved(forward, {"a": rectified()}) == []


def test_of_several_layers_those_are_named_that_are_proved():
    def forward(m, x):
        y = F.relu(m.a(x))
        z = m.b(y)
        return F.relu(z) + z.min()

    assert proved(forward, {"a": rectified(), "b": rectified()}) == ["a"]
    assert proved(lambda m, x: F.relu(m.b(F.relu(m.a(x)))), {"b": rectified(), "a": rectified()}) == ["b", "a"]


def test_a_norm_between_turns_the_direction_and_is_reckoned_with():
    def follows(model):
        scale = model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()
        return {"a": rectified(scale=scale.data, shift=(model.norm.bias - model.norm.running_mean * scale).data)}

    assert proved(lambda m, x: F.relu(m.norm(m.a(x))), follows) == ["a"]
    assert proved(lambda m, x: F.relu(m.norm(m.a(x))), {"a": rectified()}) == []  # as if there were no norm
    assert proved(lambda m, x: F.relu(-m.a(x)), {"a": rectified(scale=torch.ones(6))}) == []


def test_a_sum_counts_with_the_other_branch_as_it_is():
    def forward(m, x):
        y = m.a(x)
        return F.relu(m.b(y) + y)

    assert proved(forward, {"b": rectified(total=SUM)}) == ["b"]
    assert proved(lambda m, x: F.relu(m.b(x) + m.a(x)) + m.b(x), {"b": rectified(total=SUM)}) == []


def test_convolutions_have_their_channels_on_another_axis():
    class Convs(nn.Module):
        def __init__(self, read):
            super().__init__()
            self.a, self.read = nn.Conv2d(2, 3, 3), read

        def forward(self, x):
            return self.read(self.a(x))

    x = torch.randn(2, 2, 5, 5, generator=torch.Generator().manual_seed(1))
    shift = torch.tensor([-9.0, 0.0, 9.0]).reshape(1, 1, 3)  # all, some and none of a channel are negative
    follows = {"a": Follows(torch.ones(1, 1, 3), shift, None, None, rectified=True)}
    for read, wanted in (
        (lambda y: F.relu(y + shift.reshape(1, 3, 1, 1)), ["a"]),
        (lambda y: F.relu(y + shift.flip(2).reshape(1, 3, 1, 1)), []),
    ):
        model = Convs(read).eval()
        assert unseen(model, taut.trace(model, x), x, follows) == wanted


def test_few_samples_are_run_and_a_model_that_refuses_them_proves_nothing():
    sizes = []

    def forward(m, x):
        sizes.append(len(x))
        return F.relu(m.a(x))

    model = Net(forward).eval()
    net = taut.trace(model, X)
    sizes.clear()
    assert unseen(model, net, X, {"a": rectified()}) == ["a"]
    assert set(sizes) == {FEW}

    def picky(m, x):
        if len(x) != len(X):
            raise ValueError(len(x))
        return F.relu(m.a(x))

    net.example.divisible = True
    model.made = picky
    assert unseen(model, net, X, {"a": rectified()}) == []


def test_nothing_to_prove_runs_nothing():
    def forward(m, x):
        raise AssertionError

    assert unseen(Net(forward), None, X, {}) == []


def test_the_model_keeps_its_hooks_flags_and_values():
    model = Net(lambda m, x: F.relu(m.b(F.relu(m.a(x))))).eval()
    model.a.train()
    net, calls = taut.trace(model, X), []
    model.b.register_forward_hook(lambda *_: calls.append(1))
    before = [p.clone() for p in model.parameters()]
    assert unseen(model, net, X, {"a": rectified(), "b": rectified()}) == ["a", "b"]
    assert model.a.training
    assert not model.a._forward_hooks
    assert calls  # what the user's hooks do belongs to the network
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

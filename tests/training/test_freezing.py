"""What is frozen: everything that runs up to the compressed layer, in the order of the run."""

import torch
from torch import nn

from taut.core.example import Example
from taut.training.freezing import below, frozen, run_order, train_mode


class Backwards(nn.Module):
    """Declares its layers in another order than it runs them."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 2)
        self.norm = nn.BatchNorm1d(4)
        self.first = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4))

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


def test_order_is_that_of_the_run():
    net = Backwards()
    order = run_order(net, Example(net, torch.randn(2, 4)))
    assert order == ["first.0", "first.1", "norm", "last"]
    assert below(order, ["first"]) == {"first.0", "first.1"}
    assert below(order, ["norm", "first"]) == {"first.0", "first.1", "norm"}
    assert below(order, []) == set()


def test_frozen_parameters_get_their_gradient_back():
    net = Backwards()
    net.norm.weight.requires_grad_(requires_grad=False)
    with frozen(net, {"first.0", "norm"}) as still:
        learning = {name for name, p in net.named_parameters() if p.requires_grad}
        assert learning == {"first.1.weight", "first.1.bias", "last.weight", "last.bias"}
        assert still == [net.norm, net.first[0]]
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["norm.weight"]


def test_batch_norms_with_fixed_statistics_stay_in_eval():
    net = nn.Sequential(nn.BatchNorm1d(4, momentum=0.0), nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Dropout())
    train_mode(net, [net[2]], labels=True)
    assert [module.training for module in net] == [False, True, False, True]
    train_mode(net, [], labels=False)
    assert not any(module.training for module in net)

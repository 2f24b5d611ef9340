"""The proof that layers do what a weight did: what it finds, and what it costs."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that every torch user knows
from torch.profiler import ProfilerActivity, profile

from taut.core.modes import quiet
from taut.structure.calling import read_example
from taut.structure.product_proof import Proof
from taut.structure.product_uses import Multiplied

C = 64


class Straight(torch.autograd.Function):
    """Gives a product, and a gradient of the weight that is another by its last entry alone."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return F.linear(x, w)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        gradient = g.flatten(0, -2).T @ x.flatten(0, -2)
        gradient[-1, -1] += 1e-3
        return g @ w, gradient


class Weights(nn.Module):
    def __init__(self, count, product=F.linear):
        super().__init__()
        self.product = product
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(C, C) / C**0.5) for _ in range(count)])

    def forward(self, x):
        for w in self.weights:
            x = self.product(x, w)
        return x


def other_gradient(x, w):
    return Straight.apply(x, w) if isinstance(w, torch.Tensor) else F.linear(x, w)


def proof(model, x, rows=()):
    where = {name: name for name, _ in model.named_parameters()}
    return Proof(model, read_example(model, x), where, dict.fromkeys(where, Multiplied((1,), rows)))


@pytest.mark.parametrize("rows", [(), (C // 2, C // 2)])
@pytest.mark.parametrize(("product", "same"), [(F.linear, True), (other_gradient, False)])
def test_a_gradient_that_is_another_in_one_entry_shows(product, same, rows):
    torch.manual_seed(0)
    with quiet():
        found = proof(Weights(2, product).eval(), torch.randn(3, C), rows)
        assert found.wanted is not None
        assert found.same(list(found.found)) is same


def largest_at_once(run):
    """Bytes of tensors that live at the same time during a run."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    held = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def test_it_takes_one_copy_in_float64_and_one_gradient():
    torch.manual_seed(0)
    model, x = Weights(16).eval(), torch.randn(1, C)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    with quiet():
        found = proof(model, x)
        assert found.wanted[1] is not None
        most = largest_at_once(lambda: found.same(list(found.found)))
    assert most < 2.5 * size

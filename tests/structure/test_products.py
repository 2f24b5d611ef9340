"""Weights that code multiplies by: which are known for it, and which are left alone for which reason."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that every torch user knows
from torch.utils.checkpoint import checkpoint

import taut
from taut.structure.support import MULTIPLIED

C, N = 12, 8


class Using(nn.Module):
    """A weight, and a function of the module and x that uses it."""

    def __init__(self, use, *shape):
        super().__init__()
        self.first, self.use = nn.Linear(C, C), use
        self.w, self.other = nn.Parameter(torch.randn(*shape or (N, C))), nn.Parameter(torch.randn(N, C))
        self.layer, self.list = nn.Linear(C, N), nn.ParameterList([nn.Parameter(torch.randn(N, C)) for _ in range(2)])

    def forward(self, x):
        return self.use(self, self.first(x))


def traced(use, *shape):
    torch.manual_seed(0)
    net = taut.trace(Using(use, *shape).eval(), torch.randn(4, 5, C))
    return {layer.name: layer for layer in net.layers}


TAKEN = {
    "F.linear": ("w", lambda m, x: F.linear(x, m.w), (1,), ()),
    "@": ("w", lambda m, x: x @ m.w.T, (1,), ()),
    "of a layer": ("layer", lambda m, x: F.linear(x, m.layer.weight, m.layer.bias), (1,), ()),
    "of a layer that is called": ("layer", lambda m, x: m.layer(x) + F.linear(x, m.layer.weight), (1,), ()),
    "twice": ("w", lambda m, x: F.linear(x, m.w) + x @ m.w.T, (1,), ()),
    "parts": ("w", lambda m, x: torch.cat([F.linear(x, p) for p in m.w.chunk(2)], 1), (1,), (4, 4)),
    "in a list": ("list.1", lambda m, x: F.linear(x, m.list[1]) + m.list[0].norm(), (1,), ()),
    "checkpointed": ("w", lambda m, x: checkpoint(F.linear, x, m.w, use_reentrant=False), (1,), ()),
    "sizes besides": ("w", lambda m, x: F.linear(x, m.w.to(x.dtype)) / m.w.shape[1] ** 0.5, (1,), ()),
    "dropped": ("w", lambda m, x: F.dropout(F.linear(x, m.w), 0.5, m.training), (1,), ()),
}


@pytest.mark.parametrize("name", TAKEN)
def test_weights_in_products_alone_are_known(name):
    layer, use, summed, rows = TAKEN[name]
    found = traced(use)[layer]
    assert (found.skip, found.summed, found.rows) == (MULTIPLIED, summed, rows)
    assert found.macs == N * C * 5 * (2 if name in {"twice", "of a layer that is called"} else 1)
    assert found.params == N * C + (N if layer == "layer" else 0)


def training_norm(m, x):
    y = F.linear(x, m.w)
    return y * m.w.norm() if m.training else y


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w, 2 * grad.flatten(0, -2).T @ x.flatten(0, -2)


LEFT = {
    "its norm, too": (lambda m, x: F.linear(x, m.w) / m.w.norm(), "torch's 'norm'"),
    "a table, too": (lambda m, x: F.linear(x, m.w) + F.embedding(torch.tensor([1]), m.w).mean(), "'embedding'"),
    "in training alone": (training_norm, "torch's 'norm'"),
    "from both sides": (lambda m, x: F.linear(x, m.w) @ m.w, "from both sides"),
    "returned": (lambda m, x: (F.linear(x, m.w), m.w), "computes something else"),
    "by a kernel of its own": (lambda m, x: Doubled.apply(x, m.w), None),
    "by its class": (lambda m, x: F.linear(x, m.w) * (1 + isinstance(m.w, nn.Parameter)), "something else"),
    "by its name": (lambda m, x: F.linear(x, dict(m.named_parameters())["w"]), None),
    "detached": (lambda m, x: F.linear(x, m.w.detach()) + F.linear(x, m.w), "'detach'"),
    "scaled first": (lambda m, x: F.linear(x, m.w * 2), None),
}


@pytest.mark.parametrize("name", LEFT)
def test_all_others_are_left_alone(name):
    use, reason = LEFT[name]
    layers = traced(use)
    assert "other code multiplies" not in str(layers.get("first").skip)
    if reason is None:
        assert "w" not in layers or layers["w"].skip != MULTIPLIED
    else:
        assert reason in layers["w"].skip


def test_shared_and_unused_parameters_are_left_alone():
    torch.manual_seed(0)
    model = Using(lambda m, x: F.linear(x, m.w) + F.linear(x, m.layer.weight)).eval()
    model.layer.weight = model.w
    names = {layer.name for layer in taut.trace(model, torch.randn(4, C)).layers if layer.skip == MULTIPLIED}
    assert names == set()


def test_a_vector_is_no_layer():
    assert "w" not in traced(lambda m, x: x @ m.w, C, 1)


def test_data_on_which_it_is_used_otherwise_leave_it_alone():
    torch.manual_seed(0)

    def use(m, x):
        y = F.linear(x, m.w)
        return y if x.shape[1] < 6 else y / m.w.norm()

    model, x = Using(use).eval(), torch.randn(4, 5, C)
    assert taut.trace(model, x)["w"].skip == MULTIPLIED
    assert "'norm'" in taut.trace(model, x, [torch.randn(4, 7, C)])["w"].skip


def test_the_code_around_is_not_counted_twice():
    torch.manual_seed(0)
    net = taut.trace(Using(lambda m, x: F.linear(x, m.layer.weight) @ m.other).eval(), torch.randn(4, 5, C))
    assert sum(layer.macs for layer in net.layers) == net.cost.macs
    assert sum(layer.params for layer in net.layers) == net.cost.params


def test_a_network_that_does_not_run_in_train_mode_is_judged_in_eval_mode():
    def use(m, x):
        if m.training:
            raise ValueError("targets")
        return F.linear(x, m.w)

    assert traced(use)["w"].skip == MULTIPLIED


def by_two(m, x):
    return torch.einsum("...ehd,...d->...eh", m.w[torch.zeros(*x.shape[:-1], 2, dtype=torch.long)], x)


STACKS = {
    "two indices each": (by_two, "in torch's '__getitem__'"),
    "mean": (lambda m, x: x @ m.w.mean(0).T, "in torch's 'mean'"),
    "vmap": (lambda m, x: torch.vmap(lambda w: x @ w.T)(m.w), "needs a tensor there"),
}


@pytest.mark.parametrize(("use", "words"), STACKS.values(), ids=STACKS)
def test_stacks_that_are_used_otherwise_are_named_with_the_use(use, words):
    torch.manual_seed(0)
    model, x = Using(use, 3, N, C).eval(), torch.randn(4, 5, C)
    net = taut.trace(model, x)
    assert words in net["w"].skip
    assert net["w"].params == 3 * N * C
    stats = taut.observe(net, model)
    assert "\n (model) " in str(taut.plan(net, stats, {"params": 1.0}))
    plan = taut.Plan.of(net, [taut.Step(("w",), "as_layer")])
    with pytest.raises(taut.CallError, match=words):
        taut.apply(model, plan, stats)
    with pytest.raises(taut.CallError, match=r"Layers: \(model\), w, "):
        taut.Plan.of(net, [taut.Step(("nowhere",), "as_layer")])


def test_what_is_added_is_no_stack():
    """Positions, scales and the like are no matrices that somebody multiplies by."""
    assert "w" not in traced(lambda m, x: x + m.w, 1, 5, C)
    assert "w" not in traced(lambda m, x: x * m.w.sum(), N, C)


def test_index_select_chooses_as_an_index_does():
    def selected(m, x):
        return torch.einsum("nhd,nd->nh", m.w.index_select(0, x[:, 0, 0].gt(0).long()), x[:, 0])

    def function(m, x):
        return torch.einsum("nhd,nd->nh", torch.index_select(m.w, dim=0, index=x[:, 0, 0].gt(0).long()), x[:, 0])

    for use in (selected, function):
        found = traced(use, 3, N, C)["w"]
        assert (found.skip, found.summed, found.rows) == (MULTIPLIED, (2,), (N, N, N))
        model, x = Using(use, 3, N, C).eval(), torch.randn(4, 5, C)
        net = taut.trace(model, x)
        small = taut.apply(model, taut.Plan.of(net, [taut.Step(("w",), "as_layer")]), taut.observe(net, model))
        torch.testing.assert_close(small(x), model(x))
    assert "w" not in traced(lambda m, x: x * m.w.index_select(0, torch.arange(1)).sum(), N, C)
    other = traced(lambda m, x: x * m.w.index_select(1, torch.arange(1)).sum(), 3, N, C)["w"]
    assert "in torch's 'index_select'" in other.skip

"""Counts by module, and what a note says: in every mode that code can run in."""

import pytest
import torch
from torch import nn
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import linear
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from taut.measure.tally import Tally


@torch.library.custom_op("taut_tests::twist", mutates_args=())
def twist(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """An operation that nobody has a formula for."""
    return x @ weight


class Uses(nn.Module):
    """Calls a function with its input and its one weight."""

    def __init__(self, function, weight=None):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.eye(4) if weight is None else weight)
        self.register_buffer("mask", torch.ones(4))

    def forward(self, x):
        return self.function(x, self.weight)


def tally(model, *inputs):
    counted = Tally(model)
    with torch.no_grad(), counted.watching(model):
        model(*inputs)
    return counted


def scripted(x, w):
    return torch.jit.script(_product)(x, w)


def _product(x, w):
    return x @ w


X = torch.randn(3, 4)
MODES = {
    "checkpoint": (lambda x, w: checkpoint(torch.mm, x, w, use_reentrant=False), 48),
    "reentrant": (lambda x, w: checkpoint(torch.mm, x, w, use_reentrant=True), 48),
    "vmap": (lambda x, w: torch.vmap(lambda row: w @ row)(x), 48),
    "script": (scripted, 48),
    "inference": (torch.inference_mode()(lambda x, w: linear(linear(x, w), w)), 96),
    "enabled": (torch.enable_grad()(lambda x, w: linear(x, w).relu()), 48),
    "cond": (lambda x, w: torch.cond(x.sum() > -99, lambda x, w: x @ w, lambda x, w: x @ w @ w, (x, w)), 48),
    "while": (lambda x, w: while_loop(lambda i, _: i < 3, lambda i, x: (i + 1, x @ w), (torch.tensor(0), x)), 144),
    "scan": (lambda x, w: scan(lambda c, y: (c @ w, y @ w), x, torch.ones(2, 5, 4)), 2 * (3 + 5) * 16),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_seen(mode):
    function, macs = MODES[mode]
    counted = tally(Uses(function), X)
    assert counted.macs == counted.own[""] == macs
    assert not counted.uncounted


@torch.library.custom_op("taut_tests::fill", mutates_args=("out",))
def fill(out: torch.Tensor, weight: torch.Tensor) -> None:
    """An operation that works in place, which an exported program wraps in another."""
    out.copy_(weight[:1])


def test_an_operation_that_takes_another_is_named():
    wrapped = torch.ops.higher_order.auto_functionalized
    counted = tally(Uses(lambda x, w: wrapped(torch.ops.taut_tests.fill.default, out=x[:1], weight=w)), X)
    assert counted.uncounted == {("", "auto_functionalized"): {"weight": None}}


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_is_attention():
    heads = torch.randn(2, 4, 6, 8)
    model = Uses(lambda x, w: flex_attention(x @ w, x, x, score_mod=lambda score, b, h, q, k: score + q), torch.eye(8))
    with torch.compiler.set_stance("force_eager"):
        assert tally(model, heads).macs == 2 * 4 * 6 * 8 * 8 + 2 * 4 * 6 * 6 * 16


DERIVED = {
    "itself": lambda x, m: x,
    "view": lambda x, m: x.t()[:, :4],
    "cast": lambda x, m: x.double().float(),
    "product with a buffer": lambda x, m: x * m,
    "product with a new tensor": lambda x, m: x * torch.ones(4).add_(1),
    "product with written numbers": lambda x, m: x * torch.tensor([1.0, 2.0, 3.0, 4.0]),
    "normalized": lambda x, m: torch._weight_norm(x, x[:, :1]),
    "product with itself": lambda x, m: x @ x,
    "list": lambda x, m: torch.cat([x[:2], x[2:]]),
    "written into a new tensor": lambda x, m: torch.zeros(4, 4).copy_(x),
}


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("way", DERIVED)
def test_an_unknown_operation_on_a_parameter_is_named(way, gradient):
    model = nn.Sequential(nn.Linear(4, 4), Uses(lambda x, w: twist(x, DERIVED[way](w, model[1].mask))))
    counted = Tally(model)
    with torch.set_grad_enabled(gradient), counted.watching(model):
        model(X)
    assert counted.uncounted == {("1", "taut_tests.twist"): {"1.weight": None}}


MIXED = {
    "input": lambda x, w: x[:, None] * x,
    "scaled input": lambda x, w: (x * w[0])[:, None] * x,
    "product": lambda x, w: (x @ w)[:, None] * x,
    "buffer with input": lambda x, w: torch.zeros(3, 1, 4).copy_(x[:, None]) * x,
}


@pytest.mark.parametrize("way", MIXED)
def test_what_depends_on_the_input_is_no_parameter(way):
    """An outer product of activations is elementwise; one with a parameter would be counted."""
    counted = tally(Uses(MIXED[way]), X)
    assert counted.macs == (48 if way == "product" else 0)
    unknown = tally(Uses(lambda x, w: twist(x.t()[:, :3], MIXED[way](x, w).flatten(0, -2)[:3])), X)
    assert unknown.uncounted == {("", "taut_tests.twist"): {}}


def test_noise_is_like_an_input():
    assert tally(Uses(lambda x, w: x[0, 0] + torch.randn(3, 4)[:, None] * w), X).macs == 48
    assert tally(Uses(lambda x, w: x[0, 0] + torch.empty(3, 4).normal_()[:, None] * w), X).macs == 48
    assert tally(Uses(lambda x, w: x[0, 0] + torch.ones(3, 4)[:, None] * w), X).macs == 0


def test_other_classes_of_tensors_are_seen_through():
    class Mine(torch.Tensor):
        pass

    counted = tally(Uses(lambda x, w: twist(x @ w, w), torch.eye(4).as_subclass(Mine)), X)
    assert counted.macs == 48
    assert counted.uncounted == {("", "taut_tests.twist"): {"weight": None}}
    assert tally(Uses(lambda x, w: x @ w, TwoTensor(torch.eye(4), torch.eye(4))), X).macs == 2 * 48


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_cost_their_real_rows(layout):
    def packed(x, w):
        return linear(torch.nested.nested_tensor([x[:1], x[:2]], layout=layout), w)

    assert tally(Uses(packed), X).macs == 3 * 16


class Repeated(nn.Module):
    """Calls itself, a child twice, and work of its own."""

    def __init__(self):
        super().__init__()
        self.child = nn.Linear(4, 4)
        self.token = nn.Parameter(torch.ones(4))

    def forward(self, x, again=True):
        y = self.child(self.child(x)) * (x @ self.token)[:, None]
        return self(y, again=False) if again else y


def test_own_work_is_without_children_and_calls_of_itself_are_counted_once():
    counted = tally(nn.Sequential(Repeated()), X)
    own, child = 2 * 3 * 4, 4 * 3 * 16
    assert counted.own == {"": 0, "0": own, "0.child": child}
    assert counted.by_module == {"": own + child, "0": own + child, "0.child": child}


class Fallback(nn.Module):
    """Goes on where a child fails."""

    def __init__(self):
        super().__init__()
        self.tries, self.works = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 5)), nn.Linear(4, 2)

    def forward(self, x):
        try:
            return self.tries(x)
        except RuntimeError:
            return self.works(x)


def test_a_child_that_fails_is_counted_as_far_as_it_came():
    counted = tally(Fallback(), X)
    assert counted.own == {"": 0, "tries": 0, "tries.0": 48, "tries.1": 0, "works": 24}
    assert counted.by_module[""] == counted.macs == 72


def test_hooks_of_the_model_belong_to_their_module():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_pre_hook(lambda module, args: (args[0] @ module.weight,))
    assert tally(model, X).own == {"": 0, "0": 96}


def test_spectral_norm_is_counted_and_weight_norm_is_elementwise():
    norm = torch.nn.utils.parametrizations
    assert tally(norm.weight_norm(nn.Linear(4, 5)), X).macs == 60
    counted = tally(norm.spectral_norm(nn.Linear(4, 5)).eval(), X)
    assert counted.own[""] == 60
    assert counted.macs == 60 + 20 + 5  # the matrix with one vector, and the result with another
    assert not counted.uncounted

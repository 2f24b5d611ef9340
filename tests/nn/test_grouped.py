"""A stack of matrices as one layer: what a grouped convolution computes, by batched products."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that every torch user knows
from torch.utils._python_dispatch import TorchDispatchMode

from taut.nn import GroupedLinear
from taut.nn.grouped import of_all
from taut.structure.product_uses import as_product

G, C, N, S = 3, 4, 6, 5


@pytest.mark.parametrize(("count", "bias"), [*itertools.product((1, 2), (False, True))])
def test_it_computes_what_a_grouped_convolution_does(count, bias):
    conv = nn.Conv1d(G * C, G * N, 1, groups=G, bias=bias)
    layer = GroupedLinear(G * C, G * N, groups=G, bias=bias)
    layer.load_state_dict(conv.state_dict())
    x = torch.randn(count, G * C, S)
    torch.testing.assert_close(layer(x), conv(x))
    torch.testing.assert_close(layer(x[0]), conv(x[0]))


class Products(TorchDispatchMode):
    """Counts batched matrix products, and copies."""

    def __init__(self):
        super().__init__()
        self.products = self.others = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func is torch.ops.aten.bmm.default
        self.others += func in {torch.ops.aten.clone.default, torch.ops.aten.mm.default}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bias", [False, True])
def test_two_of_them_are_two_batched_products_and_no_copies(bias):
    x = torch.randn(G, S, C)
    chain = nn.Sequential(
        GroupedLinear(G * C, G * 2, groups=G, bias=False), GroupedLinear(G * 2, G * N, groups=G, bias=bias)
    )
    with Products() as counted:
        straight = of_all(chain, x)
    assert (counted.products, counted.others) == (2, 0)
    for watched in (chain, chain[1]):
        seen, other = [], copy.deepcopy(chain)
        (other if watched is chain else other[1]).register_forward_hook(lambda *call, seen=seen: seen.append(call))
        torch.testing.assert_close(of_all(other, x), straight)
        assert len(seen) == 1
    assert straight.is_contiguous()


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_hooks_on_gradients_are_called(kind):
    layer, seen = GroupedLinear(G * C, G * N, groups=G), []
    getattr(layer, kind)(lambda *call: seen.append(call))
    of_all(layer, torch.randn(G, S, C, requires_grad=True)).sum().backward()
    assert len(seen) == 1


def test_it_has_the_settings_of_a_matrix_product_alone():
    for setting in ("kernel_size", "stride", "padding", "dilation"):
        with pytest.raises(TypeError, match=setting):
            GroupedLinear(G * C, G * N, groups=G, **{setting: 3})


@pytest.mark.parametrize("shape", [(G, 0, C), (G, 0, 2, C), (G, 2, 0, C)])
def test_there_may_be_no_rows(shape):
    layer = GroupedLinear(G * C, G * N, groups=G)
    assert of_all(layer, torch.ones(shape)).shape == (*shape[:-1], N)
    layer.register_forward_hook(lambda *_: None)
    assert of_all(layer, torch.ones(shape)).shape == (*shape[:-1], N)
    assert layer(torch.ones(0, G * C, S)).shape == (0, G * N, S)


def test_another_layer_in_its_place_is_called():
    x = torch.randn(G, 2, S, C)
    conv = nn.Conv1d(G * C, G * N, 1, groups=G, bias=False)
    wanted = torch.einsum("gabc,goc->gabo", x, conv.weight.view(G, N, C))
    torch.testing.assert_close(of_all(conv, x), wanted)


XE = torch.randn(G, S, C, dtype=torch.float64)

AT_ONCE = {
    "bmm": (1, lambda w: torch.bmm(XE, w)),
    "@": (1, lambda w: XE @ w),
    "the same rows by each": (1, lambda w: XE[:1] @ w),
    "einsum": (2, lambda w: torch.einsum("esc,eoc->eso", XE, w)),
    "einsum in another order": (2, lambda w: torch.einsum("eoc,sec->soe", w, XE.transpose(0, 1))),
    "turned": (2, lambda w: torch.bmm(XE, w.transpose(1, 2))),
    "on the left": (2, lambda w: w @ XE.mT),
    "added": (1, lambda w: torch.baddbmm(torch.ones(1, dtype=torch.float64), XE, w)),
}

BY_VALUES = {
    "all rows by each": (1, lambda w: XE[0] @ w),
    "one": (2, lambda w: F.linear(XE, w[1])),
    "summed": (2, lambda w: w.sum(1)),
}


@pytest.mark.parametrize("name", [*AT_ONCE, *BY_VALUES])
def test_products_with_a_whole_stack(name):
    inputs, product = {**AT_ONCE, **BY_VALUES}[name]
    weight = torch.randn((G, N, C) if inputs == 2 else (G, C, N), dtype=torch.float64)
    stack = as_product(weight, (inputs,), (), stacked=True)
    with Products() as counted:
        output = product(stack)
    assert counted.products == 1 or name in BY_VALUES
    torch.testing.assert_close(output, product(weight), rtol=1e-12, atol=1e-12)
    assert output.is_contiguous() or not product(weight).is_contiguous()


class Using(nn.Module):
    def __init__(self):
        super().__init__()
        stack = as_product(torch.randn(G, N, C), (2,), (), stacked=True)
        stack.add_module("0", nn.Sequential(*(GroupedLinear(G * a, G * b, groups=G) for a, b in ((C, 2), (2, N)))))
        self.weight = stack

    def forward(self, x):
        return torch.bmm(x, self.weight.mT)


def test_it_is_compiled():
    model, x = Using().eval(), torch.randn(G, S, C)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("ranks", [(), (2,)])
def test_one_matrix_alone_is_computed_and_nobody_is_told(ranks):
    sizes = (C, *ranks, N)
    layers = [GroupedLinear(G * a, G * b, groups=G, bias=False) for a, b in itertools.pairwise(sizes)]
    stack, calls = as_product(torch.randn(G, N, C), (2,), (), stacked=True), []
    stack.add_module("0", nn.Sequential(*layers))
    for layer in (*layers, stack.get_submodule("0")):
        layer.register_forward_hook(lambda *_: calls.append(1))
    each = [layer.weight.view(G, -1, layer.weight.shape[1]) for layer in layers]
    wanted = each[0] if not ranks else each[1] @ each[0]
    x, multiplied = torch.randn(S, C), 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal multiplied
            if func in {torch.ops.aten.bmm.default, torch.ops.aten.mm.default}:
                multiplied = max(multiplied, args[0].numel(), args[1].numel())
            return func(*args, **(kwargs or {}))

    for number in (0, 2, -1):
        with Sizes():
            output = x @ stack[number].T
        torch.testing.assert_close(output, x @ wanted[number].T)
    assert multiplied <= max(S * C, N * C)
    torch.testing.assert_close(stack.sum((1, 2)), wanted.sum((1, 2)))
    torch.testing.assert_close(stack[1:].pow(2), wanted[1:] ** 2)
    assert not calls

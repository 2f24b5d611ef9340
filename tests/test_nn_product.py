"""Layers in the place of a weight: every product that code writes gives what it gave."""

import copy
import itertools
import math
import pickle
import warnings

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that every torch user knows

from taut.nn import Product, product_uses, weight_axes
from taut.structure.product_uses import as_product

B, T, C, N, H, D = 2, 3, 8, 12, 4, 2

WHOLE = {
    "linear": ((N, C), (1,), lambda x, w: F.linear(x, w, x.new_ones(N))),
    "x @ w.T": ((N, C), (1,), lambda x, w: x @ w.T),
    "x @ w": ((C, N), (0,), lambda x, w: x @ w),
    "x.matmul": ((C, N), (0,), lambda x, w: x.matmul(w)),
    "w @ x": ((N, T), (1,), lambda x, w: w @ x),
    "w @ vector": ((N, C), (1,), lambda x, w: w @ x[0, 0]),
    "vector @ w": ((C, N), (0,), lambda x, w: x[0, 0] @ w),
    "mv": ((N, C), (1,), lambda x, w: torch.mv(w, x[0, 0])),
    "mm": ((N, C), (1,), lambda x, w: torch.mm(w, x[0].t())),
    "matmul": ((N, C), (1,), lambda x, w: torch.matmul(x, w.transpose(0, 1))),
    "inner": ((N, C), (1,), torch.inner),
    "addmm": ((N, C), (1,), lambda x, w: torch.addmm(x.new_ones(N), x.view(-1, C), w.t(), beta=0.5, alpha=2)),
    "bmm": ((C, N), (0,), lambda x, w: torch.bmm(x, w.expand(B, -1, -1))),
    "baddbmm": ((C, N), (0,), lambda x, w: torch.baddbmm(x.new_ones(N), x, w[None].expand(B, -1, -1))),
    "axes of length 1": ((1, 1, C, N), (2,), lambda x, w: x @ w),
    "tensordot": ((C, N), (0,), lambda x, w: torch.tensordot(x, w, dims=1)),
    "tensordot of heads": ((H, D, N), (0, 1), lambda x, w: torch.tensordot(x.view(B, T, H, D), w, ((2, 3), (0, 1)))),
    "einsum": ((N, C), (1,), lambda x, w: torch.einsum("btc,oc->bto", x, w)),
    "einsum, turned": ((N, C), (1,), lambda x, w: torch.einsum("oc,btc->otb", w, x)),
    "einsum with dots": ((N, C), (1,), lambda x, w: torch.einsum("...c,oc->...o", x, w)),
    "einsum without an arrow": ((N, C), (1,), lambda x, w: torch.einsum("btc,oc", x, w)),
    "einsum, heads out": ((H, C, D), (1,), lambda x, w: torch.einsum("btc,hcd->bhtd", x, w)),
    "einsum, heads in": ((H, D, N), (0, 1), lambda x, w: torch.einsum("bhtd,hdo->bto", x.view(B, H, T, D), w)),
    "einsum, heads last": ((N, D, H), (1, 2), lambda x, w: torch.einsum("bhtd,odh->bot", x.view(B, H, T, D), w)),
    "a view": ((N, C), (1,), lambda x, w: torch.einsum("btc,nhc->nbht", x, w.view(3, 4, C))),
    "a turned view": ((C, N), (0,), lambda x, w: torch.einsum("btc,nhc->nbht", x, w.T.reshape(3, 4, C))),
    "a view of the inputs": (
        (N, C),
        (1,),
        lambda x, w: torch.einsum("bthd,ohd->bto", x.view(B, T, H, D), w.view(N, H, D)),
    ),
    "turned inside": ((N, C), (1,), lambda x, w: torch.einsum("btdh,ohd->bto", x.view(B, T, D, H), w.view(N, H, D))),
    "one row": ((1, C), (1,), F.linear),
    "in its own dtype": ((N, C), (1,), lambda x, w: F.linear(x, w.to(x.dtype).type_as(x))),
    "sizes": ((N, C), (1,), lambda x, w: F.linear(x, w) * w.shape[0] / w.size(1) + len(w) + w.numel() + w.dim()),
}

PARTS = {
    "chunk": ((N, C), (1,), (4, 4, 4), lambda x, w: torch.cat([F.linear(x * k, p) for k, p in enumerate(w.chunk(3))])),
    "split": ((N, C), (1,), (6, 4, 2), lambda x, w: torch.cat([x @ p.t() for p in w.split([6, 4, 2])], -1)),
    "slices": ((N, C), (1,), (4, 8), lambda x, w: torch.cat([F.linear(x, w[:4]), F.linear(2 * x, w[4:])], -1)),
    "columns": ((C, N), (0,), (4, 8), lambda x, w: torch.cat([x @ w[:, :4], F.linear(2 * x, w.T[4:])], -1)),
    "all besides": ((N, C), (1,), (4, 8), lambda x, w: torch.cat([F.linear(x, w[:4]), F.linear(2 * x, w)], -1)),
    "by number": ((3, 4, C), (2,), (4, 4, 4), lambda x, w: torch.cat([F.linear(x, w[k]) for k in (2, 0, -2)])),
    "unbind": ((3, C, 4), (1,), (4, 4, 4), lambda x, w: torch.cat([x @ p for p in torch.unbind(w)])),
    "iterated": ((3, C, 4), (1,), (4, 4, 4), lambda x, w: torch.cat([x @ p for p in w])),
    "of a view": ((N, C), (1,), (4, 4, 4), lambda x, w: torch.cat([F.linear(x, p) for p in w.view(3, 4, C)])),
}

FORMS = {**{name: (*form[:2], (), form[2]) for name, form in WHOLE.items()}, **PARTS}


E, S = 4, 10

CHOSEN = torch.tensor([0, 3, 3, -3, 0, 0, 3, 1, 1, 3])
"""An expert for every row; none has the third."""

STACKS = {
    "one by a tensor": (2, lambda x, w: torch.cat([F.linear(x, w[torch.tensor(k)]) for k in (3, 0)])),
    "chosen, bmm": (2, lambda x, w: torch.bmm(w[CHOSEN], x[:, :, None]).squeeze(-1)),
    "chosen, turned": (2, lambda x, w: (x[:, None] @ w[CHOSEN].transpose(1, 2)).squeeze(1)),
    "chosen, inputs first": (1, lambda x, w: torch.bmm(x[:, None], w[CHOSEN]).squeeze(1)),
    "chosen, einsum": (2, lambda x, w: torch.einsum("soc,sc->so", w[CHOSEN], x)),
    "each its own rows": (2, lambda x, w: torch.einsum("esc,eoc->eso", x[:8].view(E, 2, C), w)),
    "bmm": (1, lambda x, w: torch.bmm(x[:8].view(E, 2, C), w)),
    "all rows by each": (1, lambda x, w: x @ w),
    "all rows by each, einsum": (2, lambda x, w: torch.einsum("sc,eoc->seo", x, w)),
}


@pytest.mark.parametrize("name", STACKS)
def test_products_with_a_stack_of_matrices(name):
    inputs, product = STACKS[name]
    torch.manual_seed(0)
    weight = torch.randn((E, N, C) if inputs == 2 else (E, C, N), dtype=torch.float64)
    layers, x = as_product(weight, (inputs,), (N,) * E), torch.randn(S, C, dtype=torch.float64)
    torch.testing.assert_close(product(x, layers), product(x, weight), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("turned", [False, True])
def test_grouped_products(turned):
    torch.manual_seed(0)
    weight, x, ends = torch.randn(E, 16, 16), torch.randn(12, 16), torch.tensor([3, 3, 7, 9], dtype=torch.int32)
    layers = as_product(weight, (2 if turned else 1,), (16,) * E)
    output, wanted = (F.grouped_mm(x, w.mT if turned else w, offs=ends) for w in (layers, weight))
    torch.testing.assert_close(output[:9], wanted[:9])
    assert torch.equal(output[9:], torch.zeros(3, 16))


def test_a_graph_of_chosen_matrices_holds_for_other_choices():
    torch.manual_seed(0)
    layers = as_product(torch.randn(E, N, C), (2,), (N,) * E)

    class Choosing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, x, chosen):
            return torch.bmm(self.layers[chosen], x[:, :, None]).squeeze(-1)

    model, x = Choosing(), torch.randn(S, C)
    graph = torch.export.export(model, (x, CHOSEN)).module()
    for chosen in (CHOSEN, CHOSEN.flip(0), torch.full((S,), 2)):
        torch.testing.assert_close(graph(x, chosen), model(x, chosen))


def given_form(name):
    shape, summed, rows, product = FORMS[name]
    torch.manual_seed(0)
    weight, x = torch.randn(shape, dtype=torch.float64), torch.randn(B, T, C, dtype=torch.float64)
    return weight, x, as_product(weight, summed, rows), product


@pytest.mark.parametrize("name", FORMS)
def test_products_of_all_forms(name):
    weight, x, layers, product = given_form(name)
    calls = []
    for layer in layers.children():
        layer.register_forward_hook(lambda *_: calls.append(1))
    output, wanted = product(x, layers), product(x, weight)
    torch.testing.assert_close(output, wanted, rtol=1e-12, atol=1e-12)
    assert len(calls) >= len(list(layers.children()))


class Using(nn.Module):
    def __init__(self, weight, product):
        super().__init__()
        self.weight, self.product = weight, product

    def forward(self, x):
        return self.product(x, self.weight)


@pytest.mark.parametrize("name", ["x @ w.T", "einsum, heads in", "chunk"])
def test_what_torch_does_with_models_works(name):
    _, x, layers, product = given_form(name)
    model = Using(layers, product).eval()
    wanted = model(x)
    assert torch.equal(copy.deepcopy(model)(x), wanted)
    assert torch.equal(product(x, pickle.loads(pickle.dumps(layers))), wanted)  # noqa: S301 - our own
    assert torch.equal(torch.func.functional_call(model, dict(model.named_parameters()), (x,)), wanted)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), wanted)
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(torch.jit.trace(model, x)(x), wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.float()(x.float()).dtype == torch.bfloat16
    assert model.half().weight.dtype == torch.float16


USES = {
    "norm": lambda x, w: w.norm(),
    "sum": lambda x, w: torch.sum(w),
    "scaled": lambda x, w: F.linear(x, w * 2),
    "added to": lambda x, w: x @ (w + 1).T,
    "other side": lambda x, w: torch.ones(2, N).double() @ w,
    "other rows": lambda x, w: F.linear(x, w[:5]),
    "some columns": lambda x, w: F.linear(x[..., :4], w[:, :4]),
    "every second row": lambda x, w: F.linear(x, w[::2]),
    "chosen rows": lambda x, w: F.linear(x, w[torch.tensor([0, 2])]),
    "a table": lambda x, w: F.embedding(torch.tensor([1]), w),
    "more bits": lambda x, w: F.linear(x, w.float().double()),
    "not in its dtype": lambda x, w: F.linear(x, w.float()),
    "detached": lambda x, w: F.linear(x, w.detach()),
    "with itself": lambda x, w: w @ w.T,
    "three at once": lambda x, w: torch.einsum("btc,oc,bt->bo", x, w, x[..., 0]),
    "a diagonal": lambda x, w: torch.einsum("btc,cc->bt", x, w[:C]),
    "summed alone": lambda x, w: torch.einsum("btc,oc->bt", x, w),
    "as a number": lambda x, w: float(w[0, 0]),
    "as an array": lambda x, w: w.numpy(),
    "a power": lambda x, w: w.pow(2) + w**2,
    "of a part": lambda x, w: w[2:7].T[3].sum() + w.chunk(3)[2].abs().max() + torch.linalg.norm(w.view(3, 4, C)[1, 2:]),
    "of chosen parts": lambda x, w: w.view(3, 4, C)[torch.tensor([2, 0, 2])].exp(),
    "of a repeated part": lambda x, w: w[3:5].expand(2, 2, C).cumsum(0),
    "in fewer bits": lambda x, w: w.bfloat16().sum(),
    "into another": lambda x, w: torch.add(w, 1, out=torch.empty(N, C, dtype=w.dtype)),
}

WRITES = {
    "in place": lambda x, w: w.mul_(2),
    "by index": lambda x, w: w.__setitem__(0, 1),
    "into a part": lambda x, w: w[0].fill_(1),
    "into a part by index": lambda x, w: w.T.__setitem__(0, 1),
    "by an operator": lambda x, w: w.__iadd__(1),
    "as data": lambda x, w: w.data,
    "a start": lambda x, w: nn.init.zeros_(w),
    "a result": lambda x, w: torch.add(x[0, 0], 1, out=w),
    "a gradient": lambda x, w: w.grad,
}


@pytest.mark.parametrize("name", USES)
def test_all_other_uses_get_the_weight_s_values(name):
    """Or torch's own error."""
    torch.manual_seed(0)
    weight, x = nn.Parameter(torch.randn(N, C, dtype=torch.float64)), torch.randn(B, T, C, dtype=torch.float64)
    layers = as_product(weight, (1,), (5, 7) if name != "chosen rows" else ())
    try:
        wanted = USES[name](x, weight)
    except RuntimeError as error:
        with pytest.raises(type(error)):
            USES[name](x, layers)
    else:
        given = USES[name](x, layers)
        assert given == wanted if isinstance(wanted, float) else torch.equal(given, wanted)
    with pytest.raises((TypeError, AttributeError), match="made a layer by taut"):
        USES[name](x, as_product(weight, (1,), (), trial=True))


@pytest.mark.parametrize("name", WRITES)
def test_nothing_is_written_into_a_weight_that_is_layers(name):
    layers = as_product(torch.randn(N, C), (1,), ())
    with pytest.raises((TypeError, AttributeError), match="made a layer by taut"):
        WRITES[name](torch.randn(B, T, C), layers)


def test_values_of_layers_that_became_others_and_their_gradients():
    torch.manual_seed(0)
    layers = as_product(torch.randn(4, 3, 6, dtype=torch.float64), (0, 2), ())
    chain = nn.Sequential(nn.Linear(24, 2, bias=False), nn.Linear(2, 3, bias=False)).double()
    layers.add_module("0", chain)
    weight = (chain[1].weight @ chain[0].weight).view(3, 4, 6).transpose(0, 1)
    torch.testing.assert_close(layers.pow(2), weight**2)
    (gradient,) = torch.autograd.grad(layers.pow(2).sum(), chain[0].weight)
    torch.testing.assert_close(gradient, torch.autograd.grad((weight**2).sum(), chain[0].weight)[0])


def test_a_weight_in_fewer_bits():
    torch.manual_seed(0)
    weight, x = torch.randn(N, C), torch.randn(B, T, C)
    layers, few = as_product(weight, (1,), ()), torch.bfloat16
    assert (layers.to(few).dtype, layers.T.bfloat16().mT.dtype) == (few, few)
    output = x.to(few) @ layers.to(few).T
    torch.testing.assert_close(output, x.to(few) @ weight.to(few).T, rtol=0.02, atol=0.1)
    with torch.autocast("cpu", few):
        assert torch.equal(x.to(few) @ layers.to(few).T, x.to(few) @ weight.to(few).T)
    assert (
        torch.export.export(Using(layers, lambda x, w: x @ w.to(x.dtype).T), (x.to(few),)).module()(x.to(few)).dtype
        == few
    )


VIEWS = {
    "turned": lambda t, draw: t.permute(draw(st.permutations(range(t.ndim)))),
    "reshaped": lambda t, draw: t.reshape(
        draw(st.sampled_from([n for n in range(1, 25) if t.shape.numel() % n == 0])), -1
    ),
    "chunk": lambda t, draw: t.chunk(2, dim := draw(st.integers(0, t.ndim - 1)))[
        draw(st.integers(0, min(t.shape[dim], 2) - 1))
    ],
    "slice": lambda t, draw: t[draw(st.integers(0, t.shape[0] - 1)) :],
    "one more axis": lambda t, draw: t.unsqueeze(draw(st.integers(0, t.ndim))),
    "merged": lambda t, draw: t.flatten(draw(st.integers(0, t.ndim - 1))),
    "repeated": lambda t, _: t.expand(2, *t.shape),
    "by number": lambda t, draw: t[draw(st.integers(0, t.shape[0] - 1))],
}


def drawn_product(draw, shape):
    """A product of a tensor, drawn for a view of this shape: from either side, with batches or without."""
    kind = draw(st.sampled_from(["linear", "right", "left", "einsum"]))
    if kind == "einsum":
        axes = "abcdefgh"[: len(shape)]
        kept = draw(st.lists(st.sampled_from(axes), unique=True))
        of_x = draw(st.permutations(["n", *(a for a in axes if a not in kept or draw(st.booleans()))]))
        output = draw(st.permutations(["n", *kept]))
        sizes = dict(zip(axes, shape, strict=True), n=3)
        x = torch.randn([sizes[a] for a in of_x], dtype=torch.float64)
        return lambda w: torch.einsum(f"{''.join(of_x)},{axes}->{''.join(output)}", x, w)
    before = draw(st.sampled_from([(), (1,), shape[:-2], (1,) * len(shape[:-2])]))
    if kind == "linear":
        x = torch.randn(*before, shape[-1], dtype=torch.float64)
        return lambda w: F.linear(x, w)
    if kind == "left":
        x = torch.randn(*before, shape[-1], 3, dtype=torch.float64)
        return lambda w: w @ x
    x = torch.randn(*before, 3, shape[-2] if len(shape) > 1 else 1, dtype=torch.float64)
    return lambda w: x @ w


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_products_with_any_view_are_what_they_were_or_errors(data):
    torch.manual_seed(0)
    weight = torch.randn(data.draw(st.sampled_from([(4, 6), (2, 4, 6), (4, 1, 6), (2, 2, 2, 3)])), dtype=torch.float64)
    view, views = weight, []
    for name in data.draw(st.lists(st.sampled_from(sorted(VIEWS)), max_size=2)):
        assume(view.ndim > 0)
        choices: list[object] = []
        view = VIEWS[name](view, lambda strategy, kept=choices: kept.append(data.draw(strategy)) or kept[-1])
        views.append((name, choices))
    assume(view.ndim > 0)
    product = drawn_product(data.draw, tuple(view.shape))
    try:
        wanted = product(view)
    except RuntimeError:  # nothing that code does
        return
    halves = data.draw(st.booleans())
    for summed in [k for n in range(1, weight.ndim) for k in itertools.combinations(range(weight.ndim), n)]:
        whole = weight.numel() // math.prod(weight.shape[axis] for axis in summed)
        layers = as_product(weight, summed, (whole // 2,) * 2 if halves and whole % 2 == 0 else ())
        try:
            for name, choices in views:
                again = iter(choices)
                layers = VIEWS[name](layers, lambda _, again=again: next(again))
            output = product(layers)
        except (TypeError, AttributeError) as error:
            assert "made a layer by taut" in str(error)  # noqa: PT017 - or there is an output, which is compared
            continue
        torch.testing.assert_close(output, wanted)


@pytest.mark.parametrize("start", [-8, -3, 0, 5])
def test_a_range_that_is_counted_from_the_end(start):
    weight = torch.randn(N, C)
    assert torch.equal(as_product(weight, (1,), ()).narrow(1, start, 3).sum(0), weight.narrow(1, start, 3).sum(0))


@pytest.mark.parametrize("part", [(0, 0, N + 1), (0, -2, 3), (1, C, 1), (1, -C - 1, 1), (0, 1, -1)])
def test_a_range_that_is_not_within_the_weight_is_refused(part):
    weight = torch.randn(N, C)
    for one in (weight, as_product(weight, (1,), ())):
        with pytest.raises((RuntimeError, IndexError)):
            one.narrow(*part)


EXPRESSIONS = {
    "permute": lambda w: w.permute(-1, 0, -2),
    "transpose": lambda w: w.transpose(-1, 0),
    "swapaxes": lambda w: w.swapaxes(1, -1).swapdims(0, -2),
    "movedim": lambda w: w.movedim((0, -1), (-1, 0)).moveaxis(-2, 0),
    "reshape": lambda w: w.reshape(-1, 6).view(2, 2, -1),
    "flatten": lambda w: w.flatten(-2).flatten(0, -1),
    "unflatten": lambda w: w.unflatten(-1, (2, -1)).unflatten(-3, (-1, 1)),
    "squeeze": lambda w: w.unsqueeze(-1).unsqueeze(-3).squeeze(-3).squeeze(),
    "expand": lambda w: w.unsqueeze(0).expand(2, -1, -1, 6).contiguous(),
    "T": lambda w: w[0].T.t().mT,
    "chunk": lambda w: torch.cat(w.chunk(4, -1), 0),
    "chunk of fewer": lambda w: torch.stack(w.chunk(5, -2), 1),
    "split": lambda w: torch.cat(w.split(4, -1)[::-1], -1),
    "split by sizes": lambda w: torch.cat(torch.split(w, [1, 2], dim=-2)[::-1], -2),
    "split with sizes": lambda w: w.split_with_sizes([5, 1], -1)[1],
    "split beyond": lambda w: w.split([5, 2], -1)[1],
    "split short": lambda w: w.split([2, 1], -1)[1],
    "unbind": lambda w: torch.stack(w.unbind(-2)),
    "select": lambda w: w.select(-1, -2),
    "select beyond": lambda w: w.select(-1, 6),
    "select of no axis": lambda w: w.select(3, 0),
    "narrow": lambda w: w.narrow(-1, -4, 3),
    "narrow of no axis": lambda w: w.narrow(4, 0, 1),
    "flatten of no axis": lambda w: w.flatten(3),
    "permute of fewer": lambda w: w.permute(1, 0),
    "permute of one twice": lambda w: w.permute(0, 1, 1),
    "unsqueeze of no axis": lambda w: w.unsqueeze(5),
    "squeeze of no axis": lambda w: w.squeeze(4),
    "t of three axes": lambda w: w.t(),
    "ranges": lambda w: w[-1:, :-1, -5:-1],
    "an empty range": lambda w: w[:, 2:1],
    "dots": lambda w: w[..., None, -1],
    "steps": lambda w: w[:, ::2, 1::3],
    "numbers": lambda w: w[torch.tensor([1, -4]), 1],
    "a mask": lambda w: w[torch.tensor([True, False, True, False])],
    "a truth": lambda w: w[True],
    "einsum": lambda w: torch.einsum("abc,nc->nba", w, torch.ones(2, 6).double().cumsum(0)),
    "einsum of two sums": lambda w: torch.einsum("abc,bc->a", w, torch.ones(3, 6).double().cumsum(0)),
    "einsum of batches": lambda w: torch.einsum("abc,ac->ab", w, torch.ones(4, 6).double().cumsum(0)),
    "right": lambda w: torch.ones(2, 6).double().cumsum(1) @ w.mT,
    "left": lambda w: w @ torch.ones(6, 2).double().cumsum(1),
    "bmm": lambda w: torch.bmm(w, torch.ones(4, 6, 2).double().cumsum(0)),
    "tensordot": lambda w: torch.tensordot(w, torch.ones(6, 2).double().cumsum(0), dims=([-1], [-2])),
    "linear by a part": lambda w: F.linear(torch.ones(2, 6).double().cumsum(1), w[-3]),
}


def found(expression, weight):
    """What it gives, as values; or that it is an error."""
    try:
        return expression(weight) + 0
    except (RuntimeError, IndexError, TypeError, AttributeError, ValueError):
        return None


@pytest.mark.parametrize(
    "form", [((2,), (), False), ((2,), (3, 3, 3, 3), False), ((2,), (), True), ((0, 1), (), False)]
)
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_expressions_give_what_they_did_or_are_errors(name, form):
    torch.manual_seed(0)
    weight, (summed, rows, stacked) = torch.randn(4, 3, 6, dtype=torch.float64), form
    wanted = found(EXPRESSIONS[name], weight)
    given = found(EXPRESSIONS[name], as_product(weight, summed, rows, stacked=stacked))
    assert (given is None) == (wanted is None)
    if wanted is not None:
        torch.testing.assert_close(given, wanted, rtol=1e-12, atol=1e-12)


REPEATED = {
    "made longer": lambda x, w: x[:, :1] @ w.expand(B, 5, -1, -1),
    "one for all": lambda x, w: x[:1] @ w.expand(5, -1, -1),
    "from the left": lambda x, w: w.mT.expand(5, -1, -1) @ x[:1].mT,
}


@pytest.mark.parametrize("name", REPEATED)
def test_a_weight_that_is_repeated_where_the_tensor_is_not_is_no_layer(name):
    layers = as_product(torch.randn(C, N), (0,), (), trial=True)
    with pytest.raises(TypeError, match="made a layer by taut"):
        REPEATED[name](torch.randn(B, 1, 1, C)[:, 0] if name != "made longer" else torch.randn(B, 1, T, C), layers)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_einsum_of_a_tensor_and_a_weight(data):
    """Which axes are summed over, which remain, in which order: as einsum itself has it."""
    sizes = dict(zip("abcde", (2, 3, 4, 1, 5), strict=True))
    letters = st.lists(st.sampled_from("abcde"), min_size=1, max_size=4, unique=True)
    of_x, of_weight = data.draw(letters), data.draw(letters)
    summed = [axis for axis in of_weight if axis in of_x]
    assume(any(sizes[axis] > 1 for axis in summed))
    output = data.draw(
        st.permutations([*(a for a in of_x if a not in summed), *(a for a in of_weight if a not in summed)])
    )
    equation = f"{''.join(of_x)},{''.join(of_weight)}->{''.join(output)}"
    x, weight = (torch.randn([sizes[a] for a in axes], dtype=torch.float64) for axes in (of_x, of_weight))
    layers = as_product(weight, [k for k, a in enumerate(of_weight) if a in summed], ())
    torch.testing.assert_close(torch.einsum(equation, x, layers), torch.einsum(equation, x, weight))
    swapped = f"{''.join(of_weight)},{''.join(of_x)}->{''.join(output)}"
    torch.testing.assert_close(torch.einsum(swapped, layers, x), torch.einsum(equation, x, weight))


def test_it_says_what_a_weight_would():
    layers = as_product(torch.randn(N, C).bfloat16(), (1,), (4, 8))
    assert isinstance(layers, Product)
    assert layers.shape == (N, C)
    assert layers.dtype == torch.bfloat16
    assert layers.device.type == "cpu"
    assert layers.requires_grad is False
    assert layers.is_floating_point()
    assert layers.T.shape == (C, N)
    assert layers.view(3, 4, C)[1].shape == (4, C)
    assert torch.zeros_like(layers).shape == (N, C)
    assert torch.ones(2).to(layers).dtype == torch.bfloat16
    assert layers(torch.ones(1, C).bfloat16()).shape == (1, N)
    assert "summed=(1,)" in repr(layers)


def test_how_a_product_uses_a_weight_is_found_out_once(monkeypatch):
    found = []
    monkeypatch.setattr(product_uses, "_use_of", lambda key, use=product_uses._use_of: found.append(key) or use(key))
    layers, x = as_product(torch.randn(E, N, C), (2,), (N,) * E), torch.randn(S, C)
    for length in (1, 2, 3):  # lengths of axes that the weight has none of change nothing
        for number in range(E):
            F.linear(x[:length], layers[number])
    assert len(found) == E
    weight_axes._REMEMBERED.clear()


def test_what_is_remembered_does_not_grow(monkeypatch):
    monkeypatch.setattr(weight_axes, "MOST_REMEMBERED", 4)
    weight_axes._REMEMBERED.clear()
    assert [weight_axes.remembered(int, text) for text in "0123456789" * 2] == [*range(10)] * 2
    assert len(weight_axes._REMEMBERED) <= 4


def test_parts_by_number_are_those_of_tensors():
    weight = torch.randn(E, N, C)
    layers = as_product(weight, (2,), (N,) * E)
    for number in (0, -1, E - 1, -E):
        assert layers[number].shape == weight[number].shape
        torch.testing.assert_close(F.linear(torch.eye(C), layers[number]), weight[number].T)
    for number in (E, -E - 1):
        with pytest.raises(IndexError):
            layers[number]

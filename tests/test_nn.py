"""The modules that are not plain torch.nn: what they compute, and their plain counterparts."""

import copy

import pytest
import torch
from torch import nn

from taut.nn import Attention, Basis, Fastfood, GroupedLinear, LowRankSparse, Skipped, StateLinear

SHAPES = {0: (), 1: (5,), 2: (4, 3), 3: (2, 3, 2)}


def shared(n, k):
    return nn.Parameter(torch.linalg.qr(torch.randn(n, n).double())[0][:, :k].contiguous())


@pytest.mark.parametrize("axes", [0, 1, 2, 3])
@pytest.mark.parametrize("batch", [(), (2,)], ids=["single", "batch"])
@pytest.mark.parametrize("inner", [1, 4])
def test_a_basis_gathers_and_spreads(axes, batch, inner):
    G = shared(7, 3)
    x = torch.randn(*batch, 7 * inner, *SHAPES[axes]).double()
    gather, spread = (
        Basis(G, axes, inner=inner),
        Basis(G, axes, spread=True, bias=nn.Parameter(torch.randn(7).double())),
    )
    rows = x.movedim(len(batch), -1).unflatten(-1, (7, inner))
    wanted = torch.einsum("...nr,nk->...kr", rows, G).flatten(-2).movedim(-1, len(batch))
    torch.testing.assert_close(gather(x), wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(gather.to_plain()(x), wanted, rtol=0, atol=1e-12)
    if inner == 1:
        back = (wanted.movedim(len(batch), -1) @ G.mT + spread.bias).movedim(-1, len(batch))
        torch.testing.assert_close(spread(gather(x)), back, rtol=0, atol=1e-12)
        torch.testing.assert_close(spread.to_plain()(gather(x)), back, rtol=0, atol=1e-12)


def test_a_full_orthonormal_basis_is_undone_by_itself():
    G = shared(6, 6)
    x = torch.randn(3, 6, 4, 4).double()
    torch.testing.assert_close(Basis(G, 2, spread=True)(Basis(G, 2)(x)), x, rtol=0, atol=1e-10)


def test_one_parameter_is_counted_trained_and_copied_as_one():
    G = shared(6, 2)
    net = nn.Sequential(Basis(G, 0), nn.ReLU(), Basis(G, 0, spread=True))
    assert sum(p.numel() for p in net.parameters()) == 12
    copied = copy.deepcopy(net)
    assert copied[0].weight is copied[2].weight
    optimizer = torch.optim.SGD(copied.parameters(), 0.1)
    copied(torch.randn(5, 6).double()).square().sum().backward()
    optimizer.step()
    assert copied[0].weight is copied[2].weight
    assert not torch.equal(copied[0].weight, G)


def test_plain_bases_are_untied():
    G = shared(6, 2)
    plain = Basis(G, 0).to_plain()
    assert type(plain) is nn.Linear
    assert plain.weight.data_ptr() != G.data_ptr()
    assert type(Basis(G, 2, spread=True).to_plain()) is nn.Conv2d
    assert "gather 6 -> 2" in repr(Basis(G, 0))
    assert "spread 2 -> 6" in repr(Basis(G, 0, spread=True))


def test_a_sparse_part_adds_its_weights():
    first, second = nn.Linear(5, 2, bias=False), nn.Linear(2, 4)
    module = LowRankSparse(first, second, nn.Parameter(torch.tensor([2.0, -1.0])), torch.tensor([7, 13]))
    x = torch.randn(3, 5)
    R = torch.zeros(4, 5)
    R[1, 2], R[2, 3] = 2, -1
    assert torch.equal(module.residual(), R)
    torch.testing.assert_close(module(x), second(first(x)) + x @ R.T)
    torch.testing.assert_close(module.to_plain()(x), module(x))
    assert module.half().places.dtype == torch.int32


@pytest.mark.parametrize("source", [0, 1, "x"])
@pytest.mark.parametrize("items", [None, 1, 3])
def test_a_skipped_block_gives_its_input_or_zeros_in_the_form_of_the_block(source, items):
    x, y = torch.randn(2, 3), torch.ones(2, 3)
    args, kwargs = {0: ((x, y), {}), 1: ((y, x), {}), "x": ((y,), {"x": x})}[source]
    for way, wanted in (("pass", x), ("zero", torch.zeros(2, 3))):
        output = Skipped(way, source, items, {"kind": "residual"})(*args, **kwargs)
        first = output if items is None else output[0]
        assert torch.equal(first, wanted)
        assert first is not x  # code behind it may write to it
        assert items is None or output[1:] == (None,) * (items - 1)


def test_a_skipped_block_answers_as_the_block():
    module = Skipped(answers={"kind": "residual"})
    assert module.kind == "residual"
    assert not module.state_dict()
    with pytest.raises(AttributeError, match="other"):
        _ = module.other


LAYERS = {
    "attention": lambda: (Attention(8, 2, batch_first=True), lambda layer, x: layer(x, x, x)[0]),
    "fastfood": lambda: (Fastfood(nn.Linear(8, 8), 0), lambda layer, x: layer(x)),
    "a sum of two": lambda: (
        LowRankSparse(nn.Linear(8, 2), nn.Linear(2, 8), nn.Parameter(torch.ones(2)), torch.tensor([7, 13])),
        lambda layer, x: layer(x),
    ),
    "a stack": lambda: (GroupedLinear(8, 8, groups=2), lambda layer, x: layer(x.mT).mT),
    "a state": lambda: (StateLinear(8, 8), lambda layer, x: layer(x)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_an_empty_batch_has_an_empty_result(name):
    layer, run = LAYERS[name]()
    assert run(layer.eval(), torch.ones(0, 3, 8)).shape == (0, 3, 8)

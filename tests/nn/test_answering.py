"""What stands for a weight answers as the weight, and refuses what would be lost."""

import pytest
import torch
from torch import nn

from taut.nn import Attention, Product, Recurrent, Tied
from taut.nn.answering import Answering
from taut.nn.tensor_names import written


def tied():
    """Both ends of a weight in factors."""
    table, basis = nn.Parameter(torch.randn(7, 2)), nn.Parameter(torch.randn(4, 2))
    reads, gives = nn.Embedding(7, 2), nn.Linear(2, 7)
    reads.weight = gives.weight = table
    return nn.ModuleDict({"words": Tied(reads, basis), "head": Tied(gives, basis)})


def factorized():
    layer = Recurrent.of(nn.LSTM(5, 4))
    layer.inputs[0] = nn.Sequential(nn.Linear(5, 2, bias=False), nn.Linear(2, 16))
    return layer


def product():
    return Product((6, 4), (1,), [nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 6, bias=False))])


COMPUTED = {
    "embedding": (lambda: tied()["words"], lambda m: m.weight),
    "head": (lambda: tied()["head"], lambda m: m.weight),
    "recurrent": (factorized, lambda m: m.weight_ih_l0),
    "attention": (lambda: Attention(4, 2), lambda m: m.in_proj_weight),
    "product": (product, lambda m: m),
    "replaced": (lambda: Answering(nn.Linear(4, 2), nn.Linear(2, 6), answers={"weight": (6, 4)}), lambda m: m.weight),
}
EVERY = pytest.mark.parametrize(("make", "read"), COMPUTED.values(), ids=COMPUTED)


def augmented(w):
    w += 1


def entry(w):
    w[3] = 0


def data_set(w):
    w.data = torch.zeros(2)


def grad_set(w):
    w.grad = torch.zeros(2)


LOST = {
    "init": nn.init.zeros_,
    "init of its own": nn.init.normal_,
    "method": lambda w: w.mul_(2),
    "entry": entry,
    "operator": augmented,
    "function": torch.relu_,
    "out": lambda w: torch.add(torch.ones(6, 4), 1, out=w),
    "foreach": lambda w: torch._foreach_mul_([w], 2),
    "data": lambda w: w.data.copy_(torch.zeros(tuple(w.shape))),
    "entry of data": lambda w: entry(w.data),
    "data is set": data_set,
    "gradient is set": grad_set,
    "detached": lambda w: w.detach().zero_(),
    "row": lambda w: w[0].fill_(0),
    "rows": lambda w: w[::2].zero_(),
    "turned": lambda w: w.t().zero_(),
    "view": lambda w: w.view(-1).zero_(),
    "part": lambda w: w.chunk(2)[0].zero_(),
    "view by a function": lambda w: torch.transpose(w, 0, 1).zero_(),
    "diagonal": lambda w: w.diagonal().fill_(1),
    "optimizer": lambda w: torch.optim.SGD([w], 0.1),
    "memory": lambda w: w.data_ptr(),
}


@EVERY
@pytest.mark.parametrize("write", LOST.values(), ids=LOST)
def test_what_would_be_lost_is_an_error(make, read, write):
    layer = make()
    before = [p.clone() for p in layer.parameters()]
    with (
        torch.no_grad(),
        pytest.raises((TypeError, AttributeError, ValueError), match=r"taut|non-leaf|optimize Tensors"),
    ):
        write(read(layer))
    assert all(torch.equal(p, old) for p, old in zip(layer.parameters(), before, strict=True))


@EVERY
def test_freezing_freezes_what_it_is_made_of(make, read):
    layer = make()
    read(layer).requires_grad = False
    frozen = {name for name, p in layer.named_parameters() if not p.requires_grad}
    assert frozen
    assert not read(layer).requires_grad
    assert not any(name.endswith("bias") for name in frozen)
    read(layer).requires_grad_(True)
    assert all(p.requires_grad for p in layer.parameters())


@EVERY
def test_what_only_reads_it_gets_its_values(make, read):
    layer = make()
    if isinstance(layer, Answering) and not isinstance(layer, Tied):
        return  # has no values
    weight = read(layer)
    whole, x = (weight * 1).contiguous(), torch.zeros(tuple(weight.shape))
    with torch.no_grad():
        x.copy_(weight)
        assert torch.equal(x, whole)
        x.zero_().add_(weight)
        assert torch.equal(x, whole)
    assert torch.equal(weight.view(-1) + 0, whole.view(-1))
    assert torch.equal(weight.detach() + 0, whole)
    assert torch.equal(torch.stack([row * 1 for row in weight]), whole)
    assert torch.equal(weight[1:3, :2] * 1, whole[1:3, :2])
    assert not weight.is_leaf


def test_what_a_layer_holds_is_written_to():
    layer = Attention(4, 2)
    layer.q_proj_weight.data.zero_()
    assert not layer.q_proj.weight.any()
    layer.q_proj_weight.requires_grad = False
    assert not layer.q_proj.weight.requires_grad
    torch.optim.SGD([layer.k_proj_weight], 0.1)


def test_what_a_function_writes_into():
    a, b = object(), object()
    assert written("add", (a, b), {}) == []
    assert written("add_", (a, b), {}) == [a]
    assert written("add", (a, a), {"out": b}) == [b]
    assert written("_foreach_add_", ([a, b], 1), {}) == [a, b]
    assert written("normal_", (), {"tensor": a}) == [a]

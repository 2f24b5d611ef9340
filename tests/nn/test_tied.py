"""Both ends of a weight in factors: tying them again ties what was torn apart."""

import pytest
import torch
from torch import nn

from taut.nn import Tied


def ends(rank=2, width=4):
    table, basis = nn.Parameter(torch.randn(7, rank)), nn.Parameter(torch.randn(width, rank))
    reads, gives = nn.Embedding(7, rank), nn.Linear(rank, 7)
    reads.weight = gives.weight = table
    return nn.ModuleDict({"words": Tied(reads, basis), "head": Tied(gives, basis)})


def are_one(net):
    return all(a is b for a, b in zip(net["words"].factors, net["head"].factors, strict=True))


def test_a_tie_that_was_broken_is_tied_again():
    net = ends()
    values = {key: torch.randn_like(value) for key, value in net.state_dict().items()}
    net.load_state_dict(values, assign=True)
    assert not are_one(net)
    net["head"].weight = net["words"].weight
    assert are_one(net)
    assert torch.equal(net["words"].table.weight, values["words.0.weight"])
    assert torch.equal(net["head"].dense(), net["words"].dense())


def test_an_end_of_another_weight_of_the_same_sizes_ties_to_that():
    net, other = ends(), ends()
    net["head"].weight = other["words"].weight
    assert net["head"].factors[0] is other["words"].factors[0]
    assert not are_one(net)


def test_tying_what_is_tied_changes_nothing():
    net = ends()
    before = net["head"].factors
    net["head"].weight = net["words"].weight
    assert all(a is b for a, b in zip(before, net["head"].factors, strict=True))


OTHERS = {
    "rank": lambda net: ends(3)["words"].weight,
    "width": lambda net: ends(width=5)["words"].weight,
    "a parameter": lambda net: nn.Parameter(torch.zeros(7, 4)),
    "a part": lambda net: net["words"].weight[:3],
    "turned": lambda net: net["words"].weight.t(),
    "no history": lambda net: net["words"].weight.data,
    "none": lambda net: None,
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_what_is_no_weight_of_such_an_end_is_refused(other):
    net = ends()
    with pytest.raises(AttributeError, match="in factors"):
        net["head"].weight = other(net)

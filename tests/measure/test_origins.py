"""Which tensors are made of parameters alone."""

import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from taut.measure.origins import Origins


def model():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    net.constant = torch.ones(4)
    return net


def test_parameters_have_names_constants_have_none_and_the_rest_is_input():
    net = model()
    origins = Origins(net)
    assert origins.of(net[0].weight) == {"0.weight"}
    assert origins.of(net[0].weight.detach().t()[1:]) == {"0.weight"}
    assert origins.of(net[1].running_mean) == origins.of(net.constant) == frozenset()
    assert origins.of(torch.ones(2)) is None


def test_what_is_added_is_known_until_input_is_written_into_it():
    net = model()
    origins, created = Origins(net), torch.ones(3)
    origins.add([created], frozenset({"0.bias"}))
    origins.add([created], frozenset({"0.weight"}))
    assert origins.of(created[1:]) == {"0.bias", "0.weight"}
    origins.drop([created[:1], net[0].weight, net[1].running_mean])
    assert origins.of(created) is None
    assert origins.of(net[1].running_mean) is None
    assert origins.of(net[0].weight) == {"0.weight"}  # a parameter stays one


def test_memory_that_is_used_again_is_not_mistaken():
    origins = Origins(model())
    for _ in range(50):
        origins.add([torch.ones(1000)], frozenset({"0.weight"}))
        assert origins.of(torch.ones(1000)) is None


def test_tensors_without_storage():
    net = nn.Module()
    net.weight = nn.Parameter(torch.eye(3).to_sparse(), requires_grad=False)
    net.wrapped = nn.Parameter(TwoTensor(torch.ones(2), torch.ones(2)))
    origins = Origins(net)
    assert origins.of(net.weight) == {"weight"}
    assert origins.of(torch.eye(3).to_sparse()) is None
    assert origins.of(net.wrapped.a) == origins.of(net.wrapped.b) == {"wrapped"}

"""Magnitude, Wanda and random scores."""

import pytest
import torch
from torch import nn

import taut
from cases import LAYERS, case, sequential
from taut import CallError
from taut.methods.masks.magnitude import Magnitude


def scored(model, example, data, name, **settings):
    network = taut.trace(model, example)
    stats = taut.observe(network, model, data)
    return Magnitude(**settings).scores({name: model.get_submodule(name)}, stats.layers)[0]


def test_wanda_sees_the_inputs_that_a_linear_gets():
    torch.manual_seed(0)
    net, x = sequential(fc=nn.Linear(5, 3), r=nn.ReLU(), out=nn.Linear(3, 2)), torch.randn(400, 5) * torch.arange(1, 6)
    found = scored(net, x[:2], [x], "fc", score="wanda")
    wanted = net.fc.weight.abs() * x.square().mean(0).sqrt()
    torch.testing.assert_close(found.float(), wanted, rtol=1e-4, atol=1e-6)


def test_wanda_sees_the_patches_that_a_convolution_gets():
    torch.manual_seed(0)
    net = sequential(conv=nn.Conv2d(3, 4, 3, padding=1), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten())
    x = torch.randn(64, 3, 6, 6) * torch.tensor([1.0, 2.0, 5.0])[:, None, None]
    found = scored(net, x[:2], [x], "conv", score="wanda")
    patches = nn.functional.unfold(x, 3, padding=1)
    rms = patches.square().mean((0, 2)).sqrt().reshape(1, 3, 3, 3)
    torch.testing.assert_close(found.float(), net.conv.weight.abs() * rms, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("one", LAYERS, ids=lambda one: one.name)
def test_every_flavour_of_layer_has_a_score_of_its_shape(one):
    model, example = case(one.name).make()
    network = taut.trace(model, example)
    stats = taut.observe(network, model, one.data())
    for layer in network.layers:
        if layer.skip is None:
            modules = {layer.name: model.get_submodule(layer.name)}
            for kind in ("magnitude", "wanda", "random"):
                (found,) = Magnitude(score=kind).scores(modules, stats.layers)
                assert found.shape == modules[layer.name].weight.shape


def test_wanda_without_data_says_what_is_missing():
    net = sequential(fc=nn.Linear(5, 3))
    network = taut.trace(net, torch.randn(2, 5))
    with pytest.raises(CallError, match="calibration data"):
        Magnitude(score="wanda").scores({"fc": net.fc}, taut.observe(network, net).layers)


def test_random_scores_repeat_with_the_seed():
    net = sequential(fc=nn.Linear(5, 3))
    first, same, other = (Magnitude(score="random", seed=s).scores({"fc": net.fc}, {})[0] for s in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)

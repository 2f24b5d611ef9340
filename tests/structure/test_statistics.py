"""The unit of damages, and decompositions that are made once."""

import torch

import taut
from cases import case
from taut.decompose.outputs import OutputMoment
from taut.structure.statistics import LayerStatistics


def test_damage_in_every_unit():
    error = torch.tensor([4.0, 0.0])
    assert LayerStatistics(outputs=OutputMoment(torch.ones(1, 1, 1)), positions=2.0).damage(error, 8.0).tolist() == [
        1.0,
        0.0,
    ]
    assert LayerStatistics().damage(error, 8.0).tolist() == [0.5, 0.0]
    assert LayerStatistics(scale=3.0).damage(error, 8.0).tolist() == [1.5, 0.0]
    assert LayerStatistics().damage(error, 0.0).tolist() == [0.0, 0.0]


def test_factors_are_made_once_per_family():
    model, example = case("vgg").make()
    net = taut.trace(model, example)
    stats = taut.observe(net, model, case("vgg").data())
    group = net.group(["conv1"])
    svd = taut.methods.METHODS["svd"]
    assert stats.factors(group, svd(rank=1)) is stats.factors(group, svd(rank=5))
    assert stats.factors(group, svd()) is not stats.factors(group, svd(metric="frobenius"))

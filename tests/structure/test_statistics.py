"""The unit of damages, and decompositions that are made once."""

import torch
from torch import nn

import taut
from cases import case, sequential
from taut.decompose.outputs import OutputMoment
from taut.structure.asides import transposed_outputs
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


def test_what_is_known_of_transposed_convolutions_and_tables_is_narrowed_with_them():
    model = sequential(
        table=nn.Embedding(9, 6), turn=Turn(), up=nn.ConvTranspose1d(6, 5, 3, stride=2), last=nn.Conv1d(5, 2, 1)
    ).eval()
    x = torch.randint(9, (16, 7))
    net = taut.trace(model, x[:2])
    stats = taut.observe(net, model, x, output="values")
    outputs, inputs = torch.tensor([0, 3]), torch.tensor([1, 2, 5])
    small = nn.Sequential()
    small.table, small.up = nn.Embedding(9, 3), nn.ConvTranspose1d(3, 2, 3, stride=2)
    cuts = {"table": (inputs, torch.arange(9)), "up": (outputs, inputs)}
    left = stats.narrowed(small, net.layers, cuts)
    before, now = stats.seen("up"), left.seen("up")
    assert left.module("up") is small.up
    assert torch.equal(now.weighting.channel, before.weighting.channel[:, inputs][..., inputs])
    assert torch.equal(now.outputs.full, before.outputs.full[:, outputs][..., outputs])
    assert torch.equal(now.kept[0], before.kept[0][:, inputs])
    with torch.no_grad():
        rows = transposed_outputs(small.up, small.up.weight.double(), torch.cat(now.kept))
    torch.testing.assert_close(now.products, rows.T @ rows / 16)
    torch.testing.assert_close(now.mean, rows.sum(0) / 16)
    before, now = stats.seen("table"), left.seen("table")
    assert torch.equal(now.counts, before.counts)
    assert torch.equal(now.outputs.full, before.outputs.full[:, inputs][..., inputs])


class Turn(nn.Module):
    """Positions last."""

    def forward(self, x):
        return x.transpose(1, 2)

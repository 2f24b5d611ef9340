"""What another weight of a transposed convolution gives otherwise, against the layer itself."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import taut
from taut.structure.statistics import LayerStatistics
from taut.structure.transposed_error import Trial


@pytest.mark.parametrize("metric", ["plain", "weighed"])
def test_error_is_the_sum_of_squares_over_all_positions(metric):
    model, x = nn.Sequential(nn.ConvTranspose2d(6, 5, 3, stride=2, padding=1)).eval(), torch.randn(16, 6, 4, 5)
    net = taut.trace(model, x[:2])
    known = taut.observe(net, model, x, output="values").asides["0"][1]
    change = torch.randn_like(model[0].weight)
    other = nn.Sequential(nn.ConvTranspose2d(6, 5, 3, stride=2, padding=1, bias=False)).eval()
    other[0].weight.data = change
    rows = other(x).movedim(1, -1).flatten(0, -2).double()
    outputs = known.outputs if metric == "weighed" else None
    wanted = rows.square().sum() if outputs is None else (rows @ outputs.full[0].double() * rows).sum()
    known = replace(known, outputs=outputs)
    assert Trial.of(model[0], known).error(change.double().flatten(2)) == pytest.approx(
        float(wanted) / len(x), rel=1e-4
    )


def test_without_inputs_nothing_is_tried():
    assert Trial.of(nn.ConvTranspose1d(2, 2, 3), LayerStatistics()) is None

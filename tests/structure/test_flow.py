"""Who reads whom in a run."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that every torch user knows

from taut.core.example import Example
from taut.structure.flow import flow_of


class Masked(nn.Module):
    def __init__(self, times):
        super().__init__()
        self.one, self.two, self.times = nn.Linear(6, 8), nn.Linear(8, 5), times
        self.register_buffer("gain", torch.rand(8))

    def forward(self, x):
        return self.two(self.times(self, x, F.relu(self.one(x))))


@pytest.mark.parametrize(
    ("times", "foreign"),
    [
        (lambda net, x, h: h * 2 + 1, False),
        (lambda net, x, h: h * net.gain.view(1, -1), False),
        (lambda net, x, h: h * h.sigmoid(), False),
        (lambda net, x, h: h * (x != 0).any(-1, keepdim=True), True),
        (lambda net, x, h: h.add_((x != 0).any(-1, keepdim=True)).tanh(), True),
        (lambda net, x, h: h - x[:, :1], True),
    ],
)
def test_tensors_that_come_from_no_layer_are_noted(times, foreign):
    model = Masked(times).eval()
    assert flow_of(model, Example(model, torch.randn(3, 6))).foreign == ({"two"} if foreign else set())


def test_layers_called_with_keywords_read_too():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 5)

        def forward(self, x):
            return self.two(input=self.one(x))

    model = Named().eval()
    assert flow_of(model, Example(model, torch.randn(3, 6))).readers["one"] == {"two"}


def test_layers_that_are_not_called_are_named():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
    model[0].add_module("aux", nn.Linear(8, 2))
    flow = flow_of(model, Example(model, torch.randn(3, 6)))
    assert flow.uncalled == ("0.aux",)
    assert not flow.whole

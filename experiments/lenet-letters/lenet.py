"""The source's net, derived from its printed totals, and nets of the same shape and any size."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn

CONV, FC = ("conv1", "conv2"), ("fc1", "fc2", "fc3")
LETTERS = 26
WIDTHS = (6, 16, 120, 84)
"""Channels and units: 82,554 parameters, of them 918 weights in the convolutions and 81,384 behind."""

LARGER = (32, 64, 120, 84)
"""The same net with 18,720 weights in the convolutions."""

CORNER = 6
"""Pixels a side that are left of 32 behind two 3 x 3 convolutions and two poolings."""


def lenet(seed: int = 0, widths: tuple[int, ...] = WIDTHS) -> Any:
    """Two convolutions with ReLU and max pooling, three dense layers; torch's own random start."""
    a, b, c, d = widths
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = OrderedDict(
            conv1=nn.Conv2d(1, a, 3),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(a, b, 3),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flat=nn.Flatten(),
            fc1=nn.Linear(b * CORNER**2, c),
            relu3=nn.ReLU(),
            fc2=nn.Linear(c, d),
            relu4=nn.ReLU(),
            fc3=nn.Linear(d, LETTERS),
        )
    return nn.Sequential(layers)


def size(widths: tuple[int, ...]) -> int:
    """Parameters of a net of these widths."""
    a, b, c, d = widths
    return a * 10 + b * (9 * a + 1) + c * (b * CORNER**2 + 1) + d * (c + 1) + LETTERS * (d + 1)


def widths_for(params: int) -> tuple[int, ...]:
    """The widths of both dense layers times one number, so that the size comes nearest to `params`."""
    a, b, c, d = WIDTHS
    tried = ((a, b, max(1, round(c * step / 1000)), max(1, round(d * step / 1000))) for step in range(20, 1001))
    return min(tried, key=lambda widths: abs(size(widths) - params))


def kept(net: nn.Module) -> int:
    """Weights that are not zero, and all biases: what a net with masks has left."""
    biases = {id(module.bias) for module in net.modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    return sum(p.numel() if id(p) in biases else int(p.count_nonzero()) for p in net.parameters())

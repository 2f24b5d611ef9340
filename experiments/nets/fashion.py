"""The two nets of the Fashion-MNIST studies: VGG-style (583,498 parameters) and ResNet-style (174,458)."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

MEAN, STD = 0.2860, 0.3530
"""Of the training pixels; part of the nets, so that their input is plain [0, 1]."""


class Standardize(nn.Module):
    """(x - mean) / std with constants."""

    def forward(self, x: Tensor) -> Tensor:
        """Shift and scale pixels in [0, 1]."""
        return (x - MEAN) / STD


def _conv(c: int, d: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(c, d, 3, stride, 1, bias=False), nn.BatchNorm2d(d)]


def vgg() -> nn.Sequential:
    """32-32-pool-64-64-pool-128-128-pool, 1152-256-10, with batch norm; 29.4 MMAC on 28 x 28."""
    layers: list[nn.Module] = [Standardize()]
    c = 1
    for width in (32, 64, 128):
        layers += [*_conv(c, width), nn.ReLU(), *_conv(width, width), nn.ReLU(), nn.MaxPool2d(2)]
        c = width
    layers += [nn.Flatten(), nn.Linear(1152, 256), nn.ReLU(), nn.Linear(256, 10)]
    return nn.Sequential(*layers)


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (1 x 1 where the shape changes)."""

    def __init__(self, c: int, d: int, stride: int) -> None:
        """`c` channels in, `d` out."""
        super().__init__()
        self.body = nn.Sequential(*_conv(c, d, stride), nn.ReLU(), *_conv(d, d))
        same = c == d and stride == 1
        self.skip = nn.Identity() if same else nn.Sequential(nn.Conv2d(c, d, 1, stride, bias=False), nn.BatchNorm2d(d))

    def forward(self, x: Tensor) -> Tensor:
        """relu(body(x) + skip(x))."""
        return torch.relu(self.body(x) + self.skip(x))


def resnet() -> nn.Sequential:
    """Stages of 16, 32 and 64 channels, two blocks each; 20.2 MMAC on 28 x 28."""
    blocks = [
        Block(16, 16, 1),
        Block(16, 16, 1),
        Block(16, 32, 2),
        Block(32, 32, 1),
        Block(32, 64, 2),
        Block(64, 64, 1),
    ]
    return nn.Sequential(
        Standardize(), *_conv(1, 16), nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    )


NETS = {"vgg": vgg, "resnet": resnet}


def trained(name: str) -> nn.Sequential:
    """The trained net of that name, in eval mode, from the weights beside this file."""
    net = NETS[name]()
    net.load_state_dict(load_file(Path(__file__).parent / f"{name}.safetensors"))
    return net.eval()

"""Nets for small devices: depthwise and grouped convolutions, channels in an order that matters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .making import Made, made, normal
from .plain import conv_bn
from .residual import Classifier

IMAGE = normal(3, 16, 16)


def mobilenet_v1() -> Made:
    """Howard et al. 2017: depthwise, then 1 x 1."""

    def separable(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
        return nn.Sequential(conv_bn(inputs, inputs, 3, stride, inputs), conv_bn(inputs, outputs, 1))

    def build() -> nn.Module:
        stages = nn.Sequential(separable(12, 24), separable(24, 32, 2), separable(32, 40))
        return Classifier(conv_bn(3, 12, 3, 2), stages, 40)

    return made(build, normal(3, 32, 32))


class Inverted(nn.Module):
    """Wide inside, narrow outside, without activation at the narrow end; summed where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, ratio: int) -> None:
        super().__init__()
        hidden = inputs * ratio
        self.use_shortcut = stride == 1 and inputs == outputs
        layers = (
            [] if ratio == 1 else [nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(True)]
        )
        layers += [
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(True),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_shortcut else self.conv(x)


def mobilenet_v2() -> Made:
    """Sandler et al. 2018."""

    def build() -> nn.Module:
        rows = ((8, 8, 1, 1), (8, 16, 2, 3), (16, 16, 1, 3), (16, 24, 1, 3))
        return Classifier(conv_bn(3, 8, 3, 2), nn.Sequential(*(Inverted(*row) for row in rows), conv_bn(24, 48, 1)), 48)

    return made(build, normal(3, 32, 32))


class MBConv(nn.Module):
    """An inverted residual with squeeze and excitation by 1 x 1 convolutions, and hard swish."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        hidden = inputs * 3
        self.expand = nn.Conv2d(inputs, hidden, 1, bias=False)
        self.bn0 = nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.se_reduce = nn.Conv2d(hidden, inputs // 2, 1)
        self.se_expand = nn.Conv2d(inputs // 2, hidden, 1)
        self.project = nn.Conv2d(hidden, outputs, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.skip = stride == 1 and inputs == outputs

    def forward(self, inputs: Tensor) -> Tensor:
        x = F.hardswish(self.bn0(self.expand(inputs)))
        x = F.hardswish(self.bn1(self.depthwise(x)))
        scale = self.se_expand(F.relu(self.se_reduce(F.adaptive_avg_pool2d(x, 1))))
        x = self.bn2(self.project(F.hardsigmoid(scale) * x))
        if self.skip:
            x = F.dropout2d(x, 0.1, self.training) + inputs
        return x


class MobileNetV3(nn.Module):
    """A last 1 x 1 convolution behind the pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.blocks = nn.Sequential(MBConv(8, 12, 3, 2), MBConv(12, 12, 5), MBConv(12, 16, 3))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 48, 1), nn.Hardswish(), nn.Flatten(1))
        self.classifier = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.head(self.blocks(self.stem(x))))


def mobilenet_v3() -> Made:
    """Howard et al. 2019, Tan and Le 2019."""
    return made(MobileNetV3, normal(3, 32, 32))


class ShuffleUnit(nn.Module):
    """Half of the channels goes through untouched; then both halves are interleaved."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            conv_bn(half, half, 1),
            nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False),
            nn.BatchNorm2d(half),
            conv_bn(half, half, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=1)
        out = torch.cat((x1, self.branch(x2)), dim=1)
        b, c, h, w = out.size()
        return out.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, c, h, w)


def shufflenet_v2() -> Made:
    """Ma et al. 2018."""

    def build() -> nn.Module:
        stages = nn.Sequential(ShuffleUnit(16), ShuffleUnit(16), conv_bn(16, 32, 3, 2), ShuffleUnit(32))
        return Classifier(conv_bn(3, 16), stages, 32)

    return made(build, IMAGE)


class GroupShuffle(nn.Module):
    """1 x 1 convolutions in groups with a shuffle between them; the numbers stand in the module."""

    def __init__(self, channels: int = 24, groups: int = 3) -> None:
        super().__init__()
        self.channels, self.groups = channels, groups
        self.first = conv_bn(channels, channels, 1, 1, groups)
        self.depthwise = nn.Sequential(
            nn.Conv2d(channels, channels, 3, 1, 1, groups=channels, bias=False), nn.BatchNorm2d(channels)
        )
        self.last = nn.Sequential(nn.Conv2d(channels, channels, 1, groups=groups), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.first(x)
        out = out.reshape(-1, self.groups, self.channels // self.groups, *out.shape[2:])
        out = out.transpose(1, 2).flatten(1, 2)
        return F.relu(x + self.last(self.depthwise(out)))


def shufflenet_v1() -> Made:
    """Zhang et al. 2018."""
    return made(lambda: Classifier(conv_bn(3, 24, 3, 2), nn.Sequential(GroupShuffle(), GroupShuffle()), 24), IMAGE)


class Fire(nn.Module):
    """One narrow convolution feeds two whose outputs are concatenated."""

    def __init__(self, inputs: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x), inplace=True)
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], 1)


def squeezenet() -> Made:
    """Iandola et al. 2016; dropout and a convolution as the classifier."""

    def build() -> nn.Module:
        features = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(3, 2, ceil_mode=True))
        features.extend([Fire(16, 8, 16), Fire(32, 8, 16), nn.MaxPool2d(2), Fire(32, 12, 24)])
        classifier = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(48, 10, 1), nn.ReLU(True), nn.AdaptiveAvgPool2d(1))
        return nn.Sequential(features, classifier, nn.Flatten())

    return made(build, IMAGE)


class Ghost(nn.Module):
    """Half of the outputs are cheap depthwise images of the other half; what is too much is cut off."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        half = (outputs + 1) // 2
        self.primary = conv_bn(inputs, half, 1)
        self.cheap = conv_bn(half, half, 3, 1, half)

    def forward(self, x: Tensor) -> Tensor:
        y = self.primary(x)
        return torch.cat([y, self.cheap(y)], 1)[:, : self.outputs]


def ghostnet() -> Made:
    """Han et al. 2020; one width is odd."""
    return made(lambda: Classifier(conv_bn(3, 12, 3, 2), nn.Sequential(Ghost(12, 25), Ghost(25, 32)), 32), IMAGE)

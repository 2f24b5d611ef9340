"""Sums of a block's input and output: both ends, and all blocks of a stage, must lose the same channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .making import Made, made, normal
from .plain import conv_bn


class Basic(nn.Module):
    """Two 3 x 3 convolutions; the shortcut is the identity, a 1 x 1 convolution or (option A) padded with zeros."""

    def __init__(self, inputs: int, planes: int, stride: int = 1, option: str = "B") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.grown = planes - inputs
        self.option = option
        self.downsample = None
        if option == "B" and (stride != 1 or inputs != planes):
            self.downsample = nn.Sequential(nn.Conv2d(inputs, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        elif self.grown:
            identity = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.grown // 2, self.grown - self.grown // 2))
        out += identity
        return F.relu(out)


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 (in groups for ResNeXt), 1 x 1."""

    def __init__(self, inputs: int, planes: int, outputs: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.reduce = conv_bn(inputs, planes, 1)
        self.spatial = conv_bn(planes, planes, 3, stride, groups)
        self.expand = nn.Sequential(nn.Conv2d(planes, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.expand(self.spatial(self.reduce(x))) + self.shortcut(x))


class Squeeze(nn.Module):
    """Channels weighted by a small net that sees all of them."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // reduction), nn.ReLU(), nn.Linear(channels // reduction, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        weight = torch.sigmoid(self.fc(self.pool(x).view(b, c))).view(b, c, 1, 1)
        return x * weight.expand_as(x)


class SEBlock(nn.Module):
    """A basic block with squeeze and excitation before the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = conv_bn(channels, channels)
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels))
        self.se = Squeeze(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.se(self.second(self.first(x))))


class PreAct(nn.Module):
    """Norm and activation come first: the sum itself is never normalized."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + shortcut


class CBAM(nn.Module):
    """Attention over channels, then over places from the mean and the largest of all channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, channels // 4, 1), nn.ReLU(), nn.Conv2d(channels // 4, channels, 1)
        )
        self.spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.sigmoid(self.mlp(F.adaptive_avg_pool2d(x, 1)) + self.mlp(F.adaptive_max_pool2d(x, 1)))
        seen = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.spatial(seen))


class ConvNeXtBlock(nn.Module):
    """Depthwise 7 x 7, then dense layers on the last dimension, and a learned scale per channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 3 * dim)
        self.pwconv2 = nn.Linear(3 * dim, dim)
        self.gamma = nn.Parameter(0.1 + torch.rand(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        return x + y.permute(0, 3, 1, 2)


class Survivor(nn.Module):
    """Stochastic depth: the block is left out at random in training, and scaled in eval mode."""

    def __init__(self, channels: int, keep: float) -> None:
        super().__init__()
        self.keep = keep
        self.body = nn.Sequential(
            conv_bn(channels, channels), nn.Dropout2d(0.1), nn.Conv2d(channels, channels, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x + self.keep * self.body(x)
        if torch.rand(()) < self.keep:
            return x + self.body(x)
        return x


class Classifier(nn.Module):
    """A stem, stages, global average pooling and a dense layer."""

    def __init__(self, stem: nn.Module, stages: nn.Module, channels: int, classes: int = 10) -> None:
        super().__init__()
        self.stem = stem
        self.stages = stages
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.stem(x))
        x = F.adaptive_avg_pool2d(x, (1, 1))
        return self.fc(x.view(x.size(0), -1))


IMAGE = normal(3, 16, 16)


def _classifier(*stages: nn.Module, stem: int = 12, channels: int = 24) -> nn.Module:
    return Classifier(conv_bn(3, stem), nn.Sequential(*stages), channels)


def resnet_basic() -> Made:
    """He et al. 2016, shortcuts by 1 x 1 convolutions."""
    return made(lambda: _classifier(Basic(12, 12), Basic(12, 24, 2), Basic(24, 24)), IMAGE)


def resnet_option_a() -> Made:
    """He et al. 2016, shortcuts padded with zeros."""
    blocks = ((12, 12, 1), (12, 24, 2), (24, 24, 1))
    return made(lambda: _classifier(*(Basic(*block, option="A") for block in blocks)), IMAGE)


def resnet_bottleneck() -> Made:
    """He et al. 2016, 1 x 1, 3 x 3, 1 x 1."""
    return made(lambda: _classifier(Bottleneck(12, 8, 32), Bottleneck(32, 12, 40, 2), channels=40), IMAGE)


def resnext() -> Made:
    """Xie et al. 2017: the 3 x 3 convolutions have four groups."""
    build = lambda: _classifier(  # noqa: E731 - one expression, as above
        Bottleneck(12, 16, 32, 1, 4), Bottleneck(32, 24, 40, 2, 4), channels=40
    )
    return made(build, IMAGE)


def se_resnet() -> Made:
    """Hu et al. 2018."""
    return made(lambda: _classifier(SEBlock(24), conv_bn(24, 32, 3, 2), SEBlock(32), stem=24, channels=32), IMAGE)


def preact_resnet() -> Made:
    """He et al. 2016, identity mappings."""
    blocks = (PreAct, (12, 12)), (PreAct, (12, 24, 2)), (PreAct, (24, 24))
    return made(lambda: _classifier(*(kind(*sizes) for kind, sizes in blocks), nn.BatchNorm2d(24), nn.ReLU()), IMAGE)


def cbam() -> Made:
    """Woo et al. 2018."""
    return made(lambda: _classifier(Basic(12, 24, 2), CBAM(24), Basic(24, 24), CBAM(24)), IMAGE)


def convnext() -> Made:
    """Liu et al. 2022."""

    def build() -> nn.Module:
        stem = nn.Sequential(nn.Conv2d(3, 16, 2, stride=2), nn.GroupNorm(1, 16))
        down = nn.Sequential(nn.GroupNorm(1, 16), nn.Conv2d(16, 32, 2, stride=2))
        return Classifier(stem, nn.Sequential(ConvNeXtBlock(16), ConvNeXtBlock(16), down, ConvNeXtBlock(32)), 32)

    return made(build, IMAGE)


def stochastic_depth() -> Made:
    """Huang et al. 2016."""
    stages = (Survivor, (12, 0.9)), (conv_bn, (12, 24, 3, 2)), (Survivor, (24, 0.8))
    return made(lambda: _classifier(*(kind(*sizes) for kind, sizes in stages)), IMAGE)

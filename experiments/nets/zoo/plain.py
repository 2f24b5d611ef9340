"""Chains of layers: what stands between two of them is what makes them hard to cut."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that every torch user knows
from torch.nn.utils import parametrizations

from .making import Made, made, normal


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class VGG(nn.Module):
    """Every channel becomes 4 x 4 inputs of the first dense layer."""

    def __init__(self, widths: tuple[int, ...] = (16, 16, 0, 32, 32, 0), classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in widths:
            if width == 0:
                layers.append(nn.MaxPool2d(2))
            else:
                layers.append(conv_bn(channels, width))
                channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(channels * 16, 48), nn.ReLU(True), nn.Dropout(0.5), nn.Linear(48, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.classifier(torch.flatten(x, 1))


def vgg() -> Made:
    """Simonyan and Zisserman 2015."""
    return made(VGG, normal(3, 16, 16))


class LeNet(nn.Module):
    """The number of features is written into forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 5)
        self.conv2 = nn.Conv2d(8, 16, 5)
        self.fc1 = nn.Linear(16 * 4 * 4, 48)
        self.fc2 = nn.Linear(48, 24)
        self.fc3 = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(torch.tanh(self.conv1(x)), 2)
        x = F.avg_pool2d(torch.tanh(self.conv2(x)), 2)
        x = x.view(-1, 16 * 4 * 4)
        x = torch.tanh(self.fc1(x))
        return self.fc3(torch.tanh(self.fc2(x)))


def lenet() -> Made:
    """LeCun et al. 1998."""
    return made(LeNet, normal(1, 28, 28))


def mlp_batchnorm() -> Made:
    """Dense layers with batch norm behind them."""

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 48, bias=False),
            nn.BatchNorm1d(48),
            nn.ReLU(),
            nn.Linear(48, 32),
            nn.BatchNorm1d(32),
            nn.LeakyReLU(0.1),
            nn.Dropout(0.2),
            nn.Linear(32, 5),
        )

    return made(build, normal(8, 8))


def all_conv() -> Made:
    """A convolution is the classifier (Lin et al. 2014)."""

    def build() -> nn.Module:
        return nn.Sequential(
            conv_bn(3, 16),
            conv_bn(16, 24, 1),
            conv_bn(24, 24, 3, 2),
            conv_bn(24, 32, 1),
            nn.Conv2d(32, 10, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )

    return made(build, normal(3, 16, 16))


class AlexNet(nn.Module):
    """Local response normalization mixes neighbouring channels; the second convolution has two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 5, stride=2, padding=2)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, groups=2)
        self.conv3 = nn.Conv2d(32, 24, 3, padding=1)
        self.norm = nn.LocalResponseNorm(5, alpha=0.1, beta=0.75)
        self.fc1 = nn.Linear(24 * 2 * 2, 48)
        self.fc2 = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.norm(F.relu(self.conv1(x))), 2)
        x = self.norm(F.relu(self.conv2(x)))
        x = F.max_pool2d(F.relu(self.conv3(x)), 2)
        x = F.dropout(x.flatten(1), 0.5, self.training)
        return self.fc2(F.relu(self.fc1(x)))


def alexnet() -> Made:
    """Krizhevsky et al. 2012."""
    return made(AlexNet, normal(3, 16, 16))


class Maxout(nn.Module):
    """The largest of every `pieces` neighbouring channels goes on; their number is fixed at construction."""

    def __init__(self, width: int = 12, pieces: int = 2) -> None:
        super().__init__()
        self.width, self.pieces = width, pieces
        self.conv1 = nn.Conv2d(3, width * pieces, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width * pieces, 3, padding=1, stride=2)
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.conv1, self.conv2):
            x = conv(x)
            x = x.reshape(x.size(0), self.width, self.pieces, x.size(2), x.size(3)).amax(2)
        return self.fc(x.mean((2, 3)))


def maxout() -> Made:
    """Goodfellow et al. 2013."""
    return made(Maxout, normal(3, 16, 16))


def no_affine() -> Made:
    """Batch norms without scale and shift, and one without statistics."""

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16, affine=False),
            nn.ReLU(),
            nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(24, affine=False),
            nn.ReLU(),
            nn.Conv2d(24, 24, 3, padding=1),
            nn.InstanceNorm2d(24),
            nn.AdaptiveMaxPool2d(2),
            nn.Flatten(),
            nn.Linear(96, 32),
            nn.BatchNorm1d(32, affine=False),
            nn.Tanh(),
            nn.Linear(32, 6),
        )

    return made(build, normal(3, 16, 16))


def weight_norm() -> Made:
    """Weights are computed from a direction and a length (Salimans and Kingma 2016)."""

    def build() -> nn.Module:
        return nn.Sequential(
            parametrizations.weight_norm(nn.Conv2d(3, 16, 3, padding=1)),
            nn.ELU(),
            parametrizations.weight_norm(nn.Conv2d(16, 24, 3, stride=2, padding=1)),
            nn.ELU(),
            nn.Conv2d(24, 24, 3, stride=2, padding=1),
            nn.ELU(),
            nn.Flatten(),
            parametrizations.weight_norm(nn.Linear(24 * 16, 32)),
            nn.ELU(),
            nn.Linear(32, 10),
        )

    return made(build, normal(3, 16, 16))


def frozen() -> Made:
    """The first half is a frozen backbone, as in transfer learning."""

    def build() -> nn.Module:
        backbone = nn.Sequential(conv_bn(3, 16), nn.MaxPool2d(2), conv_bn(16, 24))
        backbone.requires_grad_(requires_grad=False)
        head = nn.Sequential(conv_bn(24, 32, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))
        return nn.Sequential(backbone, head)

    return made(build, normal(3, 16, 16))


class BlurPool(nn.Module):
    """A fixed filter, one copy a channel, in a buffer; the number of groups is a number."""

    kernel: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        line = torch.tensor([1.0, 2.0, 1.0])
        square = line[:, None] * line[None, :]
        self.register_buffer("kernel", (square / square.sum())[None, None].repeat(channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.kernel, stride=2, groups=self.channels)


def blurpool() -> Made:
    """Anti-aliased pooling (Zhang 2019)."""

    def build() -> nn.Module:
        body = nn.Sequential(conv_bn(3, 16), BlurPool(16), conv_bn(16, 32), BlurPool(32), conv_bn(32, 32))
        return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 8))

    return made(build, normal(3, 16, 16))


def video() -> Made:
    """Three-dimensional convolutions, one of them split into space and time."""

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv3d(2, 12, 3, padding=1, bias=False),
            nn.BatchNorm3d(12),
            nn.ReLU(True),
            nn.MaxPool3d((1, 2, 2)),
            nn.Conv3d(12, 16, (1, 3, 3), padding=(0, 1, 1)),
            nn.ReLU(True),
            nn.Conv3d(16, 24, (3, 1, 1), padding=(1, 0, 0)),
            nn.BatchNorm3d(24),
            nn.ReLU(True),
            nn.AdaptiveAvgPool3d((1, 2, 2)),
            nn.Flatten(),
            nn.Linear(96, 6),
        )

    return made(build, normal(2, 4, 16, 16))

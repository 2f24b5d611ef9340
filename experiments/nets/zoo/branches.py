"""Nets that part and meet again: concatenation, products, choices, several inputs and several outputs."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .making import Made, made, normal, tokens
from .plain import conv_bn
from .residual import Classifier

IMAGE = normal(3, 16, 16)


class DenseLayer(nn.Module):
    """Norm, 1 x 1, norm, 3 x 3; the result is appended to the input."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 2 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(2 * growth), nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(y)))], 1)


def densenet() -> Made:
    """Huang et al. 2017."""

    def block(inputs: int, growth: int, layers: int) -> nn.Sequential:
        return nn.Sequential(*(DenseLayer(inputs + i * growth, growth) for i in range(layers)))

    def build() -> nn.Module:
        transition = nn.Sequential(nn.BatchNorm2d(40), nn.ReLU(), nn.Conv2d(40, 20, 1, bias=False), nn.AvgPool2d(2))
        last = nn.Sequential(nn.BatchNorm2d(36), nn.ReLU())
        return Classifier(
            nn.Conv2d(3, 16, 3, padding=1), nn.Sequential(block(16, 8, 3), transition, block(20, 8, 2), last), 36
        )

    return made(build, IMAGE)


class InceptionBlock(nn.Module):
    """Four branches, one of them behind a pooling."""

    def __init__(self, inputs: int, wide: int) -> None:
        super().__init__()
        self.one = conv_bn(inputs, wide, 1)
        self.three = nn.Sequential(conv_bn(inputs, wide // 2, 1), conv_bn(wide // 2, wide))
        self.five = nn.Sequential(conv_bn(inputs, wide // 4, 1), conv_bn(wide // 4, wide // 2, 5))
        self.pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_bn(inputs, wide // 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.one(x), self.three(x), self.five(x), self.pooled(x)]
        return torch.cat(branches, dim=1)


class GoogLeNet(nn.Module):
    """An auxiliary classifier that runs in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.block1 = InceptionBlock(16, 12)
        self.block2 = InceptionBlock(36, 16)
        self.aux = nn.Linear(36, 10)
        self.fc = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.block1(self.stem(x))
        aux = self.aux(x.mean((2, 3))) if self.training else None
        x = self.block2(F.max_pool2d(x, 2))
        logits = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits if aux is None else (logits, aux)


def googlenet() -> Made:
    """Szegedy et al. 2015."""
    return made(GoogLeNet, IMAGE)


class CSPDetector(nn.Module):
    """Pixels moved into channels, channels split by slices, pooled copies concatenated, and a grid of boxes."""

    def __init__(self, anchors: int = 2, classes: int = 3) -> None:
        super().__init__()
        self.anchors, self.outputs = anchors, 5 + classes
        self.stem = conv_bn(12, 24)
        self.half = 12
        self.inner = nn.Sequential(conv_bn(12, 12, 1), conv_bn(12, 12))
        self.merge = conv_bn(24, 24, 1)
        self.spp = conv_bn(24 * 3, 32, 1)
        self.detect = nn.Conv2d(32, anchors * self.outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)
        x = self.stem(x)
        kept, worked = x[:, : self.half], x[:, self.half :]
        x = self.merge(torch.cat((kept, worked + self.inner(worked)), 1))
        x = self.spp(torch.cat([x, F.max_pool2d(x, 3, 1, 1), F.max_pool2d(x, 5, 1, 2)], 1))
        y = self.detect(x)
        b, _, h, w = y.shape
        return y.view(b, self.anchors, self.outputs, h, w).permute(0, 1, 3, 4, 2).sigmoid()


def csp_detector() -> Made:
    """Wang et al. 2020, Redmon et al. 2016."""
    return made(CSPDetector, IMAGE)


class Highway(nn.Module):
    """A gate mixes each layer's input and output; the raw input is appended before the end."""

    def __init__(self, features: int = 20, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.plain = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.gates = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.out = nn.Linear(width + features, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.embed(x))
        for plain, gate in zip(self.plain, self.gates, strict=True):
            t = torch.sigmoid(gate(h))
            h = t * torch.relu(plain(h)) + (1 - t) * h
        return self.out(torch.cat([x, h], -1))


def highway() -> Made:
    """Srivastava et al. 2015, wide and deep inputs."""
    return made(Highway, normal(20))


class SelectiveKernel(nn.Module):
    """Branches are stacked, weighted by a softmax over the branches and summed."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.convs = nn.ModuleList(conv_bn(channels, channels, k) for k in (1, 3, 5))
        self.squeeze = nn.Linear(channels, 8)
        self.select = nn.ModuleList(nn.Linear(8, channels) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        feats = torch.stack([conv(x) for conv in self.convs], dim=1)
        z = F.relu(self.squeeze(feats.sum(1).mean((-1, -2))))
        weights = torch.stack([fc(z) for fc in self.select], dim=1).softmax(1)
        return (feats * weights.view(-1, 3, self.channels, 1, 1)).sum(1)


def selective_kernel() -> Made:
    """Li et al. 2019."""
    return made(
        lambda: Classifier(conv_bn(3, 16), nn.Sequential(SelectiveKernel(16), conv_bn(16, 24, 3, 2)), 24), IMAGE
    )


class Choosing(nn.Module):
    """Which branch runs depends on the data; the example reaches one only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.bright = conv_bn(16, 24, 3, 2)
        self.dark = nn.Conv2d(16, 24, 5, 2, 2)
        self.last = conv_bn(24, 32)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = self.stem(x)
        features = self.bright(features) if x.mean() > 0 else self.dark(features)
        return self.fc(self.last(features).mean((2, 3)))


def data_branch() -> Made:
    """An `if` on the input."""
    return made(Choosing, normal(3, 16, 16, mean=1.0))


class ImageAndTable(nn.Module):
    """Two inputs are joined, two heads leave."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(conv_bn(3, 16, 3, 2), conv_bn(16, 24, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.table = nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU())
        self.joint = nn.Linear(40, 32)
        self.age = nn.Linear(32, 1)
        self.group = nn.Linear(32, 4)

    def forward(self, image: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.joint(torch.cat((self.image(image), self.table(table)), dim=1)))
        return self.age(h).squeeze(1), self.group(h)


def two_inputs() -> Made:
    """A tuple goes in, a tuple comes out."""
    return made(ImageAndTable, lambda n: (normal(3, 16, 16)(n), normal(10)(n)))


class Answering(nn.Module):
    """An image and a question are multiplied; the outputs are a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.cnn = nn.Sequential(conv_bn(3, 16, 3, 2), conv_bn(16, 32, 3, 2))
        self.embed = nn.Embedding(40, 24)
        self.question = nn.Linear(24, 32)
        self.answer = nn.Linear(32, 12)
        self.where = nn.Conv2d(32, 1, 1)

    def forward(self, *, image: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        maps = self.cnn(image)
        asked = torch.tanh(self.question(self.embed(tokens).mean(1)))
        maps = maps * asked[:, :, None, None]
        return {"answer": self.answer(maps.amax((2, 3))), "where": self.where(maps)}


def dict_answering() -> Made:
    """Keywords go in, a dict comes out."""
    return made(Answering, lambda n: {"image": normal(3, 16, 16)(n), "tokens": tokens(40, 6)(n)})


class Siamese(nn.Module):
    """The same weights see two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(conv_bn(1, 16, 3, 2), conv_bn(16, 24, 3, 2), nn.Flatten(), nn.Linear(24 * 16, 32))
        self.decide = nn.Linear(32, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.decide(torch.abs(self.tower(a) - self.tower(b)))


def siamese() -> Made:
    """Koch et al. 2015."""
    return made(Siamese, lambda n: (normal(1, 16, 16)(n), normal(1, 16, 16)(n)))


class BilinearPooling(nn.Module):
    """Every channel of one branch times every channel of the other is one input of the dense layer."""

    def __init__(self, left: int = 12, right: int = 10) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16, 3, 2)
        self.left, self.right = conv_bn(16, left), conv_bn(16, right)
        self.fc = nn.Linear(left * right, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        a, b = self.left(x).flatten(2), self.right(x).flatten(2)
        y = torch.bmm(a, b.transpose(1, 2)).flatten(1)
        return self.fc(F.normalize(torch.sign(y) * torch.sqrt(y.abs() + 1e-5)))


def bilinear_pooling() -> Made:
    """Lin et al. 2015."""
    return made(BilinearPooling, IMAGE)


class CosineHead(nn.Module):
    """A parameter of no layer is the classifier; features are normalized over their channels."""

    def __init__(self, features: int = 32, classes: int = 10) -> None:
        super().__init__()
        widths = (3, 16, 24, features)
        self.body = nn.Sequential(*(conv_bn(a, b, 3, 2) for a, b in pairwise(widths)))
        self.weight = nn.Parameter(torch.randn(classes, features))
        self.scale = nn.Parameter(torch.tensor(8.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        x = torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1).unflatten(1, (2, -1)).sum(1)
        return self.scale * F.linear(F.normalize(x), F.normalize(self.weight))


def cosine_head() -> Made:
    """Gidaris and Komodakis 2018."""
    return made(CosineHead, IMAGE)

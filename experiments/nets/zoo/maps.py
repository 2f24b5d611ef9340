"""Nets whose outputs are images or maps: upsampling, skips over scales, generators, style transfer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .making import Made, made, normal
from .plain import conv_bn

IMAGE = normal(3, 16, 16)


def double(inputs: int, outputs: int) -> nn.Sequential:
    """Two convolutions with batch norm."""
    return nn.Sequential(conv_bn(inputs, outputs), conv_bn(outputs, outputs))


class UNet(nn.Module):
    """Transposed convolutions, whose outputs are concatenated with those of the way down."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1, self.enc2, self.mid = double(3, 8), double(8, 16), double(16, 32)
        self.pool = nn.MaxPool2d(2)
        self.up2, self.dec2 = nn.ConvTranspose2d(32, 16, 2, stride=2), double(32, 16)
        self.up1, self.dec1 = nn.ConvTranspose2d(16, 8, 2, stride=2), double(16, 8)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        e1 = self.enc1(x)
        e2 = self.enc2(self.pool(e1))
        m = self.mid(self.pool(e2))
        d2 = self.dec2(torch.cat([e2, self.up2(m)], dim=1))
        d1 = self.dec1(torch.cat([e1, self.up1(d2)], dim=1))
        return self.out(d1)


def unet_transposed() -> Made:
    """Ronneberger et al. 2015."""
    return made(UNet, IMAGE)


class GroupNormUNet(nn.Module):
    """Nearest upsampling, group norm, SiLU, and skips by sums and by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.inc = self._block(3, 16)
        self.down = nn.Conv2d(16, 32, 3, 2, 1)
        self.mid = self._block(32, 32)
        self.up = nn.Conv2d(32, 16, 3, padding=1)
        self.dec = self._block(32, 16)
        self.outc = nn.Conv2d(16, 3, 3, padding=1)

    @staticmethod
    def _block(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        skip = self.inc(x)
        y = F.silu(self.down(skip))
        y = y + self.mid(y)
        y = self.up(F.interpolate(y, scale_factor=2, mode="nearest"))
        return self.outc(self.dec(torch.cat((skip, y), 1))) + x


def unet_groupnorm() -> Made:
    """As in diffusion models; the output is added to the input."""
    return made(GroupNormUNet, IMAGE)


class Gate(nn.Module):
    """Skips are multiplied by a map computed from both branches."""

    def __init__(self, skip: int, gating: int, inner: int) -> None:
        super().__init__()
        self.theta = nn.Conv2d(skip, inner, 2, stride=2, bias=False)
        self.phi = nn.Conv2d(gating, inner, 1)
        self.psi = nn.Conv2d(inner, 1, 1)

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        weight = torch.sigmoid(self.psi(F.relu(self.theta(x) + self.phi(g))))
        return x * F.interpolate(weight, size=x.shape[2:], mode="bilinear", align_corners=False)


class AttentionUNet(nn.Module):
    """A U-Net with one gated skip."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.mid = double(1, 12), double(12, 24)
        self.gate = Gate(12, 24, 8)
        self.up = nn.ConvTranspose2d(24, 12, 2, 2)
        self.dec = double(24, 12)
        self.out = nn.Conv2d(12, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        e = self.enc(x)
        m = self.mid(F.max_pool2d(e, 2))
        return self.out(self.dec(torch.cat([self.gate(e, m), self.up(m)], 1)))


def attention_gate() -> Made:
    """Oktay et al. 2018."""
    return made(AttentionUNet, normal(1, 16, 16))


class FCN(nn.Module):
    """Dilated branches, one of them from the image's mean, and bilinear upsampling to the input's size."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.backbone = nn.Sequential(conv_bn(3, 16, 3, 2), conv_bn(16, 24, 3, 2))
        self.branches = nn.ModuleList(nn.Conv2d(24, 12, 3, padding=d, dilation=d, bias=False) for d in (1, 2, 4))
        self.image = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(24, 12, 1), nn.ReLU())
        self.project = conv_bn(48, 24, 1)
        self.score = nn.Conv2d(24, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        x = self.backbone(x)
        seen = [F.relu(branch(x)) for branch in self.branches]
        seen.append(F.interpolate(self.image(x), size=x.shape[-2:], mode="nearest"))
        y = self.score(self.project(torch.cat(seen, 1)))
        return F.interpolate(y, size=size, mode="bilinear", align_corners=False)


def fcn_dilated() -> Made:
    """Long et al. 2015, Chen et al. 2017."""
    return made(FCN, normal(3, 32, 32))


class SuperResolution(nn.Module):
    """Each four neighbouring channels become one of twice the size, inside the net and at its end."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.PReLU(width), nn.Conv2d(width, width, 3, 1, 1)
        )
        self.up = nn.Sequential(nn.Conv2d(width, width * 4, 3, padding=1), nn.PixelShuffle(2), nn.PReLU())
        self.tail = nn.Sequential(nn.Conv2d(width, 3 * 4, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(x)
        y = y + self.body(y)
        return self.tail(self.up(y)) + F.interpolate(x, scale_factor=4, mode="bilinear", align_corners=False)


def super_resolution() -> Made:
    """Shi et al. 2016."""
    return made(SuperResolution, normal(3, 8, 8))


class Generator(nn.Module):
    """A dense layer's outputs become the channels of a small image."""

    def __init__(self, latent: int = 24, width: int = 32) -> None:
        super().__init__()
        self.width = width
        self.fc = nn.Linear(latent, width * 4 * 4)
        self.net = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.ReLU(True),
            nn.ConvTranspose2d(width, width // 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(width // 2),
            nn.ReLU(True),
            nn.ConvTranspose2d(width // 2, width // 4, 4, 2, 1, bias=False),
            nn.BatchNorm2d(width // 4),
            nn.ReLU(True),
            nn.ConvTranspose2d(width // 4, 3, 3, 1, 1),
            nn.Tanh(),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.net(self.fc(z).view(-1, self.width, 4, 4))


def gan_generator() -> Made:
    """Radford et al. 2016."""
    return made(Generator, normal(24))


def autoencoder() -> Made:
    """Convolutions down to a code and up again."""

    def build() -> nn.Module:
        down = nn.Sequential(
            nn.Conv2d(1, 12, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(12, 24, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(384, 16),
        )
        up = nn.Sequential(
            nn.Linear(16, 384),
            nn.ReLU(),
            nn.Unflatten(1, (24, 4, 4)),
            nn.ConvTranspose2d(24, 12, 3, 2, 1, 1),
            nn.ReLU(),
        )
        return nn.Sequential(down, up, nn.ConvTranspose2d(12, 1, 3, 2, 1, 1), nn.Sigmoid())

    return made(build, normal(1, 16, 16))


class VAE(nn.Module):
    """The code is drawn at random in training; three outputs."""

    def __init__(self, features: int = 64, hidden: int = 48, code: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU())
        self.mean, self.log_var = nn.Linear(hidden, code), nn.Linear(hidden, code)
        self.decoder = nn.Sequential(nn.Linear(code, hidden), nn.ReLU(), nn.Linear(hidden, features))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.encoder(x)
        mean, log_var = self.mean(h), self.log_var(h)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * log_var) if self.training else mean
        return self.decoder(z), mean, log_var


def vae() -> Made:
    """Kingma and Welling 2014."""
    return made(VAE, normal(64))


class FPN(nn.Module):
    """Maps of three scales are made equally wide and added from the top down; one head sees all of them."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.c2, self.c3, self.c4 = conv_bn(3, 12, 3, 2), conv_bn(12, 24, 3, 2), conv_bn(24, 32, 3, 2)
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in (12, 24, 32))
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.head = nn.Conv2d(width, 6, 3, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        bottom_up = []
        for stage in (self.c2, self.c3, self.c4):
            x = stage(x)
            bottom_up.append(x)
        maps = [lateral(c) for lateral, c in zip(self.lateral, bottom_up, strict=True)]
        for i in (1, 0):
            maps[i] = maps[i] + F.interpolate(maps[i + 1], size=maps[i].shape[-2:], mode="nearest")
        return [self.head(F.relu(smooth(m))) for smooth, m in zip(self.smooth, maps, strict=True)]


def fpn() -> Made:
    """Lin et al. 2017."""
    return made(FPN, normal(3, 32, 32))


class StyleResidual(nn.Module):
    """Instance norm with scale and shift, a learned slope per channel, reflected borders."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect")
        self.in1 = nn.InstanceNorm2d(channels, affine=True)
        self.act = nn.PReLU(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect")
        self.in2 = nn.InstanceNorm2d(channels, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.in2(self.conv2(self.act(self.in1(self.conv1(x)))))


def style_transfer() -> Made:
    """Johnson et al. 2016, Ulyanov et al. 2016."""

    def build() -> nn.Module:
        return nn.Sequential(
            nn.ReflectionPad2d(2),
            nn.Conv2d(3, 12, 5),
            nn.InstanceNorm2d(12, affine=True),
            nn.PReLU(12),
            nn.Conv2d(12, 24, 3, 2, 1),
            nn.InstanceNorm2d(24, affine=True),
            nn.PReLU(),
            StyleResidual(24),
            nn.Upsample(scale_factor=2, mode="nearest"),
            nn.Conv2d(24, 12, 3, padding=1),
            nn.PReLU(12),
            nn.Conv2d(12, 3, 5, padding=2),
            nn.Tanh(),
        )

    return made(build, IMAGE)

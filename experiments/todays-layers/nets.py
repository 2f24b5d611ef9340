"""Three small nets of layers that today's models are made of; their weights, trained by train.py, are beside this file.

"vit" classifies Fashion-MNIST with `nn.MultiheadAttention`; "letters" classifies letters, read column by column, with
`nn.TransformerEncoder` and a padding mask; "unet" takes noise from Fashion-MNIST with `nn.ConvTranspose2d`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

MEAN, STD = 0.2860, 0.3530
"""Of the training pixels of Fashion-MNIST; part of the nets, so that their input is plain [0, 1]."""

HEIGHT = 32
"""Pixels of a letter's column."""


class Block(nn.Module):
    """Attention and two dense layers, each behind a layer norm and beside a shortcut."""

    def __init__(self, dim: int, heads: int) -> None:
        """`dim` channels in and out, twice as many inside."""
        super().__init__()
        self.before, self.between = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.dense = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(N, positions, dim) -> the same shape."""
        y = self.before(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.dense(self.between(x))


class ViT(nn.Module):
    """49 patches of 4 x 4 pixels, four blocks, the mean over all positions, ten classes."""

    def __init__(self, dim: int = 64, heads: int = 4, depth: int = 4) -> None:
        """Positions are learned."""
        super().__init__()
        self.patches = nn.Conv2d(1, dim, 4, 4)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 49, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 1, 28, 28) in [0, 1] -> logits (N, 10)."""
        patches = self.patches((x - MEAN) / STD).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(patches + self.positions)).mean(1))


class Letters(nn.Module):
    """Columns of a letter as a sequence of its width, three encoder layers, the mean over real columns, 26 classes."""

    def __init__(self, dim: int = 64, heads: int = 4, depth: int = 3) -> None:
        """Positions are learned."""
        super().__init__()
        self.columns = nn.Linear(HEIGHT, dim)
        self.positions = nn.Parameter(0.02 * torch.randn(1, HEIGHT, dim))
        layer = nn.TransformerEncoderLayer(dim, heads, 2 * dim, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 26)

    def forward(self, columns: Tensor, padding_mask: Tensor) -> Tensor:
        """Columns (N, W, 32) and what of them is padding, true (N, W) -> logits (N, 26)."""
        x = self.columns(columns) + self.positions[:, : columns.shape[1]]
        x = self.norm(self.encoder(x, src_key_padding_mask=padding_mask))
        real = (~padding_mask).unsqueeze(-1).to(x.dtype)
        return self.head((x * real).sum(1) / real.sum(1))


def _twice(c: int, d: int) -> nn.Sequential:
    parts = [(nn.Conv2d(a, d, 3, padding=1, bias=False), nn.BatchNorm2d(d), nn.ReLU()) for a in (c, d)]
    return nn.Sequential(*parts[0], *parts[1])


class UNet(nn.Module):
    """Two levels down, two up by transposed convolutions, skips joined by concatenation; it subtracts what it finds."""

    def __init__(self, width: int = 16) -> None:
        """`width` channels at full size, twice and four times as many below."""
        super().__init__()
        self.down = nn.ModuleList([_twice(1, width), _twice(width, 2 * width)])
        self.bottom = _twice(2 * width, 4 * width)
        self.raised = nn.ModuleList(
            [nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), nn.ConvTranspose2d(2 * width, width, 2, 2)]
        )
        self.up = nn.ModuleList([_twice(4 * width, 2 * width), _twice(2 * width, width)])
        self.head, self.pool = nn.Conv2d(width, 1, 1), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """Noisy images (N, 1, 28, 28) -> clean ones."""
        first = self.down[0](x)
        second = self.down[1](self.pool(first))
        y = self.bottom(self.pool(second))
        y = self.up[0](torch.cat([self.raised[0](y), second], 1))
        y = self.up[1](torch.cat([self.raised[1](y), first], 1))
        return x - self.head(y)


NETS: dict[str, type[nn.Module]] = {"vit": ViT, "letters": Letters, "unet": UNet}


def trained(name: str) -> nn.Module:
    """The trained net of that name, in eval mode, from the weights beside this file."""
    net = NETS[name]()
    net.load_state_dict(load_file(Path(__file__).parent / f"{name}.safetensors"))
    return net.eval()

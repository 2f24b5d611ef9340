"""Transformers and mixers: heads, positions, norms over the last dimension, tied embeddings."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .making import Made, made, normal, tokens

IMAGE = normal(3, 16, 16)


class TextEncoder(nn.Module):
    """Encoder layers of torch, fixed sines as positions."""

    positions: Tensor

    def __init__(self, words: int = 60, width: int = 32, length: int = 16) -> None:
        super().__init__()
        self.width = width
        self.embed = nn.Embedding(words, width)
        angles = torch.arange(length)[:, None] * torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
        self.register_buffer("positions", torch.stack([angles.sin(), angles.cos()], -1).flatten(1))
        layer = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.fc = nn.Linear(width, 4)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words) * math.sqrt(self.width) + self.positions[: words.size(1)]
        return self.fc(self.encoder(x).mean(1))


def transformer_text() -> Made:
    """Vaswani et al. 2017."""
    return made(TextEncoder, tokens(60, 12))


class Attention(nn.Module):
    """One dense layer makes queries, keys and values; the heads' size is a number."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, dim // heads
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = (q @ k.transpose(-2, -1) * self.size**-0.5).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


class EncoderBlock(nn.Module):
    """Norm first."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim * 2), nn.GELU(), nn.Dropout(0.1), nn.Linear(dim * 2, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Patches by a convolution, a class token, learned positions."""

    def __init__(self, dim: int = 32, heads: int = 4, depth: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 4, stride=4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.1)
        self.pos_embed = nn.Parameter(torch.randn(1, 17, dim) * 0.1)
        self.blocks = nn.Sequential(*(EncoderBlock(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        x = self.norm(self.blocks(x))
        return self.head(x[:, 0])


def vit() -> Made:
    """Dosovitskiy et al. 2021."""
    return made(ViT, IMAGE)


class CausalBlock(nn.Module):
    """Three chunks of one dense layer, a mask in a buffer, torch's scaled dot products."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.c_attn, self.c_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.c_fc, self.c_out = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.c_attn(self.ln_1(x)).split(c, dim=2)
        q, k, v = (y.view(b, t, self.heads, c // self.heads).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))
        return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class TiedGPT(nn.Module):
    """The output layer's weight is the embedding's."""

    def __init__(self, words: int = 48, dim: int = 32, length: int = 16) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(words, dim), nn.Embedding(length, dim)
        self.blocks = nn.ModuleList(CausalBlock(dim, 4) for _ in range(2))
        self.ln_f = nn.LayerNorm(dim)
        self.lm_head = nn.Linear(dim, words, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.wte(words) + self.wpe(torch.arange(words.size(1), device=words.device))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def tied_gpt() -> Made:
    """Radford et al. 2019, Press and Wolf 2017."""
    return made(TiedGPT, tokens(48, 10))


class TiedLSTM(nn.Module):
    """A recurrent language model with tied weights and one linear layer in between."""

    def __init__(self, words: int = 48, width: int = 24, hidden: int = 40) -> None:
        super().__init__()
        self.encoder = nn.Embedding(words, width)
        self.rnn = nn.LSTM(width, hidden, batch_first=True)
        self.project = nn.Linear(hidden, width)
        self.decoder = nn.Linear(width, words)
        self.decoder.weight = self.encoder.weight

    def forward(self, words: Tensor) -> Tensor:
        y, _ = self.rnn(self.encoder(words))
        return self.decoder(torch.tanh(self.project(y)))


def tied_lstm() -> Made:
    """Merity et al. 2018."""
    return made(TiedLSTM, tokens(48, 10))


class MixerBlock(nn.Module):
    """Dense layers over positions, then over channels."""

    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.token_mlp = nn.Sequential(nn.Linear(tokens, 24), nn.GELU(), nn.Linear(24, tokens))
        self.channel_mlp = nn.Sequential(nn.Linear(dim, 64), nn.GELU(), nn.Linear(64, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_mlp(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel_mlp(self.norm2(x))


class Mixer(nn.Module):
    """Patches by a convolution, mixed in both directions."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 4, 4)
        self.mixer = nn.Sequential(MixerBlock(16, dim), MixerBlock(16, dim))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.mixer(x)).mean(dim=1))


def mlp_mixer() -> Made:
    """Tolstikhin et al. 2021."""
    return made(Mixer, IMAGE)


class SpatialAttention(nn.Module):
    """Convolutions as queries, keys and values over the places of a map; added with a learned scale."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query, self.key = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels, channels // 4, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.size()
        q = self.query(x).view(b, -1, h * w).permute(0, 2, 1)
        k = self.key(x).view(b, -1, h * w)
        weights = torch.softmax(torch.bmm(q, k), -1)
        out = torch.einsum("bcj,bij->bci", self.value(x).view(b, c, h * w), weights)
        return self.gamma * out.view(b, c, h, w) + x


def spatial_attention() -> Made:
    """Zhang et al. 2019, Wang et al. 2018."""

    def build() -> nn.Module:
        first = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.LeakyReLU(0.2))
        second = nn.Sequential(nn.Conv2d(16, 24, 3, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(24 * 16, 1))
        return nn.Sequential(first, SpatialAttention(16), second)

    return made(build, IMAGE)

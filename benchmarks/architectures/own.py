"""Written as people write them, of torch alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from architectures.making import Architecture, Sample, ids, noise, pictures, together

WORDS = 200


class Tagger(nn.Module):
    """Tokens -> LSTM -> a class for each."""

    def __init__(self, words: int = WORDS, width: int = 32, hidden: int = 64) -> None:
        """Bidirectional, two layers."""
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.lstm = nn.LSTM(width, hidden, num_layers=2, batch_first=True, bidirectional=True)
        self.out = nn.Linear(2 * hidden, 12)

    def forward(self, x: Tensor) -> Tensor:
        """(n, t) -> (n, t, classes)."""
        out: Tensor = self.out(self.lstm(self.words(x))[0])
        return out


class Translator(nn.Module):
    """An encoder and a decoder of GRUs."""

    def __init__(self, words: int = WORDS, width: int = 32, hidden: int = 64) -> None:
        """One layer each."""
        super().__init__()
        self.source, self.target = nn.Embedding(words, width), nn.Embedding(words, width)
        self.encoder, self.decoder = nn.GRU(width, hidden, batch_first=True), nn.GRU(width, hidden, batch_first=True)
        self.out = nn.Linear(hidden, words)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Tokens and tokens -> logits."""
        _, state = self.encoder(self.source(source))
        out: Tensor = self.out(self.decoder(self.target(target), state)[0])
        return out


class Encoded(nn.Module):
    """nn.TransformerEncoder with a padding mask."""

    def __init__(self) -> None:
        """Two layers."""
        super().__init__()
        self.words = nn.Embedding(WORDS, 64, padding_idx=0)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2)
        self.out = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens, of which 0 is padding -> classes."""
        hidden = self.encoder(self.words(x), src_key_padding_mask=x == 0)
        out: Tensor = self.out(hidden.mean(1))
        return out


class WaveNet(nn.Module):
    """Dilated gated convolutions with skip connections."""

    def __init__(self) -> None:
        """Four blocks."""
        super().__init__()
        self.start = nn.Conv1d(1, 32, 1)
        self.gates = nn.ModuleList(nn.Conv1d(32, 64, 2, dilation=2**i) for i in range(4))
        self.skips = nn.ModuleList(nn.Conv1d(32, 48, 1) for _ in range(4))
        self.residuals = nn.ModuleList(nn.Conv1d(32, 32, 1) for _ in range(4))
        self.end = nn.Sequential(nn.ReLU(), nn.Conv1d(48, 48, 1), nn.ReLU(), nn.Conv1d(48, 16, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(n, 1, t) -> (n, 16, t)."""
        x, total = self.start(x), 0
        for i, (gate, skip, residual) in enumerate(zip(self.gates, self.skips, self.residuals, strict=True)):
            a, b = gate(nn.functional.pad(x, (2**i, 0))).chunk(2, 1)
            y = a.tanh() * b.sigmoid()
            total = total + skip(y)
            x = x + residual(y)
        out: Tensor = self.end(total)
        return out


class Einsum(nn.Module):
    """A transformer block of raw parameters."""

    def __init__(self) -> None:
        """Four heads of 16."""
        super().__init__()
        self.words = nn.Embedding(WORDS, 64)
        self.qkv, self.o = nn.Parameter(torch.randn(3, 64, 4, 16) * 0.1), nn.Parameter(torch.randn(4, 16, 64) * 0.1)
        self.up, self.down = nn.Parameter(torch.randn(64, 128) * 0.1), nn.Parameter(torch.randn(128, 64) * 0.1)
        self.norm, self.out = nn.LayerNorm(64), nn.Linear(64, WORDS)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens -> logits."""
        h = self.words(x)
        q, k, v = torch.einsum("ntd,cdhk->cnhtk", self.norm(h), self.qkv)
        weights = (torch.einsum("nhtk,nhsk->nhts", q, k) / 4).softmax(-1)
        h = h + torch.einsum("nhts,nhsk,hkd->ntd", weights, v, self.o)
        out: Tensor = self.out(h + torch.relu(h @ self.up) @ self.down)
        return out


class Seq2Seq(nn.Module):
    """nn.Transformer."""

    def __init__(self, words: int = WORDS, width: int = 64, heads: int = 4, layers: int = 2, inner: int = 128) -> None:
        """As many layers each."""
        super().__init__()
        self.words, self.out = nn.Embedding(words, width), nn.Linear(width, words)
        self.transformer = nn.Transformer(width, heads, layers, layers, inner, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Tokens and tokens -> logits."""
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        out: Tensor = self.out(self.transformer(self.words(source), self.words(target), tgt_mask=mask))
        return out


class Tied(nn.Module):
    """A language model whose head is its table."""

    def __init__(self) -> None:
        """One hidden layer."""
        super().__init__()
        self.words, self.hidden, self.head = nn.Embedding(WORDS, 64), nn.Linear(64, 64), nn.Linear(64, WORDS)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        """Tokens -> logits."""
        out: Tensor = self.head(self.hidden(self.words(x)).tanh())
        return out


class UNet(nn.Module):
    """Down, up, and what was seen on the way down beside it."""

    def __init__(self) -> None:
        """Three sizes."""
        super().__init__()
        self.a, self.b, self.c = self.two(3, 16), self.two(16, 32), self.two(32, 64)
        self.up_b, self.up_a = nn.ConvTranspose2d(64, 32, 2, 2), nn.ConvTranspose2d(32, 16, 2, 2)
        self.back_b, self.back_a, self.out = self.two(64, 32), self.two(32, 16), nn.Conv2d(16, 3, 1)

    @staticmethod
    def two(inputs: int, outputs: int) -> nn.Sequential:
        """Two convolutions with norms."""
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """An image -> a map, in a dict."""
        a = self.a(x)
        b = self.b(nn.functional.max_pool2d(a, 2))
        c = self.c(nn.functional.max_pool2d(b, 2))
        b = self.back_b(torch.cat([self.up_b(c), b], 1))
        return {"out": self.out(self.back_a(torch.cat([self.up_a(b), a], 1)))}


def generator(widths: Sequence[int] = (64, 64, 32, 16), size: int = 2) -> tuple[nn.Module, Sample]:
    """Of a DCGAN: transposed convolutions alone."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.ConvTranspose2d(widths[-1], 3, 4, 2, 1), nn.Tanh()), noise(widths[0], size, size)


def vocoder() -> tuple[nn.Module, Sample]:
    """Weight-normed convolutions, as in HiFi-GAN."""
    norm = nn.utils.parametrizations.weight_norm
    layers: list[nn.Module] = [norm(nn.Conv1d(20, 64, 7, padding=3))]
    for width in (64, 32):
        layers += [nn.LeakyReLU(0.1), norm(nn.ConvTranspose1d(width, width // 2, 4, 2, 1))]
        layers += [nn.LeakyReLU(0.1), norm(nn.Conv1d(width // 2, width // 2, 7, padding=9, dilation=3))]
    return nn.Sequential(*layers, nn.LeakyReLU(0.1), norm(nn.Conv1d(16, 1, 7, padding=3)), nn.Tanh()), noise(20, 24)


def of(model: type[nn.Module], sample: Sample) -> Architecture:
    """A class without arguments."""
    return lambda: (model(), sample)


ARCHITECTURES: dict[str, Architecture] = {
    "own/DCGAN (ConvTranspose)": generator,
    "own/GRU seq2seq": of(Translator, together(ids(WORDS), ids(WORDS, 8))),
    "own/LSTM tagger": of(Tagger, ids(WORDS)),
    "own/TransformerEncoder (nn.MHA)": of(Encoded, ids(WORDS, least=0)),
    "own/WaveNet": of(WaveNet, noise(1, 64)),
    "own/einsum transformer": of(Einsum, ids(WORDS)),
    "own/nn.Transformer": of(Seq2Seq, together(ids(WORDS), ids(WORDS, 8))),
    "own/tied LM": of(Tied, ids(WORDS)),
    "own/UNet (dict)": of(UNet, pictures(32)),
    "own/vocoder (weight_norm)": vocoder,
}

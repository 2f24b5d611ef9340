"""Sound, text and series: one-dimensional convolutions, gates, recurrent layers, attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrizations

from .making import Made, made, normal, tokens
from .plain import conv_bn


def audio() -> Made:
    """A long first kernel, then shorter ones (Dai et al. 2017)."""

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv1d(1, 16, 32, stride=4, padding=14),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.MaxPool1d(4),
            nn.Conv1d(16, 32, 3, padding=1, bias=False),
            nn.BatchNorm1d(32),
            nn.ReLU(),
            nn.Conv1d(32, 32, 5, padding=4, dilation=2, groups=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool1d(4),
            nn.Flatten(),
            nn.Linear(128, 12),
        )

    return made(build, normal(1, 256))


class WaveBlock(nn.Module):
    """Causal and dilated; tanh of one half times the sigmoid of the other; one output goes on, one is collected."""

    def __init__(self, channels: int, skip: int, dilation: int) -> None:
        super().__init__()
        self.pad = dilation
        self.dilated = nn.Conv1d(channels, 2 * channels, 2, dilation=dilation)
        self.residual = nn.Conv1d(channels, channels, 1)
        self.skip = nn.Conv1d(channels, skip, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.dilated(F.pad(x, (self.pad, 0)))
        a, b = y.chunk(2, 1)
        y = torch.tanh(a) * torch.sigmoid(b)
        return x + self.residual(y), self.skip(y)


class WaveNet(nn.Module):
    """Gated blocks whose skip outputs are summed."""

    def __init__(self, channels: int = 16, skip: int = 24) -> None:
        super().__init__()
        self.inp = nn.Conv1d(1, channels, 1)
        self.blocks = nn.ModuleList(WaveBlock(channels, skip, d) for d in (1, 2, 4))
        self.end = nn.Sequential(nn.ReLU(), nn.Conv1d(skip, 24, 1), nn.ReLU(), nn.Conv1d(24, 16, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        total: Tensor | float = 0.0
        for block in self.blocks:
            x, skip = block(x)
            total = total + skip
        return self.end(total)


def wavenet() -> Made:
    """Van den Oord et al. 2016."""
    return made(WaveNet, normal(1, 64))


class GatedConvs(nn.Module):
    """Gated linear units over an embedding, with normalized weights."""

    def __init__(self, words: int = 50, width: int = 24) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.convs = nn.ModuleList(
            parametrizations.weight_norm(nn.Conv1d(width, 2 * width, 3, padding=1)) for _ in range(2)
        )
        self.glu = nn.GLU(dim=1)
        self.fc = nn.Linear(width, 8)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words).transpose(1, 2)
        for conv in self.convs:
            x = (x + self.glu(conv(x))) * 0.5**0.5
        return self.fc(x.max(dim=2).values)


def gated_convs() -> Made:
    """Gehring et al. 2017."""
    return made(GatedConvs, tokens(50, 12))


class TextLSTM(nn.Module):
    """The last states of both directions."""

    def __init__(self, words: int = 60, width: int = 24, hidden: int = 24) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width, padding_idx=0)
        self.lstm = nn.LSTM(width, hidden, num_layers=2, bidirectional=True, batch_first=True, dropout=0.2)
        self.fc1 = nn.Linear(hidden * 2, 32)
        self.fc2 = nn.Linear(32, 4)

    def forward(self, words: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(self.embedding(words))
        h = torch.cat((hidden[-2], hidden[-1]), dim=1)
        return self.fc2(F.dropout(F.relu(self.fc1(h)), 0.3, self.training))


def lstm_text() -> Made:
    """A text classifier."""
    return made(TextLSTM, tokens(60, 10))


class CRNN(nn.Module):
    """Columns of the feature maps, all channels and rows of each, are the steps of a recurrent layer."""

    def __init__(self, classes: int = 11) -> None:
        super().__init__()
        self.cnn = nn.Sequential(
            conv_bn(1, 12),
            nn.MaxPool2d(2),
            conv_bn(12, 24),
            nn.MaxPool2d((2, 1)),
            conv_bn(24, 16),
            nn.MaxPool2d((2, 1)),
        )
        self.gru = nn.GRU(16 * 2, 24, bidirectional=True, batch_first=True)
        self.out = nn.Linear(48, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cnn(x)
        b, c, h, w = x.shape
        x = x.permute(0, 3, 1, 2).reshape(b, w, c * h)
        y, _ = self.gru(x)
        return self.out(y).log_softmax(-1)


def crnn() -> Made:
    """Shi et al. 2017."""
    return made(CRNN, normal(1, 16, 32))


class SeriesLSTM(nn.Module):
    """Convolutions in front of a recurrent layer, and attention over its steps by a learned query."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(6, 24, 5, padding=2)
        self.conv2 = nn.Conv1d(24, 20, 3, padding=1)
        self.rnn = nn.LSTM(20, 24, batch_first=True)
        self.query = nn.Parameter(torch.randn(24))
        self.head = nn.Linear(24, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv2(F.relu(self.conv1(x)))).transpose(1, 2)
        y, _ = self.rnn(y)
        weights = torch.softmax(y @ self.query, dim=1)
        return self.head((weights.unsqueeze(-1) * y).sum(1)).squeeze(-1)


def conv_lstm() -> Made:
    """A sensor series."""
    return made(SeriesLSTM, normal(6, 20))

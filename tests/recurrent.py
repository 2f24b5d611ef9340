"""Small networks with recurrent layers, as they are wired in taggers, translators, recognizers and encoders."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class Tagger(nn.Module):
    """A word, a tag."""

    def __init__(self, kind=nn.LSTM, units=24, **settings):
        super().__init__()
        self.embed = nn.Embedding(30, 12)
        self.rnn = kind(12, units, batch_first=True, **settings)
        self.out = nn.Linear(units * (1 + settings.get("bidirectional", False)), 7)

    def forward(self, words):
        return self.out(self.rnn(self.embed(words))[0])


class Translator(nn.Module):
    """An encoder that hands its state to a decoder, and attention between them."""

    def __init__(self, kind=nn.GRU, units=24):
        super().__init__()
        self.embed = nn.Embedding(30, 12)
        self.encoder, self.decoder = kind(12, units, batch_first=True), kind(12, units, batch_first=True)
        self.out = nn.Linear(2 * units, 30)

    def forward(self, words, said):
        memory, state = self.encoder(self.embed(words))
        query, _ = self.decoder(self.embed(said), state)
        seen = torch.softmax(query @ memory.transpose(1, 2), -1) @ memory
        return self.out(torch.cat([query, seen], -1))


class Packed(nn.Module):
    """Sequences of several lengths."""

    def __init__(self, kind=nn.LSTM, units=24, **settings):
        super().__init__()
        self.rnn = kind(10, units, batch_first=True, **settings)
        self.out = nn.Linear(units * (1 + settings.get("bidirectional", False)), 5)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=x.shape[1])
        return self.out(y)


class Encoder(nn.Module):
    """A stack whose last state is the answer."""

    def __init__(self, kind=nn.LSTM, units=24, layers=3):
        super().__init__()
        self.rnn, self.out = kind(10, units, layers, batch_first=True), nn.Linear(units, 8)

    def forward(self, x):
        _, state = self.rnn(x)
        return torch.relu(self.out((state[0] if isinstance(state, tuple) else state)[-1]))


class BothEnds(nn.Module):
    """The last states of both directions, time first."""

    def __init__(self, units=24):
        super().__init__()
        self.rnn, self.out = nn.GRU(10, units, 2, bidirectional=True), nn.Linear(2 * units, 5)

    def forward(self, x):
        _, state = self.rnn(x)
        return self.out(torch.cat([state[-2], state[-1]], 1))


class Recognizer(nn.Module):
    """A convolution, then recurrent layers whose directions are added up."""

    def __init__(self, units=24):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 5, padding=2, stride=(2, 1)), nn.BatchNorm2d(4)
        self.first = nn.GRU(4 * 8, units, bidirectional=True, batch_first=True)
        self.second = nn.GRU(units, units, bidirectional=True, batch_first=True)
        self.out = nn.Linear(units, 9)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        x = x.permute(0, 3, 1, 2).flatten(2)
        for layer in (self.first, self.second):
            y, _ = layer(x)
            x = y.view(*y.shape[:2], 2, -1).sum(2)
        return self.out(x)


class StepByStep(nn.Module):
    """A decoder that is called for every word, with its own state."""

    def __init__(self, units=24):
        super().__init__()
        self.embed = nn.Embedding(30, 12)
        self.encoder, self.decoder = nn.LSTM(12, units, batch_first=True), nn.LSTM(12, units, batch_first=True)
        self.out = nn.Linear(units, 30)

    def forward(self, words, said):
        _, state = self.encoder(self.embed(words))
        answers = []
        for place in range(said.shape[1]):
            y, state = self.decoder(self.embed(said[:, place : place + 1]), state)
            answers.append(self.out(y))
        return torch.cat(answers, 1)


class Started(nn.Module):
    """Initial states of a width that the code names: one that is learned, and zeros."""

    def __init__(self, units=24):
        super().__init__()
        self.rnn, self.out = nn.LSTM(10, units, 2, batch_first=True), nn.Linear(units, 5)
        self.start, self.units = nn.Parameter(torch.randn(2, 1, units)), units

    def forward(self, x):
        start = self.start.expand(-1, x.shape[0], -1).contiguous()
        return self.out(self.rnn(x, (start, torch.zeros(2, x.shape[0], self.units)))[0][:, -1])


class Streaming(nn.Module):
    """States that the caller passes on."""

    def __init__(self, units=24):
        super().__init__()
        self.rnn, self.out = nn.LSTM(10, units, batch_first=True), nn.Linear(units, 5)

    def forward(self, x, h, c):
        y, (h, c) = self.rnn(x, (h, c))
        return self.out(y), h, c


def words(samples, length):
    return torch.randint(0, 30, (samples, length))


NETS = {
    "tagger": (lambda: Tagger(num_layers=2, bidirectional=True), lambda n: (words(n, 6),)),
    "gru tagger": (lambda: Tagger(nn.GRU), lambda n: (words(n, 6),)),
    "rnn tagger": (lambda: Tagger(nn.RNN, bias=False), lambda n: (words(n, 6),)),
    "translator": (Translator, lambda n: (words(n, 6), words(n, 5))),
    "packed": (
        lambda: Packed(num_layers=2, bidirectional=True),
        lambda n: (torch.randn(n, 6, 10), torch.arange(n) % 6 + 1),
    ),
    "encoder": (Encoder, lambda n: (torch.randn(n, 7, 10),)),
    "both ends": (BothEnds, lambda n: (torch.randn(7, n, 10),)),
    "recognizer": (Recognizer, lambda n: (torch.randn(n, 1, 16, 9),)),
    "step by step": (StepByStep, lambda n: (words(n, 6), words(n, 4))),
    "started": (Started, lambda n: (torch.randn(n, 7, 10),)),
}
"""Networks whose hidden units may go, and inputs of n samples."""

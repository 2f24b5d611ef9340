"""Resemblyzer: someone else's trained speaker encoder, three LSTM layers, from the package resemblyzer (Apache-2.0).

pip install --no-deps resemblyzer==0.1.4

Only its weights are read: its code imports audio libraries that the network does not need. The network is its
`VoiceEncoder`, and utterances are cut as its `embed_utterance` does it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

BANDS, WIDTH, LAYERS = 40, 256, 3
FRAMES = 160
"""Of a partial: 1.6 seconds."""

STEP = 77
"""Frames between partials: 1.3 of them a second."""

COVERAGE = 0.75
"""Share of the last partial that has to be speech, where it is not the only one."""


class SpeakerEncoder(nn.Module):
    """Mel spectrograms (N, 160, 40) -> embeddings (N, 256) of length 1, none of their values below 0."""

    def __init__(self) -> None:
        """As in the package."""
        super().__init__()
        self.lstm = nn.LSTM(BANDS, WIDTH, LAYERS, batch_first=True)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.relu = nn.ReLU()

    def forward(self, mels: Tensor) -> Tensor:
        """The last state of the last layer, projected."""
        _, (hidden, _) = self.lstm(mels)
        raw = self.relu(self.linear(hidden[-1]))
        return raw / torch.norm(raw, dim=1, keepdim=True)


def untrained() -> SpeakerEncoder:
    """The architecture alone."""
    return SpeakerEncoder().eval()


@cache
def _weights() -> Path:
    spec = importlib.util.find_spec("resemblyzer")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("It needs its weights: pip install --no-deps resemblyzer==0.1.4")
    return Path(next(iter(spec.submodule_search_locations))) / "pretrained.pt"


def encoder() -> SpeakerEncoder:
    """The trained net."""
    net = untrained()
    state = torch.load(_weights(), map_location="cpu", weights_only=True)["model_state"]
    net.load_state_dict({name: state[name] for name in net.state_dict()})
    return net


def partials(mel: Tensor) -> Tensor:
    """(n, 160, 40) from the spectrogram (frames, 40) of an utterance; the last is filled with silence."""
    starts = [0]
    while len(mel) - (start := starts[-1] + STEP) >= COVERAGE * FRAMES:
        starts.append(start)
    padded = nn.functional.pad(mel, (0, 0, 0, max(0, starts[-1] + FRAMES - len(mel))))
    return torch.stack([padded[start : start + FRAMES] for start in starts])


@torch.no_grad()
def embed(net: nn.Module, utterances: Sequence[Tensor], size: int = 128) -> Tensor:
    """(utterances, 256): the mean over the partials of each, of length 1."""
    parts = [partials(mel) for mel in utterances]
    found = torch.cat([net(batch) for batch in torch.cat(parts).split(size)])
    means = torch.stack([each.mean(0) for each in found.split([len(part) for part in parts])])
    return nn.functional.normalize(means, dim=1)

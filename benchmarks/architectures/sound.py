"""What listens: torchaudio's definitions, conformer."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from architectures.libraries import torchaudio_model
from architectures.making import Architecture, Sample, noise, together


def audio(module: str, name: str, sample: Sample, **settings: Any) -> Architecture:
    """A model of torchaudio."""

    def make() -> tuple[nn.Module, Sample]:
        return getattr(torchaudio_model(module), name)(**settings), sample

    return make


def conformer() -> tuple[nn.Module, Sample]:
    """The package of that name."""
    library = importlib.import_module("conformer")
    return library.Conformer(dim=64, depth=2, dim_head=16, heads=4, conv_kernel_size=15), noise(32, 64)


def full(length: int) -> Sample:
    """Lengths of sequences that fill the batch."""
    return lambda n: torch.full((n,), length)


ARCHITECTURES: dict[str, Architecture] = {
    "conformer/Conformer": conformer,
    "torchaudio/Conformer": audio(
        "conformer",
        "Conformer",
        together(noise(32, 64), full(32)),
        input_dim=64,
        num_heads=4,
        ffn_dim=128,
        num_layers=2,
        depthwise_conv_kernel_size=15,
    ),
    "torchaudio/ConvTasNet": audio(
        "conv_tasnet",
        "ConvTasNet",
        noise(1, 400),
        enc_num_feats=64,
        msk_num_feats=32,
        msk_num_hidden_feats=64,
        msk_num_layers=3,
        msk_num_stacks=2,
    ),
    "torchaudio/DeepSpeech": audio("deepspeech", "DeepSpeech", noise(1, 20, 40), n_feature=40, n_hidden=64),
    "torchaudio/WaveRNN": audio(
        "wavernn",
        "WaveRNN",
        together(noise(1, 32), noise(1, 20, 12)),
        upsample_scales=[2, 2],
        n_classes=32,
        hop_length=4,
        n_res_block=2,
        n_rnn=64,
        n_fc=64,
        n_freq=20,
        n_hidden=32,
        n_output=32,
    ),
    "torchaudio/Emformer": audio(
        "emformer",
        "Emformer",
        together(noise(36, 64), full(32)),
        input_dim=64,
        num_heads=4,
        ffn_dim=128,
        num_layers=2,
        segment_length=8,
        right_context_length=4,
    ),
}

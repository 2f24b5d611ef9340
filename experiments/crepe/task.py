"""The task file for CREPE: `taut compress net:crepe --task task.py ...` in this folder.

Calibration: unlabelled frames of clean and noisy tones. Evaluation: tones of other seeds at 20 and 0 dB.
"""

from __future__ import annotations

from functools import cache

import torch
from tones import frames, raw_pitch_accuracy
from torch import Tensor, nn

EVALUATION_SEED, CALIBRATION_SEED = 0, 1000
SNRS = (40.0, 20.0, 10.0, 5.0, 0.0, -5.0)
"""Decibels of the calibration tones; each level has tones of its own."""

EVALUATION_CLIPS, CALIBRATION_CLIPS = 300, 120
"""Tones at every level; 6 frames of each."""


def example() -> Tensor:
    """32 frames of noise."""
    return torch.randn(32, 1024, generator=torch.Generator().manual_seed(0))


@cache
def _evaluation(snr_db: float) -> tuple[Tensor, Tensor]:
    return frames(EVALUATION_CLIPS, EVALUATION_SEED, snr_db)


def evaluate(model: nn.Module) -> dict[str, float]:
    """Raw pitch accuracy at 20 dB, which decides, and at 0 dB."""
    return {f"pitch accuracy at {snr} dB": raw_pitch_accuracy(model, *_evaluation(float(snr))) for snr in (20, 0)}


@cache
def tones(clips: int, seed: int) -> Tensor:
    """Frames of `clips` tones at every level, shuffled; without labels."""
    made = [frames(clips, seed + level, snr)[0] for level, snr in enumerate(SNRS)]
    x = torch.cat(made)
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))]


def calibration() -> list[Tensor]:
    """Frames of all noise levels, shuffled, in batches of 128."""
    return list(tones(CALIBRATION_CLIPS, CALIBRATION_SEED).split(128))

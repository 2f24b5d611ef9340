"""Synthetic tones with known pitch, and the metric: raw pitch accuracy within 50 cents.

Every clip is one harmonic tone: fundamental log-uniform in 50 to 1500 Hz, with a glide, vibrato, slow jitter, a
spectral envelope of three resonances, an attack and a decay, light reverberation, and noise between white and pink.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

RATE, WINDOW = 16_000, 1024
FIRST_BIN_CENTS, BIN_CENTS = 1997.3794084376191, 20.0
"""Cents above 10 Hz of the lowest bin, and between bins."""

LENGTH = RATE
"""Samples in a clip: one second."""


def _pitch(rng: np.random.Generator) -> np.ndarray:
    """Hz at every sample."""
    t = np.arange(LENGTH) / RATE
    f0 = np.exp(rng.uniform(np.log(50), np.log(1500)))
    cents = rng.uniform(-200, 200) * (t - 0.5)
    depth, rate, phase = rng.uniform(0, 60), rng.uniform(4, 7), rng.uniform(0, 6.28)
    cents = cents + depth * np.sin(2 * np.pi * rate * t + phase)
    walk = np.cumsum(rng.standard_normal(LENGTH))
    walk -= np.linspace(walk[0], walk[-1], LENGTH)
    cents = cents + 8 * walk / (np.abs(walk).max() + 1e-9)
    return np.asarray(np.clip(f0 * 2 ** (cents / 1200), 40, 1900))


def _harmonics(rng: np.random.Generator, f: np.ndarray) -> np.ndarray:
    """The tone of pitch f: all harmonics, weak even ones, or a weak fundamental, under three resonances."""
    phase = 2 * np.pi * np.cumsum(f) / RATE
    count = max(1, min(40, int(7600 / f.max())))
    tilt, centres, widths = rng.uniform(0.5, 1.8), rng.uniform(200, 4000, 3), rng.uniform(80, 400, 3)
    kind = rng.integers(3)
    tone = np.zeros(LENGTH)
    for h in range(1, count + 1):
        resonance = np.exp(-0.5 * ((h * f.mean() - centres) / widths) ** 2).sum()
        weight = 0.15 if kind == 1 and h % 2 == 0 else 0.2 if kind == 2 and h == 1 else 1.0
        tone += weight * h**-tilt * (0.25 + resonance) * np.sin(h * phase + rng.uniform(0, 6.28))
    return tone


def clip(rng: np.random.Generator, snr_db: float) -> tuple[np.ndarray, np.ndarray]:
    """One second of sound and its pitch in Hz at every sample."""
    t = np.arange(LENGTH) / RATE
    f = _pitch(rng)
    tone = _harmonics(rng, f)
    attack, decay = rng.uniform(0.005, 0.08), rng.uniform(0.3, 3)
    tone *= np.minimum(1, t / attack) * np.exp(-t / decay)
    tail = int(0.12 * RATE)
    room = rng.standard_normal(tail) * np.exp(-np.arange(tail) / (0.03 * RATE))
    room[0] = 12
    tone = np.convolve(tone, room)[:LENGTH]
    spectrum = np.fft.rfft(rng.standard_normal(LENGTH))
    colour = (np.arange(len(spectrum)) + 1.0) ** -rng.uniform(0, 0.5)
    noise = np.fft.irfft(spectrum * colour, LENGTH)
    tone, noise = (sound / np.sqrt((sound**2).mean()) for sound in (tone, noise))
    return (tone + noise * 10 ** (-snr_db / 20)).astype(np.float32), f


def frames(clips: int, seed: int, snr_db: float, each: int = 6) -> tuple[Tensor, Tensor]:
    """Frames (N, 1024), each of mean 0 and deviation 1, and the pitch at their centres (N,); `each` a clip."""
    rng = np.random.default_rng(seed)
    starts = np.linspace(0, LENGTH - WINDOW, each).astype(int)
    made = [clip(rng, snr_db) for _ in range(clips)]
    cut = np.stack([sound[i : i + WINDOW] for sound, _ in made for i in starts])
    pitch = np.array([f[i + WINDOW // 2] for _, f in made for i in starts])
    x = torch.from_numpy(cut)
    x = x - x.mean(1, keepdim=True)
    return x / x.std(1, keepdim=True).clamp_min(1e-10), torch.from_numpy(pitch).float()


def decode(probabilities: Tensor) -> Tensor:
    """Hz from probabilities (N, 360): their mean within four bins of the largest."""
    best = probabilities.argmax(1)
    near = (best[:, None] + torch.arange(-4, 5)).clamp(0, probabilities.shape[1] - 1)
    weights = probabilities.gather(1, near)
    cents = BIN_CENTS * near.float() + FIRST_BIN_CENTS
    return 10 * 2 ** ((weights * cents).sum(1) / weights.sum(1) / 1200)


@torch.no_grad()
def raw_pitch_accuracy(net: nn.Module, x: Tensor, pitch: Tensor, batch: int = 256) -> float:
    """Share of frames whose pitch is found within 50 cents."""
    found = decode(torch.cat([net(part) for part in x.split(batch)]))
    return float(((1200 * torch.log2(found / pitch)).abs() < 50).float().mean())

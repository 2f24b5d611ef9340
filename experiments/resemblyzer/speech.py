"""Speech of many voices (Debian: apt-get install espeak-ng), its spectrograms, and how well voices are told apart.

A voice is one of espeak-ng's variants in one of its languages. Each of its utterances has other words, which are made
up or numbers, another pitch and speed, and other noise.
"""

from __future__ import annotations

import io
import random
import subprocess
import wave
from functools import cache

import numpy as np
import torch
from scipy.signal import resample_poly
from torch import Tensor

RATE, WINDOW, HOP, BANDS = 16_000, 400, 160, 40
LANGUAGES = ("en-us", "de", "fr-fr", "es", "it", "pt", "nl", "sv", "pl", "cs", "ru", "tr", "fi", "ro", "hu", "en-gb")
VARIANTS = [
    "adam",
    "Alex",
    "Alicia",
    "Andrea",
    "Andy",
    "Annie",
    "antonio",
    "aunty",
    "belinda",
    "benjamin",
    "boris",
    "caleb",
    "david",
    "Denis",
    "Diogo",
    "ed",
    "edward",
    "edward2",
    "Gene",
    "Gene2",
    "gustave",
    "Henrique",
    "Hugo",
    "iven",
    "iven2",
    "iven3",
    "iven4",
    "Jacky",
    "john",
    "kaukovalta",
    "Lee",
    "linda",
    "marcelo",
    "Marco",
    "mario",
    "max",
    "Michael",
    "michel",
    "miguel",
    "Mike",
    "Nguyen",
    "pablo",
    "paul",
    "pedro",
    "quincy",
    "rob",
    "robert",
    "steph",
    "steph2",
    "steph3",
    "Storm",
    "travis",
    "victor",
    "zac",
    "anika",
    "AnxiousAndy",
    "f1",
    "f2",
    "f3",
    "f4",
    "f5",
    "grandpa",
    "grandma",
    "klatt",
    "klatt2",
    "klatt3",
    "klatt4",
    "klatt5",
    "m1",
    "m2",
    "m3",
    "m4",
    "m5",
    "m6",
    "m7",
    "m8",
    "norbert",
    "sandro",
    "shelby",
]
"""Whispers, robots and test voices are left out."""

MEASURED = 44
"""Of the shuffled variants: the others are for calibration, training and validation."""

UTTERANCES = 20
QUIET_DBFS = -30.0
"""Softer speech is made as loud, as the package does it."""

TRIM_DB = 40.0
"""Frames so much below the loudest, at the ends, are cut off."""

SNR_DB = (5.0, 25.0)


def voices(part: str) -> list[str]:
    """Names of the voices of a part: no variant is in two of "measured", "calibration" and "validation".

    "training" are those of calibration, each in all languages.
    """
    names = list(VARIANTS)
    random.Random(0).shuffle(names)  # noqa: S311 - reproducible draws, no secret
    pairs = [f"{LANGUAGES[place % len(LANGUAGES)]}+{name}" for place, name in enumerate(names)]
    cut = {"measured": slice(MEASURED), "calibration": slice(MEASURED, -6), "validation": slice(-6, None)}
    if part == "training":
        return [f"{language}+{name}" for name in names[cut["calibration"]] for language in LANGUAGES]
    return pairs[cut[part]]


def _words(rng: random.Random) -> str:
    """Made-up words of open syllables, and numbers, which every language reads in its own way."""
    made = []
    for _ in range(rng.randint(4, 6)):
        syllables = rng.randint(2, 3)
        made.append("".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(syllables)))
    made.insert(rng.randint(0, len(made)), str(rng.randint(10, 999)))
    return " ".join(made)


def _sound(voice: str, rng: random.Random) -> np.ndarray:
    """Clean speech at 16 kHz."""
    pitch, speed = rng.randint(35, 65), rng.randint(130, 200)
    command = ["espeak-ng", "-v", voice, "-p", str(pitch), "-s", str(speed), "--stdout", _words(rng)]
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    with wave.open(io.BytesIO(raw)) as file:
        rate, start = file.getframerate(), raw.index(b"data") + 8  # written to a pipe, it does not know its length
    sound = np.frombuffer(raw[start : start + (len(raw) - start) // 2 * 2], "<i2") / 32768
    shared = np.gcd(RATE, rate)
    return np.asarray(resample_poly(sound, RATE // shared, rate // shared))


def _trimmed(sound: np.ndarray) -> np.ndarray:
    frames = sound[: len(sound) // HOP * HOP].reshape(-1, HOP)
    level = 10 * np.log10(np.square(frames).mean(1) + 1e-12)
    loud = np.flatnonzero(level > level.max() - TRIM_DB)
    return frames[loud[0] : loud[-1] + 1].ravel()


def _noisy(sound: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """With noise between white and pink, and as loud as the package makes it."""
    spectrum = np.fft.rfft(rng.standard_normal(len(sound)))
    colour = (np.arange(len(spectrum)) + 1.0) ** -rng.uniform(0, 0.5)
    noise = np.fft.irfft(spectrum * colour, len(sound))
    rms = np.sqrt(np.square(sound).mean())
    noise *= rms / np.sqrt(np.square(noise).mean()) * 10 ** (-rng.uniform(*SNR_DB) / 20)
    mixed = sound + noise
    level = 20 * np.log10(np.sqrt(np.square(mixed).mean()))
    return mixed * 10 ** (max(0.0, QUIET_DBFS - level) / 20)


def _mel(hz: np.ndarray) -> np.ndarray:
    """Slaney's scale: linear up to 1 kHz, logarithmic above."""
    high = 15 + 27 * np.log(np.maximum(hz, 1000) / 1000) / np.log(6.4)
    return np.where(hz < 1000, hz * 3 / 200, high)


@cache
def mel_filters() -> Tensor:
    """(40, 201): triangles between equal steps of Slaney's scale, each of area 1, as librosa has them."""
    fine = np.linspace(0, RATE / 2, 80_001)
    edges = np.interp(np.linspace(0, _mel(np.array([RATE / 2]))[0], BANDS + 2), _mel(fine), fine)
    bins = np.linspace(0, RATE / 2, WINDOW // 2 + 1)
    low, centre, high = (edges[shift : shift + BANDS, None] for shift in range(3))
    triangles = np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)).clip(0)
    return torch.from_numpy(triangles * 2 / (high - low)).float()


def spectrogram(sound: np.ndarray) -> Tensor:
    """(frames, 40): the power of mel bands, no logarithm, as the package's network takes it."""
    x = torch.from_numpy(np.ascontiguousarray(sound, dtype=np.float32))
    window = torch.hann_window(WINDOW)
    power = torch.stft(x, WINDOW, HOP, window=window, pad_mode="constant", return_complex=True).abs().square()
    return (mel_filters() @ power).T.contiguous()


def utterances(part: str, count: int, seed: int = 0, most: int | None = None) -> tuple[list[Tensor], list[int]]:
    """Spectrograms of `count` utterances of every voice of a part (of its first `most`), and whose they are."""
    mels, whose = [], []
    for number, voice in enumerate(voices(part)[:most]):
        for place in range(count):
            rng = random.Random(f"{part} {voice} {seed} {place}")  # noqa: S311
            sound = _trimmed(_sound(voice, rng))
            mels.append(spectrogram(_noisy(sound, np.random.default_rng(rng.randrange(2**32)))))
            whose.append(number)
    return mels, whose


def scores(embeddings: Tensor, whose: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Cosine of every pair of utterances, and whether both are of one voice."""
    first, second = np.triu_indices(len(whose), 1)
    labels = np.asarray(whose)
    cosines = (embeddings @ embeddings.T).double().numpy()
    return cosines[first, second], labels[first] == labels[second]


def equal_error_rate(cosines: np.ndarray, same: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Where as many pairs of one voice are rejected as pairs of two are accepted."""
    order = np.argsort(cosines, kind="stable")
    counted = np.ones(len(order)) if weights is None else weights[order]
    own = np.cumsum(counted * same[order])
    others = np.cumsum(counted * ~same[order])
    rejected, accepted = own / own[-1], 1 - others / others[-1]
    place = int(np.argmin(np.abs(rejected - accepted)))
    return float((rejected[place] + accepted[place]) / 2)

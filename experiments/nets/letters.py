"""Letters, 26 classes with upper and lower case merged: EMNIST where its IDX files are, else letters from fonts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from data import SYSTEM, read_idx
from torch import Tensor
from torch.nn import functional

EMNIST = "EMNIST letters"
FONTS = "letters rendered from fonts in place of EMNIST letters (no handwriting; test letters of other font families)"
SIZE = 32
"""Pixels a side: the source's nets see the 28 x 28 images enlarged."""

SHARES = 5
"""Training images to every validation image, as in the source: 104,000 to 20,800."""


@dataclass(frozen=True)
class Letters:
    """Images (N, 1, 32, 32) in [0, 1] with labels 0 ... 25, to train on, to stop by and to judge; and what they are."""

    kind: str
    train: tuple[Tensor, Tensor]
    valid: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load_letters(folder: Path | None, images: int | None = None) -> Letters:
    """The letters of a data folder; always the same division, `images` of the training part at most.

    Raises:
        FileNotFoundError: neither `emnist/` with its IDX files nor `letters26.npz` is there.
    """
    place = _emnist(folder)
    kind, x, y, xt, yt = _read_emnist(place) if place else _read_fonts(folder)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held = len(x) // (SHARES + 1)
    keep = order[held:][:images]
    stop = order[:held] if images is None else order[: max(500, images // SHARES)]
    parts = [(_enlarged(a), b) for a, b in ((x[keep], y[keep]), (x[stop], y[stop]), (xt, yt))]
    return Letters(kind, *parts)


def _enlarged(x: Tensor) -> Tensor:
    return functional.interpolate(x[:, None].float() / 255, size=SIZE, mode="bilinear", align_corners=False)


def _emnist(folder: Path | None) -> Path | None:
    places = [*([folder / "emnist", folder] if folder else []), SYSTEM / "emnist"]
    return next((place for place in places if list(place.glob("emnist-letters-train-images-idx3-ubyte*"))), None)


def _read_emnist(place: Path) -> tuple[str, Tensor, Tensor, Tensor, Tensor]:
    """EMNIST stores its images transposed and counts letters from 1."""
    found = []
    for split in ("train", "test"):
        for part in ("images-idx3", "labels-idx1"):
            found.append(read_idx(next(place.glob(f"emnist-letters-{split}-{part}-ubyte*"))))
    x, y, xt, yt = found
    return EMNIST, x.mT, y.long() - 1, xt.mT, yt.long() - 1


def _read_fonts(folder: Path | None) -> tuple[str, Tensor, Tensor, Tensor, Tensor]:
    path = (folder or SYSTEM) / "letters26.npz"
    if not path.exists():
        raise FileNotFoundError(f"No letters: neither emnist/ with its IDX files nor letters26.npz in '{path.parent}'.")
    with np.load(path) as held:
        x, y, xt, yt = (torch.from_numpy(held[key]) for key in ("xt", "yt", "xe", "ye"))
    return FONTS, x, y.long(), xt, yt.long()

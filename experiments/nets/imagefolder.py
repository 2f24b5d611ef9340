"""Images of a folder of classes, as nets for ImageNet want them.

The shorter side to 256, the middle 224 x 224, mean and standard deviation of ImageNet.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SIDE, SHORTER = 224, 256
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 64
SUFFIXES = {".jpeg", ".jpg", ".png"}


def read(path: Path, side: int = SIDE) -> Tensor:
    """One image (3, side, side), standardized."""
    with Image.open(path) as image:
        rgb = image.convert("RGB")
        scale = SHORTER * side / SIDE / min(rgb.size)
        rgb = rgb.resize((max(side, round(rgb.width * scale)), max(side, round(rgb.height * scale))))
        left, top = (rgb.width - side) // 2, (rgb.height - side) // 2
        pixels = np.asarray(rgb.crop((left, top, left + side, top + side)), np.float32) / 255
    return (torch.from_numpy(pixels.copy()).movedim(-1, 0) - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[
        :, None, None
    ]


def listed(folder: Path) -> list[tuple[Path, int]]:
    """The images of a folder with the numbers of their classes, both in alphabetical order."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    return [(f, n) for n, c in enumerate(classes) for f in sorted(c.iterdir()) if f.suffix.lower() in SUFFIXES]


def batches(folder: Path, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(images, labels), evenly spread over an image folder."""
    files = listed(folder)
    some = [files[place] for place in torch.linspace(0, len(files) - 1, min(most, len(files))).round().long()]
    for start in range(0, len(some), BATCH):
        part = some[start : start + BATCH]
        yield torch.stack([read(file) for file, _ in part]), torch.tensor([number for _, number in part])

"""The source's own evaluation, where a folder holds ImageNet and weights of the net.

    DATA/imagenet/train/CLASS/*.JPEG    calibration: 1,024 images
    DATA/imagenet/val/CLASS/*.JPEG      evaluation: 20,000 images at most; classes in alphabetical order
    DATA/imagenet/net.safetensors       weights of `shapes.net()`, by the names of its layers

Images: the shorter side to 256, the middle 224 x 224, mean and standard deviation of ImageNet.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from shapes import ROWS, net
from torch import Tensor, nn

import taut

SIDE, SHORTER = 224, 256
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CALIBRATION, EVALUATION, BATCH = 1024, 20_000, 64
SUFFIXES = {".jpeg", ".jpg", ".png"}


def find(data: Path | None) -> Path | None:
    """The folder, if it has everything."""
    folder = None if data is None else data / "imagenet"
    if folder is None or not (folder / "net.safetensors").is_file():
        return None
    return folder if (folder / "val").is_dir() and (folder / "train").is_dir() else None


def read(path: Path) -> Tensor:
    """One image (3, 224, 224), standardized."""
    with Image.open(path) as image:
        rgb = image.convert("RGB")
        scale = SHORTER / min(rgb.size)
        rgb = rgb.resize((max(SIDE, round(rgb.width * scale)), max(SIDE, round(rgb.height * scale))))
        left, top = (rgb.width - SIDE) // 2, (rgb.height - SIDE) // 2
        pixels = np.asarray(rgb.crop((left, top, left + SIDE, top + SIDE)), np.float32) / 255
    return (torch.from_numpy(pixels.copy()).movedim(-1, 0) - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[
        :, None, None
    ]


def batches(folder: Path, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(images, labels), evenly spread over an image folder."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    files = [(f, n) for n, c in enumerate(classes) for f in sorted(c.iterdir()) if f.suffix.lower() in SUFFIXES]
    some = [files[place] for place in torch.linspace(0, len(files) - 1, min(most, len(files))).round().long()]
    for start in range(0, len(some), BATCH):
        part = some[start : start + BATCH]
        yield torch.stack([read(file) for file, _ in part]), torch.tensor([number for _, number in part])


@torch.no_grad()
def top_5_error(model: nn.Module, folder: Path) -> float:
    """Share of images whose class is not among the five first."""
    wrong = total = 0
    for x, y in batches(folder, EVALUATION):
        wrong += int((model(x).topk(5, 1).indices != y[:, None]).all(1).sum())
        total += len(y)
    return wrong / total


def evaluate(folder: Path) -> list[dict[str, Any]]:
    """Top-5 error of the net and of every row of Table 2, in paper mode and refitted, nothing trained."""
    model = net()
    model.load_state_dict(load_file(folder / "net.safetensors"))
    data = [x for x, _ in batches(folder / "train", CALIBRATION)]
    network = taut.trace(model, data[0][:1])
    stats = taut.observe(network, model, data)
    rows: list[dict[str, Any]] = [{"row": "original", "top_5_error": top_5_error(model, folder / "val")}]
    for layer, method, settings, *_ in ROWS:
        paper = {"metric": "frobenius"} if method == "svd" else {"metric": "frobenius", "paper": True}
        for mode, extra in (("paper", paper), ("data, refitted", {"metric": "data"})):
            step = taut.Step((layer,), method, settings | extra, allow_growth=True)
            small = taut.apply(model, taut.Plan.of(network, [step]), stats, data=data if mode != "paper" else None)
            row = f"{layer} {method} {settings}, {mode}"
            rows.append({"row": row, "top_5_error": top_5_error(small, folder / "val")})
    return rows

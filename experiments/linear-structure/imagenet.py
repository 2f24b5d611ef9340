"""The source's own evaluation, where a folder holds ImageNet and weights of the net.

DATA/imagenet/train/CLASS/*.JPEG    calibration: 1,024 images
DATA/imagenet/val/CLASS/*.JPEG      evaluation: 20,000 images at most; classes in alphabetical order
DATA/imagenet/net.safetensors       weights of `shapes.net()`, by the names of its layers
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from imagefolder import batches
from safetensors.torch import load_file
from shapes import ROWS, net
from torch import nn

import taut

CALIBRATION, EVALUATION = 1024, 20_000


def find(data: Path | None) -> Path | None:
    """The folder, if it has everything."""
    folder = None if data is None else data / "imagenet"
    if folder is None or not (folder / "net.safetensors").is_file():
        return None
    return folder if (folder / "val").is_dir() and (folder / "train").is_dir() else None


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

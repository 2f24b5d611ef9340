"""Libraries whose definitions are plain torch, though they do not import beside this torch.

torchvision and torchaudio from PyPI are built against torch's CUDA libraries: their compiled parts cannot be loaded
beside a CPU build. Their models need next to nothing of these.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


@functools.cache
def torchvision() -> Any:
    """The library with the two operators declared that stop its import, of which detectors need one.

    Other libraries import it, and torchaudio, wherever they are installed: the latter is hidden from them.
    """
    hidden: dict[str, Any] = {"torchaudio": None}
    sys.modules.update({name: module for name, module in hidden.items() if name not in sys.modules})
    if importlib.util.find_spec("torchvision") is None:
        return None
    library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", _suppressed, "CPU")
    KEPT.append(library)
    boxes: Any = importlib.import_module("torchvision.ops.boxes")
    boxes._assert_has_ops = lambda: None  # the one that it asks for is there
    return importlib.import_module("torchvision")


KEPT: list[Any] = []
"""A library of operators lives as long as its object."""


def _suppressed(boxes: Tensor, scores: Tensor, limit: float) -> Tensor:
    """Indices of the boxes that overlap no better one by more than the limit, best first."""
    order = scores.argsort(descending=True, stable=True)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept = []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        low, high = torch.maximum(boxes[best, :2], boxes[order, :2]), torch.minimum(boxes[best, 2:], boxes[order, 2:])
        common = (high - low).clamp_min(0).prod(1)
        order = order[common / (area[best] + area[order] - common) <= limit]
    return torch.stack(kept) if kept else torch.empty(0, dtype=torch.long)


@functools.cache
def torchaudio_model(name: str) -> Any:
    """One module of torchaudio.models, without what stands around it."""
    spec = PathFinder.find_spec("torchaudio")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("torchaudio")
    for package in ("torchaudio", "torchaudio.models"):
        stub = ModuleType(package)
        stub.__path__ = [str(Path(spec.origin).parent.joinpath(*package.split(".")[1:]))]
        sys.modules[package] = stub
    return importlib.import_module(f"torchaudio.models.{name}")

"""What the scripts of this folder share: images, accuracy, and the helpers of the neighbouring folders."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import taut
from taut.studies import Bound, load_average

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1] / "benchmarks"), str(HERE.parent / "nets")]

from data import load, split_train  # noqa: E402 - found through the line above: experiments are scripts, no package
from ending import finish  # noqa: E402
from fashion import trained  # noqa: E402

__all__ = ["HERE", "Bound", "calibration", "evaluation", "finish", "load", "load_average", "split_train", "trained"]

BATCH = 256


def calibration(images: Tensor, samples: int, seed: int) -> list[Tensor]:
    """`samples` of the images at random, in batches, without labels."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return list(images[order[:samples]].split(BATCH))


def evaluation(images: Tensor, labels: Tensor) -> Callable[[nn.Module], taut.Metric]:
    """`accuracy(model)` on these images, as taut's verbs want it."""

    @torch.no_grad()
    def accuracy(model: nn.Module) -> taut.Metric:
        model.eval()
        hits = [(model(x).argmax(1) == y).sum() for x, y in zip(images.split(500), labels.split(500), strict=True)]
        return taut.Metric(int(torch.stack(hits).sum()) / len(images), len(images))

    return accuracy

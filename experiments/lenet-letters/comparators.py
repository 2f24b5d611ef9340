"""All methods on the same trained nets with the same training: a study per net, untrained and trained."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from data import load, split_train
from fashion import trained
from lenet import WIDTHS
from running import Shuffled, accuracy
from study import dense, letters
from torch import nn

from taut.core.fingerprint import fingerprint
from taut.studies import Cell
from taut.studies.making import Subject
from taut.studies.studying import study
from taut.studies.wishes import Grid

NETS = ("lenet", "vgg", "resnet")
SIZED = ("auto", "svd", "tucker", "cp", "magnitude", "mfbp", "obs")
"""Methods that a size steers: low rank by the budget, masks by the share of weights that are not zero."""

FIXED = (
    "codebook(block=4,codes=256,shared=true)",
    "codebook(block=8,codes=256,shared=true)",
    "int8",
    "hashed(share=0.25)",
    "hashed(share=0.1)",
    "fastfood",
    "lowrank_sparse(rank=4,density=0.05)",
)
"""Methods whose size is in their settings."""

SIZES = {"lenet": (0.25, 0.1), "vgg": (0.15,), "resnet": (0.15,)}
FEW = (
    "auto",
    "svd",
    "tucker",
    "magnitude",
    "obs",
    "codebook(block=4,codes=256,shared=true)",
    "codebook(block=8,codes=256,shared=true)",
    "int8",
    "hashed(share=0.1)",
    "fastfood",
)
"""Those that the largest net is tried with."""

IMAGES, BATCH, EPOCHS, TEST, VALID = 8_000, 32, 1, 5_000, 2_000
"""Training images of the common training, images per timed call, epochs, test and validation images."""


def subject(net: str, place: Cell) -> Subject:
    """A trained net with its test images, and the training that all get."""
    folder = None if place["folder"] is None else Path(place["folder"])
    quick = place["quick"]
    if net == "lenet":
        data = letters(folder, quick)
        model: nn.Module = dense(place | {"seed": 0}, WIDTHS)[0]
        (x, y), (xv, yv), test = data.train, data.valid, data.test
    else:
        model = trained(net)
        x, y, xv, yv = split_train("fashion-mnist", folder)
        test = load("fashion-mnist", "test", folder)
    images, many = (2000, 1000) if quick else (IMAGES, TEST)
    some = torch.randperm(len(test[0]), generator=torch.Generator().manual_seed(0))[:many]
    test, (xv, yv) = (test[0][some], test[1][some]), (xv[:VALID], yv[:VALID])
    score = partial(accuracy, x=test[0], y=test[1])
    return Subject(
        model,
        x[:BATCH],
        lambda small: {"accuracy": score(small)},
        lambda: list(x[:2048].split(256)),
        lambda: (Shuffled(x, y, images), lambda small: accuracy(small, xv, yv)),
        nn.functional.cross_entropy,
        fingerprint(nn.Module(), [test[0], x[:images], y[:images]], (net, images, quick)),
    )


def compared(place: Cell, net: str, jobs: int) -> dict[str, list[dict[str, Any]]]:
    """Rows of the study of a net: "untrained", and "trained" with its control."""
    quick = place["quick"]
    methods = ("auto", "magnitude", "obs", "int8") if quick else FEW if net == "vgg" else (*SIZED, *FIXED)
    sizes = (0.25,) if quick else SIZES[net]
    found = {}
    kinds: dict[str, int | None] = {} if net == "vgg" else {"untrained": None}
    kinds["trained"] = 1 if quick else EPOCHS
    for kind, epochs in kinds.items():
        out = Path(place["out"]) / "comparators" / f"{'quick-' if quick else ''}{net}-{kind}"
        rows = study(partial(subject, net, place), out, Grid(methods, sizes, 1, epochs), jobs)
        found[kind] = [as_row(row) for row in rows]
    return found


def as_row(row: Any) -> dict[str, Any]:
    """What is kept of a run."""
    keys = ("method", "size", "seed", "params", "nonzero", "macs", "bytes", "zipped", "ms", "speedup", "reason")
    return {key: getattr(row, key) for key in keys} | {"accuracy": (row.metric or {}).get("accuracy")}

"""Optimal brain surgeon beside masks alone, untrained, on trained nets: how far weights can be removed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from data import load, split_train
from fashion import trained
from running import accuracy
from torch import Tensor, nn

import taut
from taut.studies import Cell

SPINE = Path(__file__).parent.parent / "spine"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "magnitude": ("magnitude", {}),
    "obd": ("magnitude", {"score": "obd"}),
    "mfbp": ("mfbp", {}),
    "obs": ("obs", {}),
}
REFITTED = ("magnitude", "obs")
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
TEST = 5_000
NETS = ("digit_cnn", "vgg", "resnet")
CALIBRATION = 1024
"""Training images, without labels."""


def wanted(quick: bool) -> list[Cell]:
    """Every net and method, bare and with the refit that every mask gets from calibration images."""
    nets = ("resnet",) if quick else NETS
    methods = ("magnitude", "obs") if quick else tuple(METHODS)
    return [
        {"net": net, "method": method, "refit": refit, "quick": quick}
        for net in nets
        for method in methods
        for refit in ((False,) if quick or method not in REFITTED else (False, True))
    ]


def missing(net: str) -> str:
    """Why a net cannot be tested here, or nothing."""
    if net != "digit_cnn":
        return ""
    sys.path.append(str(SPINE))
    import digit  # noqa: PLC0415 - needs a package of another author

    try:
        digit.package()
    except SystemExit:
        return f"not installed: {digit.INSTALL}"
    return ""


def prepared(net: str, folder: Path | None) -> tuple[nn.Module, Tensor, tuple[Tensor, Tensor]]:
    """A trained net, its training images, and the test split."""
    if net != "digit_cnn":
        return trained(net), split_train("fashion-mnist", folder)[0], load("fashion-mnist", "test", folder)
    from digit import normalized, trained_net  # noqa: PLC0415 - as above

    images, labels = load("mnist", "test", folder)
    return trained_net(), normalized(split_train("mnist", folder)[0]), (normalized(images), labels)


def run(place: Cell, cell: Cell) -> dict[str, Any]:
    """Test accuracy at every sparsity, of all layers together; nothing is trained."""
    missing(cell["net"])  # finds the module
    folder = None if place["folder"] is None else Path(place["folder"])
    net, x, test = prepared(cell["net"], folder)
    order = torch.randperm(len(test[0]), generator=torch.Generator().manual_seed(0))
    test = tuple(part[order[: 2000 if cell["quick"] else TEST]] for part in test)
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:CALIBRATION]
    network, batches = taut.trace(net, x[:2]), list(x[rows].split(256))
    stats = taut.observe(network, net, batches)
    method, settings = METHODS[cell["method"]]
    curve = []
    for sparsity in (0.5, 0.8) if cell["quick"] else SPARSITIES:
        step = taut.whole(network, method, sparsity=sparsity, **settings)
        small = taut.apply(net, taut.Plan((step,)), stats, batches if cell["refit"] else None)
        curve.append([sparsity, accuracy(small, *test)])
    return {"dense": accuracy(net, *test), "curve": curve}

"""Vector and product quantization of a dense net: accuracy over stored bytes, untrained and trained through."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import torch
from data import load, split_train
from running import Shuffled, accuracy
from safetensors.torch import load_file, save_file
from torch import nn

import taut
from taut.studies import Cell

WIDTHS = (784, 500, 300, 10)
EPOCHS, MORE, IMAGES = 10, 3, 20_000
NOTHING = taut.Plan(())
SETTINGS: tuple[dict[str, Any], ...] = (
    {"block": 2, "codes": 256, "shared": True},
    {"block": 4, "codes": 256, "shared": True},
    {"block": 6, "codes": 256, "shared": True},
    {"block": 8, "codes": 256, "shared": True},
    {"block": 4, "codes": 16, "shared": False},
    {"block": 8, "codes": 16, "shared": False},
)


def wanted(quick: bool, seeds: int) -> list[Cell]:
    """Every setting, and the net as it is with the same further training."""
    sets = ("fashion-mnist",) if quick else ("mnist", "fashion-mnist")
    ways: tuple[dict[str, Any], ...] = ({}, *(SETTINGS[1:3] if quick else SETTINGS))
    return [
        {"data": name, "settings": setting, "seed": seed, "quick": quick}
        for name in sets
        for seed in range(seeds if name == "fashion-mnist" else 1)
        for setting in ways
    ]


def dense(seed: int) -> nn.Sequential:
    """Linear and ReLU in turn."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(WIDTHS):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def run(place: Cell, cell: Cell) -> dict[str, Any]:
    """Stored bytes, and accuracy on the test images before and after the further training."""
    folder = None if place["folder"] is None else Path(place["folder"])
    images, seed = (4000 if cell["quick"] else IMAGES), cell["seed"]
    x, y, xv, yv = split_train(cell["data"], folder)
    test, batches = load(cell["data"], "test", folder), Shuffled(x, y, images)

    def tuned(net: nn.Module, epochs: int) -> nn.Module:
        return taut.finetune(
            net,
            None,
            None,
            batches,
            lambda small: accuracy(small, xv, yv),
            schedule=(taut.Stage(epochs=epochs),),
            loss=nn.functional.cross_entropy,
            example=x[:2],
            seed=seed,
        )

    net = dense(seed)
    path = Path(place["out"]) / "nets" / f"dense {cell['data']} {images} {seed}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tuned(net, EPOCHS).state_dict(), path)
    net.load_state_dict(load_file(path))
    net.eval()
    network = taut.trace(net, x[:2])
    steps = [
        taut.Step((layer.name,), "codebook", cell["settings"] | {"seed": seed}, allow_growth=True)
        for layer in network.layers
        if cell["settings"]
    ]
    plan = taut.Plan.of(network, steps)
    small = taut.apply(net, plan, taut.observe(network, net, x[:2048]), x[:2048]) if steps else net
    return {
        "bytes": [stored(net), stored(small, plan)],
        "before": accuracy(net, *test),
        "untrained": accuracy(small, *test),
        "trained": accuracy(tuned(small, MORE), *test),
    }


def stored(net: nn.Module, plan: taut.Plan = NOTHING) -> int:
    """Size of the file of weights."""
    with tempfile.TemporaryDirectory() as name:
        taut.save(net, plan, Path(name) / "net")
        return (Path(name) / "net" / "model.safetensors").stat().st_size

"""Vector and product quantization of a dense net: accuracy over stored bytes, untrained and trained through."""

from __future__ import annotations

import itertools
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch
from data import load, split_train
from running import Shuffled, accuracy
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn

import taut
from taut.core.files import write_atomic
from taut.studies import Cell

WIDTHS = (784, 500, 300, 10)
EPOCHS, MORE, IMAGES = 10, 3, 20_000
NOTHING = taut.Plan(())
SETTINGS: tuple[dict[str, Any], ...] = (
    {"block": 2, "codes": 256, "shared": True},
    {"block": 4, "codes": 256, "shared": True},
    {"block": 6, "codes": 256, "shared": True},
    {"block": 8, "codes": 256, "shared": True},
    {"block": 10, "codes": 256, "shared": True},
    {"block": 4, "codes": 16, "shared": False},
    {"block": 8, "codes": 16, "shared": False},
    {"int8": True},
    {"pruned": 0.9, "int8": True},
)
"""Of the codebook; or eight bits a weight, alone and behind a pruning (with the archive, deep compression)."""


def wanted(quick: bool, seeds: int) -> list[Cell]:
    """Every setting, and the net as it is with the same further training."""
    sets = ("fashion-mnist",) if quick else ("mnist", "fashion-mnist")
    ways: tuple[dict[str, Any], ...] = ({}, *(SETTINGS[1:3] if quick else SETTINGS))
    return [
        {"data": name, "settings": setting, "seed": seed, "quick": quick}
        for name in sets
        for seed in range(seeds)
        for setting in ways
    ]


def first(cells: list[Cell]) -> list[Cell]:
    """The runs that train the dense nets, which the others read: they come before them."""
    return [cell for cell in cells if not cell["settings"]]


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
    path = Path(place["out"]) / "nets" / f"dense {cell['data']} {images} {EPOCHS} {seed}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, to_bytes(tuned(net, EPOCHS).state_dict()))
    net.load_state_dict(load_file(path))
    net.eval()
    network = taut.trace(net, x[:2])
    plan = taut.Plan.of(network, steps(network, cell["settings"], seed))
    small = taut.apply(net, plan, taut.observe(network, net, x[:2048]), x[:2048]) if plan.steps else net
    (whole, whole_zipped), (part, part_zipped) = stored(net), stored(small, plan)
    trained = tuned(small, MORE)
    return {
        "bytes": [whole, part],
        "zipped": [whole_zipped, part_zipped],
        "before": accuracy(net, *test),
        "untrained": accuracy(small, *test),
        "valid": accuracy(trained, xv, yv),
        "trained": accuracy(trained, *test),
    }


def steps(network: taut.Network, settings: dict[str, Any], seed: int) -> list[taut.Step]:
    """One per layer; a pruning of all layers goes before."""
    if not settings:
        return []
    found = [taut.whole(network, "obs", sparsity=settings["pruned"])] if "pruned" in settings else []
    for layer in network.layers:
        own: dict[str, Any] = {}
        if "block" in settings:
            own = settings | {"seed": seed}
            if not own["shared"]:  # a block of columns has as many pieces as there are outputs
                own["codes"] = min(own["codes"], layer.weight[0])
        found.append(taut.Step((layer.name,), "codebook" if own else "int8", own, allow_growth=True))
    return found


def stored(net: nn.Module, plan: taut.Plan = NOTHING) -> tuple[int, int]:
    """Size of the file of weights, and after zlib."""
    with tempfile.TemporaryDirectory() as name:
        taut.save(net, plan, Path(name) / "net")
        content = (Path(name) / "net" / "model.safetensors").read_bytes()
    return len(content), len(zlib.compress(content, 6))

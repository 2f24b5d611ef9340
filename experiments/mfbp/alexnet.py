"""AlexNet at its real shapes: convolutions and dense layers factorized separately and together.

The weights are random (He's), so seconds and sizes mean something and errors are those of noise. Where a folder has
`imagenet/alexnet.safetensors` (weights by the names of `net()`'s layers) and `imagenet/val/CLASS/*`, the trained net is
pruned, too, and its top-1 error measured, nothing trained.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from lab import Lab
from rules import prune, zeros
from safetensors.torch import load_file
from torch import nn

import taut
from taut.decompose.trifactor import shared_size, signed
from taut.methods.relation_graph import Graph
from taut.structure.channels.links import find_links
from taut.studies import Cell

CONVS = ("conv1", "conv2", "conv3", "conv4", "conv5")
DENSE = ("fc6", "fc7", "fc8")
PARTS = {"convolutions": CONVS, "dense": DENSE, "together": CONVS + DENSE}
IMAGES, SPARSITIES = 2000, (0.5, 0.8)


def net() -> nn.Module:
    """Krizhevsky's net in one column."""
    torch.manual_seed(0)
    pool = lambda: nn.MaxPool2d(3, 2)  # noqa: E731
    layers: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(3, 64, 11, 4, 2)),
        ("relu1", nn.ReLU()),
        ("pool1", pool()),
        ("conv2", nn.Conv2d(64, 192, 5, padding=2)),
        ("relu2", nn.ReLU()),
        ("pool2", pool()),
        ("conv3", nn.Conv2d(192, 384, 3, padding=1)),
        ("relu3", nn.ReLU()),
        ("conv4", nn.Conv2d(384, 256, 3, padding=1)),
        ("relu4", nn.ReLU()),
        ("conv5", nn.Conv2d(256, 256, 3, padding=1)),
        ("relu5", nn.ReLU()),
        ("pool5", pool()),
        ("flat", nn.Flatten()),
        ("fc6", nn.Linear(9216, 4096)),
        ("relu6", nn.ReLU()),
        ("fc7", nn.Linear(4096, 4096)),
        ("relu7", nn.ReLU()),
        ("fc8", nn.Linear(4096, 1000)),
    ]
    built = nn.Sequential(OrderedDict(layers))
    for module in built:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return built.eval()


def wanted(quick: bool, folder: Path | None) -> list[Cell]:
    """Three graphs; and the trained net, where there is one."""
    cells: list[Cell] = [] if quick else [{"part": part} for part in PARTS]
    if folder is not None and (folder / "imagenet" / "alexnet.safetensors").is_file():
        ways = [("dense", 0.0), *((rule, s) for s in SPARSITIES for rule in ("sum", "magnitude"))]
        cells += [{"part": "trained", "rule": rule, "sparsity": sparsity} for rule, sparsity in ways]
    return cells


def run(lab: Lab, cell: Cell) -> dict[str, Any]:
    """Seconds, numbers in the factors and error of one joint factorization; or the error of the pruned trained net."""
    model = net()
    if cell["part"] == "trained":
        return trained(lab, model, cell)
    example = taut.core.example.Example(model, torch.zeros(1, 3, 224, 224))
    names = PARTS[cell["part"]]
    links = find_links(model, example, names)
    graph = Graph.of({name: model.get_submodule(name) for name in names}, links)
    ranks = graph.ranks(None)
    start = time.perf_counter()
    found = signed(graph.relations, ranks)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "relations": sum(len(relation.matrices) for relation in graph.relations),
        "types": len(ranks),
        "weights": sum(relation.matrices.numel() for relation in graph.relations),
        "numbers": shared_size(graph.relations, ranks),
        "error": found.errors[-1],
        "sweeps": len(found.errors),
    }


def trained(lab: Lab, model: nn.Module, cell: Cell) -> dict[str, Any]:
    """Top-1 error after one pruning, nothing trained."""
    from imagefolder import batches  # noqa: PLC0415 - needs an image library

    assert lab.folder is not None
    folder = lab.folder / "imagenet"
    model.load_state_dict(load_file(folder / "alexnet.safetensors"))
    small = model
    if cell["rule"] != "dense":
        small = prune(model, torch.zeros(1, 3, 224, 224), cell["rule"], cell["sparsity"])
    wrong = total = 0
    with torch.no_grad():
        for x, y in batches(folder / "val", IMAGES):
            wrong, total = wrong + int((small(x).argmax(1) != y).sum()), total + len(y)
    return {"top_1_error": wrong / total, "zeros": zeros(small)}

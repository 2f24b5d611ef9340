"""The five-convolution net of Denton et al. 2014 at its real layer shapes, and every row of its two tables.

ImageNet is not here, so the weights are random; counts and times do not depend on them. 224 x 224 -> conv 7 x 7 / 2 ->
109, pool 54, conv 5 x 5 -> 50, pool 25, conv 3 x 3 -> 25, pool 12, two conv 3 x 3, pool 6 -> 18432-4096-4096-1000.
The source does not print its paddings; these make its first dense layer 18432 wide. Its two local response
normalizations are left out: they have no weights, and no runtime here has a fast form of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import taut


def net() -> nn.Sequential:
    """The net, with random weights."""
    layers = {
        "conv1": nn.Conv2d(3, 96, 7, 2),
        "relu1": nn.ReLU(),
        "pool1": nn.MaxPool2d(2),
        "conv2": nn.Conv2d(96, 256, 5),
        "relu2": nn.ReLU(),
        "pool2": nn.MaxPool2d(2),
        "conv3": nn.Conv2d(256, 512, 3, padding=1),
        "relu3": nn.ReLU(),
        "pool3": nn.MaxPool2d(2),
        "conv4": nn.Conv2d(512, 1024, 3, padding=1),
        "relu4": nn.ReLU(),
        "conv5": nn.Conv2d(1024, 512, 3, padding=1),
        "relu5": nn.ReLU(),
        "pool5": nn.MaxPool2d(2),
        "flatten": nn.Flatten(),
        "fc1": nn.Linear(18432, 4096),
        "relu6": nn.ReLU(),
        "fc2": nn.Linear(4096, 4096),
        "relu7": nn.ReLU(),
        "fc3": nn.Linear(4096, 1000),
    }
    built = nn.Sequential()
    for name, layer in layers.items():
        built.add_module(name, layer)
    return built.eval()


ROWS: tuple[tuple[str, str, dict[str, Any], str, str], ...] = (
    ("conv1", "monochromatic", {"colours": 6}, "3x", "table-2-row-2"),
    ("conv2", "outer", {"inputs": 48, "outputs": 2, "rank": 6}, "5.3x", "table-2-row-3"),
    ("conv2", "outer", {"inputs": 48, "outputs": 2, "rank": 8}, "", ""),
    ("conv2", "bicluster", {"inputs": 2, "outputs": 2, "rank_in": 19, "rank_out": 24}, "3.9x", "table-2-row-4"),
    ("conv2", "bicluster", {"inputs": 2, "outputs": 2, "rank_in": 19, "rank_out": 64}, "", ""),
    ("fc1", "svd", {"rank": 250}, "13.4x", "table-2-row-6-k250"),
    ("fc1", "svd", {"rank": 950}, "3.5x", "table-2-row-6-k950"),
    ("fc2", "svd", {"rank": 350}, "5.8x", "table-2-row-7-k350"),
    ("fc2", "svd", {"rank": 650}, "3.14x", "table-2-row-7-k650"),
    ("fc3", "svd", {"rank": 250}, "8.1x", "table-2-row-8-k250"),
    ("fc3", "svd", {"rank": 850}, "2.4x", "table-2-row-8-k850"),
)
"""Layer, method, settings, printed reduction of the weights, claim."""


def formulas(layer: taut.Layer, method: str, s: dict[str, Any]) -> tuple[float, float, float]:
    """Weights, and operations by the source's two conventions: N, M the size of the input, or of what each layer reads.

    The first divides the input's positions by the stride squared (Table 1); the second counts the positions that the
    built layers really have (no padding: the border is lost).
    """
    F, C = layer.weight[:2]
    if method == "svd":
        weights = s["rank"] * (F + C)
        return weights, weights, weights
    (call,) = layer.calls
    taps, size = layer.kernel[0] * layer.kernel[1], call.input[-1] * call.input[-2]
    behind, out = size / (layer.stride[0] * layer.stride[1]), call.output[-1] * call.output[-2]
    if method == "monochromatic":
        parts = [(C * s["colours"], size, size), (taps * F, behind, out)]
    elif method == "outer":
        n = s["inputs"] * s["outputs"] * s["rank"]
        parts = [(n * C // s["inputs"], size, size), (n * taps, behind, out), (n * F // s["outputs"], behind, out)]
    else:
        n, i, o = s["inputs"] * s["outputs"], s["rank_in"], s["rank_out"]
        parts = [
            (n * C // s["inputs"] * i, size, size),
            (n * i * taps * o, behind, out),
            (n * o * F // s["outputs"], behind, out),
        ]
    weights, table, real = (sum(w * p for w, p in ((a[0], a[place]) for a in parts)) for place in (1, 1, 2))
    return sum(w for w, _, _ in parts), table, real


@torch.no_grad()
def count_rows() -> list[dict[str, Any]]:
    """Every row of Table 2: by the formula, as built (structural zeros apart), and as printed."""
    network = taut.trace(net(), torch.zeros(1, 3, 224, 224))
    found = []
    for name, method, settings, printed, claim in ROWS:
        group = network.group([name])
        layer = group.layer
        resolved = taut.methods.resolve(taut.Step((name,), method, settings))
        dense = layer.params - layer.weight[0] * layer.bias
        weights, table, real = formulas(layer, method, settings)
        built = resolved.skeleton(group)[name]
        params = sum(p.numel() for n, p in built.named_parameters() if not n.endswith("bias"))
        cost = resolved.cost(group)
        zeros = cost.params - cost.nonzero
        (call,) = layer.calls
        places = call.input[-1] * call.input[-2] if layer.kernel else 1
        found.append(
            {
                "layer": name,
                "method": method,
                "settings": settings,
                "claim": claim,
                "printed": printed,
                "weights": weights,
                "built": params,
                "zeros": zeros,
                "reduction": dense / weights,
                "built_reduction": dense / params,
                "operations": real,
                "built_operations": cost.macs,
                "zero_operations": zeros * places,
                "table_1_operations": table,
                "dense": dense,
                "dense_operations": layer.cost.macs,
                "grows": weights >= dense,
            }
        )
    return found

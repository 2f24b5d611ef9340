"""What fewer MACs are worth in time: ResNet-18- and VGG16-shaped nets at 224 x 224, batch 1, in every runtime.

.venv/bin/python benchmarks/speed.py [--rounds 60]     (run it alone on the machine)

The weights are random with decaying singular values (as in vgg16.py): the numbers are about time, not about accuracy.
Best against best gives the original and the compressed net each its own fastest runtime.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from ending import finish
from torch import Tensor, nn
from vgg16 import fill, vgg16

import taut
from taut.studies import Bound, load_average

ROOT = Path(__file__).parent.parent
SPECTRUM = 0.5
ALIGN = 16
"""Ranks in multiples of 16; with align=1 ResNet-18 came out at 2.0x in the same machine."""
CASES = {
    "ResNet-18": (3.0, 2.3, taut.Budget(macs=1 / 3.0)),
    # a quarter of the parameters too: at batch 1 the dense layers cost memory traffic, not arithmetic
    "VGG16": (3.8, 3.0, taut.Budget(macs=1 / 3.8, params=0.25)),
}
"""Net -> times fewer MACs, least speedup, budget."""


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    def __init__(self, c: int, d: int, stride: int) -> None:
        """`c` channels in, `d` out."""
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(c, d, 3, stride, 1, bias=False),
            nn.BatchNorm2d(d),
            nn.ReLU(inplace=True),
            nn.Conv2d(d, d, 3, 1, 1, bias=False),
            nn.BatchNorm2d(d),
        )
        same = c == d and stride == 1
        self.skip = nn.Identity() if same else nn.Sequential(nn.Conv2d(c, d, 1, stride, bias=False), nn.BatchNorm2d(d))

    def forward(self, x: Tensor) -> Tensor:
        """relu(body(x) + skip(x))."""
        return torch.relu(self.body(x) + self.skip(x))


def resnet18() -> nn.Sequential:
    """He et al. 2016: stages of 64, 128, 256 and 512 channels with two blocks each; 11.7 M parameters, 1.8 GMAC."""
    blocks: list[nn.Module] = []
    c = 64
    for d in (64, 128, 256, 512):
        blocks += [Block(c, d, 1 if d == 64 else 2), Block(d, d, 1)]
        c = d
    stem = (nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


NETS = {"ResNet-18": resnet18, "VGG16": vgg16}


def measured(name: str, rounds: int | None) -> dict[str, Any]:
    """One net before and after."""
    net = NETS[name]()
    fill(net, SPECTRUM)
    net.eval()
    example = torch.randn(1, 3, 224, 224)
    network = taut.trace(net, example)
    stats = taut.observe(network, net)
    plan = taut.plan(network, stats, CASES[name][2], align=ALIGN)
    small = taut.apply(net, plan, stats)
    found = taut.compare(net, small, None, example, rounds=rounds)
    print(f"\n{name}\n{found}", flush=True)
    methods = [f"{step.layers[0]}: {step.method} {step.settings}" for step in plan.steps]
    return found.to_dict() | {"budget": dataclasses.asdict(CASES[name][2]), "steps": methods}


def main() -> None:
    """Both nets; write results/speed.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=None, help="as many as `taut.compare` takes by itself")
    args = parser.parse_args()
    load = load_average()
    rows = {name: measured(name, args.rounds) for name in NETS}
    bounds = []
    for name, (times, limit, _) in CASES.items():
        bounds += [
            Bound(f"{name}: times fewer MACs", times, round(rows[name]["macs_ratio"], 4)),
            Bound(f"{name}: times faster, best against best, batch 1", limit, rows[name]["speedup_best"]),
        ]
    settings = {"rounds": args.rounds, "spectrum": SPECTRUM, "align": ALIGN, "load_average_before": load}
    finish(ROOT / "benchmarks" / "results" / "speed.json", settings, rows, bounds)


if __name__ == "__main__":
    main()

"""How long, and in how much memory, a VGG16-size net goes from trace to a smaller net.

.venv/bin/python benchmarks/vgg16.py [--samples 32] [--macs 0.25] [--spectrum 0.5]

The net has VGG16's shapes (138,357,544 parameters, 224 x 224) and RANDOM weights, drawn with He's scale from a fixed
seed; with --spectrum > 0 the singular values of every layer decay like i^-SPECTRUM, as those of trained layers do. The
images are synthetic (smooth noise). So the numbers are about time and memory, not about accuracy.

Everything runs in a child process of its own; the child notes the peak of its resident memory (ru_maxrss) and what it
was after importing torch and taut. The bound on memory: peak - baseline < 2 x model + the largest layer's work, the
latter being fc1's weight in float64 plus the calibration activations (inputs and outputs) of the largest layer.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from ending import finish
from torch import Tensor, nn

import taut
from taut.studies import Bound, load_average

SECONDS = 90.0
WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)
"""Output channels of the 3 x 3 convolutions; 0 is a pooling."""


def vgg16(scale: float = 1.0) -> nn.Sequential:
    """VGG16 (Simonyan and Zisserman 2015, configuration D) on 224 x 224, weights not written; `scale` of its width."""
    layers: list[nn.Module] = []
    c = 3
    for width in WIDTHS:
        if width:
            d = max(8, int(width * scale))
            layers += [nn.Conv2d(c, d, 3, padding=1), nn.ReLU(inplace=True)]
            c = d
        else:
            layers.append(nn.MaxPool2d(2))
    hidden = max(16, int(4096 * scale))
    layers += [nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(49 * c, hidden), nn.ReLU(inplace=True), nn.Dropout()]
    layers += [nn.Linear(hidden, hidden), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(hidden, 1000)]
    return nn.Sequential(*layers)


@torch.no_grad()
def fill(net: nn.Module, spectrum: float) -> None:
    """Seeded weights of He's scale; with `spectrum` > 0 their singular values decay."""
    random = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.weight
            weight.normal_(generator=random)
            if spectrum > 0:
                _decay(weight.flatten(1), spectrum, random)
            weight *= math.sqrt(2 / weight[0].numel()) / weight.std()
            if module.bias is not None:
                module.bias.zero_()


def _decay(flat: Tensor, spectrum: float, random: torch.Generator) -> None:
    """Scale random orthogonal directions of the outputs by i^-spectrum, in place."""
    n = flat.shape[0]
    turn, _ = torch.linalg.qr(torch.randn(n, n, generator=random))
    flat.copy_(turn @ (torch.arange(1, n + 1).float().pow(-spectrum)[:, None] * flat))


def images(samples: int, side: int) -> Tensor:
    """Smooth noise: random 14 x 14 images enlarged, plus a little white noise."""
    random = torch.Generator().manual_seed(1)
    coarse = torch.randn(samples, 3, 14, 14, generator=random)
    smooth = nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    return smooth + 0.1 * torch.randn(samples, 3, side, side, generator=random)


def peak() -> int:
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Clock:
    """Seconds and memory peak after each part."""

    def __init__(self) -> None:
        """Start now."""
        self.parts: dict[str, dict[str, float]] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Close the part that ran since the last call."""
        now = time.perf_counter()
        self.parts[name] = {"seconds": round(now - self.last, 2), "peak_mb": round(peak() / 1e6)}
        print(f"{name:8s} {now - self.last:8.2f} s   peak so far {peak() / 1e6:8.0f} MB", file=sys.stderr, flush=True)
        self.last = time.perf_counter()


def child(args: argparse.Namespace) -> dict[str, Any]:
    """All verbs once; what they took."""
    images(1, 32)
    baseline = peak()
    net = vgg16(args.scale)
    fill(net, args.spectrum)
    net.eval()
    batches = list(images(args.samples, args.side).split(args.batch))
    made = peak()
    clock = Clock()
    network = taut.trace(net, batches[0][:1])
    clock.lap("trace")
    stats = taut.observe(network, net, batches)
    clock.lap("observe")
    plan = taut.plan(network, stats, budget=taut.Budget(macs=args.macs, params=args.params))
    clock.lap("plan")
    small = taut.apply(net, plan, stats, data=batches)
    clock.lap("apply")
    return {
        "parts": clock.parts,
        "baseline": baseline,
        "made": made,
        "peak": peak(),
        "model": sum(p.numel() * p.element_size() for p in net.parameters()),
        "params": [network.cost.params, sum(p.numel() for p in small.parameters())],
        "macs": [network.cost.macs, taut.trace(small, batches[0][:1]).cost.macs],
        "steps": [f"{step.layers[0]}: {step.method}" for step in plan.steps],
        **_work(network, args.samples),
    }


def _work(network: taut.Network, samples: int) -> dict[str, int]:
    """The largest weight in float64, and the calibration inputs and outputs of the layer with the largest ones."""
    weights = [8 * math.prod(layer.weight) for layer in network.layers if len(layer.weight) > 1]
    sizes = [
        4 * (math.prod(call.input) + math.prod(call.output)) // layer.batch
        for layer in network.layers
        for call in layer.calls
    ]
    return {"weight_float64": max(weights), "activations": max(sizes) * samples}


def report(found: dict[str, Any]) -> list[Bound]:
    """Print the table; the bounds."""
    mb = 1e-6
    total = sum(part["seconds"] for part in found["parts"].values())
    grown = found["peak"] - found["baseline"]
    allowed = 2 * found["model"] + found["weight_float64"] + found["activations"]
    for name, part in found["parts"].items():
        print(f"{name:10s} {part['seconds']:8.2f} s   peak so far {part['peak_mb']:8.0f} MB")
    print(f"{'total':10s} {total:8.2f} s")
    print(
        f"parameters {found['params'][0]:,} -> {found['params'][1]:,}; "
        f"MACs {found['macs'][0]:,} -> {found['macs'][1]:,}"
    )
    for label, key in (
        ("interpreter, torch and taut", "baseline"),
        ("with model and images", "made"),
        ("peak", "peak"),
        ("model", "model"),
        ("largest weight in float64", "weight_float64"),
        ("largest layer's calibration activations", "activations"),
    ):
        print(f"{label:40s} {found[key] * mb:8.0f} MB")
    print(f"{'peak - baseline':40s} {grown * mb:8.0f} MB, allowed {allowed * mb:.0f} MB")
    return [
        Bound("seconds of trace + observe + plan + apply", SECONDS, total, at_most=True),
        Bound("(peak - baseline) / (2 x model + largest layer's work)", 1.0, grown / allowed, at_most=True),
    ]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--samples", type=int, default=32, help="calibration images")
    parser.add_argument("--batch", type=int, default=8, help="images a batch")
    parser.add_argument("--macs", type=float, default=0.25, help="fraction of the MACs kept")
    parser.add_argument("--params", type=float, default=0.25, help="fraction of the parameters kept")
    parser.add_argument("--spectrum", type=float, default=0.5, help="decay of the singular values; 0: white weights")
    parser.add_argument("--scale", type=float, default=1.0, help="of the widths; below 1 no bound is tested")
    parser.add_argument("--side", type=int, default=224, help="of the images")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure in a child process, print, write results/vgg16.json."""
    args = arguments()
    if args.child:
        print(json.dumps(child(args)))
        return
    load = load_average()
    run = [sys.executable, __file__, "--child", *sys.argv[1:]]
    done = subprocess.run(run, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"the measurement failed with exit code {done.returncode}")
    found = json.loads(done.stdout)
    settings = {key: value for key, value in vars(args).items() if key != "child"}
    bounds = report(found)
    full = args.scale == 1.0 and args.side == 224
    name = "vgg16.json" if full else "vgg16-reduced.json"
    settings |= {"weights": "random, seed 0", "load_average_before": load}
    finish(Path(__file__).parent / "results" / name, settings, found, bounds if full else ())


if __name__ == "__main__":
    main()

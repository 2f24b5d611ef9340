"""Wide layers: predicted against true lost energy, and what `observe` takes in memory.

.venv/bin/python benchmarks/wide.py [--quick]

A linear layer of 2,304 to 8,192 inputs and as many outputs (torch's own start, seeded), and a 3 x 3 convolution of 340
channels (3,060 unfolded inputs), see seeded rows of a known spectrum: all directions alike, or energies that fall like
1/i, turned by reflections; the convolution sees rectified maps of fewer sources. For some ranks it says

    predicted   the share of the output's energy that the plan expects to lose, from the rows that it saw;
    true        what the built layers lose on fresh rows, without refit;
    best        what the best layers of that rank would lose, from the true second moment.

At 32 rows per input, and at 16,384 rows (7 to 2 per input). Memory is the peak resident size of a child process over
what it was after `trace`: heads of 16,000 and 50,000 words, tokens (batch, time). Random data: nothing about accuracy.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ending import finish
from torch import Tensor, nn

import taut
from taut.decompose.weighting import Weighting
from taut.methods import METHODS
from taut.structure.patches import input_rows, positions
from taut.studies import Bound, load_average

LINEAR = (2304, 2816, 4096, 8192)
CHANNELS, SOURCES, SIDE = 340, 48, 14
LENGTH = 256
"""Rows of one sample of a linear layer."""

MANY, FEW = 32, 16_384
"""Rows per input; rows."""

PREDICTED = {"many": 0.10, "few": 0.15}
"""Largest relative difference of predicted and true."""

EXCESS = 0.03
"""Largest share by which the true loss exceeds the best at 32 rows per input."""

HEADS = {16_000: 400.0, 50_000: 1000.0}
"""Words, and the MB that `observe` may take over what there was."""

SHARES = (0.15, 0.3, 0.4)
"""Ranks, as shares of the largest."""


class Rows(nn.Module):
    """Samples (b, LENGTH, k) for their numbers: seeded, so that 9 GB of them need not be held."""

    def __init__(self, k: int, spectrum: str) -> None:
        """`spectrum`: "alike" or "1/i"."""
        super().__init__()
        random = torch.Generator().manual_seed(k)
        energies = torch.ones(k) if spectrum == "alike" else 1 / torch.arange(1, k + 1)
        self.scale = (energies / energies.mean()).sqrt()
        mirrors = torch.randn(8, k, generator=random)
        self.mirrors = mirrors / mirrors.norm(dim=1, keepdim=True)

    def turned(self, x: Tensor) -> Tensor:
        """Reflections, one after the other."""
        for v in self.mirrors:
            x = x - 2 * (x @ v)[..., None] * v
        return x

    def forward(self, numbers: Tensor) -> Tensor:
        """(b,) integers."""
        drawn = [torch.randn(LENGTH, len(self.scale), generator=torch.Generator().manual_seed(int(n))) for n in numbers]
        return self.turned(torch.stack(drawn) * self.scale)


class Wide(nn.Module):
    """Rows, and the layer that sees them."""

    def __init__(self, k: int, spectrum: str) -> None:
        """See `Rows`."""
        super().__init__()
        torch.manual_seed(0)
        self.rows, self.layer = Rows(k, spectrum), nn.Linear(k, k, bias=False)

    def forward(self, numbers: Tensor) -> Tensor:
        """Outputs of the layer."""
        out: Tensor = self.layer(self.rows(numbers))
        return out


class Maps(nn.Module):
    """Rectified maps of a few sources, and the convolution that sees them."""

    def __init__(self) -> None:
        """Seeded weights."""
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Conv2d(SOURCES, CHANNELS, 3, padding=1)
        self.layer = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)

    def seen(self, numbers: Tensor) -> Tensor:
        """(b, CHANNELS, SIDE, SIDE) for their numbers."""
        drawn = [
            torch.randn(SOURCES + CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(int(n)))
            for n in numbers
        ]
        sources, noise = torch.stack(drawn).split((SOURCES, CHANNELS), 1)
        return (3 * nn.functional.conv2d(sources, self.mix.weight, padding=1) + 0.3 * noise).relu()

    def forward(self, numbers: Tensor) -> Tensor:
        """Outputs of the layer."""
        out: Tensor = self.layer(self.seen(numbers))
        return out


def observed(model: nn.Module, samples: int) -> tuple[taut.Network, taut.Statistics, dict[str, float]]:
    """Trace and observe with that many samples; seconds and processor seconds."""
    for part in model.modules():
        if part is not getattr(model, "layer", None) and isinstance(part, nn.Conv2d):
            part.requires_grad_(False)
    batches = list(torch.arange(samples).split(16))
    network = taut.trace(model, batches[0][:1])
    start, work = time.perf_counter(), time.process_time()
    stats = taut.observe(network, model, batches)
    took = {"seconds": time.perf_counter() - start, "processor_seconds": time.process_time() - work}
    return network, stats, took


def losses(model: Any, inputs: Callable[[Tensor], Tensor], built: nn.Module, samples: int) -> float:
    """Share of the output's energy that the built layers lose on fresh samples."""
    lost = whole = 0.0
    for numbers in torch.arange(1_000_000, 1_000_000 + samples).split(8):
        x = inputs(numbers)
        y = model.layer(x)
        lost += float((built(x) - y).square().sum(dtype=torch.float64))
        whole += float(y.square().sum(dtype=torch.float64))
    return lost / whole


def row(case: dict[str, Any], predicted: float, true: float, best: float) -> dict[str, Any]:
    """One line, printed."""
    found = {**case, "predicted": predicted, "true": true, "best": best}
    print(
        "  ".join(f"{value}" for value in case.values())
        + f"   predicted {predicted:.4f} true {true:.4f} best {best:.4f}"
        + f"   predicted / true {predicted / true:.3f} true / best {true / best:.3f}",
        flush=True,
    )
    return found


@torch.no_grad()
def linear(k: int, spectrum: str, rows: str) -> dict[str, Any]:
    """One layer, spectrum and number of rows; all ranks."""
    model = Wide(k, spectrum).eval()
    count = MANY * k if rows == "many" else FEW
    network, stats, took = observed(model, count // LENGTH)
    W = model.layer.weight.detach()
    half = model.rows.turned(W) * model.rows.scale  # a product of reflections, transposed, in the opposite order
    for v in model.rows.mirrors.flip(0):
        W = W - 2 * (W @ v)[:, None] * v
    half = W * model.rows.scale
    values = torch.linalg.eigvalsh(half @ half.T).flip(0).double().clamp_min(0)
    group, weighting = network.group(["layer"]), stats.layers["layer"].weighting
    energy = weighting.energy(model.layer.weight[None, :, :, None])
    found = []
    for share in SHARES:
        method = METHODS["svd"](rank=round(share * k))
        factors = stats.factors(group, method)
        built = method.rewrite(stats.modules, factors).modules["layer"]
        predicted = float(factors.basis.lost(None)[method.rank]) / energy
        true = losses(model, model.rows, built, 32)
        best = float(values[method.rank :].sum() / values.sum())
        case = {"layer": f"linear {k}", "spectrum": spectrum, "rows": count, "method": f"svd {method.rank}"}
        found.append(row(case, predicted, true, best))
    return {"kind": rows, "took": took, "rows": found}


@torch.no_grad()
def convolution(rows: str) -> dict[str, Any]:
    """The convolution; methods and ranks."""
    model = Maps().eval()
    columns = 9 * CHANNELS
    count = MANY * columns if rows == "many" else FEW
    network, stats, took = observed(model, -(-count // SIDE**2))
    known = stats.layers["layer"]
    A = torch.zeros(columns, columns)
    fresh = torch.arange(2_000_000, 2_000_000 + 64 * columns // SIDE**2)
    for numbers in fresh.split(32):
        x = model.seen(numbers)
        y = model.layer(x)
        unfolded = input_rows(model.layer, x, y, torch.arange(positions(model.layer, y)))[0]
        A += unfolded.T @ unfolded / len(fresh)
    truth = taut.structure.statistics.LayerStatistics(Weighting(full=A[None]), positions=SIDE**2)
    energy = known.weighting.energy(model.layer.weight.flatten(2)[None])
    group, found = network.group(["layer"]), []
    settings: list[tuple[str, dict[str, int]]] = [
        *(("svd", {"rank": round(s * CHANNELS)}) for s in SHARES),
        *(("spatial", {"rank": round(s * 3 * CHANNELS)}) for s in SHARES),
        *(("tucker", {"rank_in": round(s * CHANNELS), "rank_out": round(s * CHANNELS)}) for s in SHARES),
    ]
    blind = taut.structure.statistics.LayerStatistics(known.weighting, positions=SIDE**2)
    for name, ranks in settings:
        method: Any = METHODS[name](**ranks)
        factors = method.factor(stats.modules, {"layer": blind})
        built = method.rewrite(stats.modules, factors).modules["layer"]
        best = method.rewrite(stats.modules, method.factor(stats.modules, {"layer": truth})).modules["layer"]
        case = {"layer": f"convolution {CHANNELS}", "spectrum": "maps", "rows": count}
        case |= {"method": f"{name} {'/'.join(map(str, ranks.values()))}"}
        pair = (losses(model, model.seen, part, 200) for part in (built, best))
        found.append(row(case, float(method.damage(factors)), *pair))
    del energy, group
    return {"kind": rows, "took": took, "rows": found}


def head(words: int) -> dict[str, float]:
    """MB over what there was after `trace`, in this process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(words, 32), nn.Linear(32, words)).eval()
    batches = list(torch.randint(0, words, (64, 64)).split(64))
    network = taut.trace(model, batches[0][:1])
    before = _peak()
    start = time.perf_counter()
    taut.observe(network, model, batches)
    return {"words": words, "before_mb": before, "over_mb": _peak() - before, "seconds": time.perf_counter() - start}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def alone(words: int) -> dict[str, Any]:
    """`head` in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--head", str(words)], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    print(f"head of {words} words: {found['over_mb']:.0f} MB over {found['before_mb']:.0f}", flush=True)
    return found


def bounds(cases: list[dict[str, Any]], heads: list[dict[str, Any]]) -> list[Bound]:
    """What is promised."""
    found = []
    for kind, limit in PREDICTED.items():
        rows = [r for case in cases if case["kind"] == kind for r in case["rows"]]
        worst = max(abs(r["predicted"] / r["true"] - 1) for r in rows)
        label = "32 rows per input" if kind == "many" else f"{FEW} rows"
        found.append(Bound(f"{label}: predicted against true", limit, worst, at_most=True))
        if kind == "many":
            excess = max(r["true"] / r["best"] - 1 for r in rows)
            found.append(Bound(f"{label}: true loss over the best", EXCESS, excess, at_most=True))
    for one in heads:
        limit = HEADS[one["words"]]
        found.append(Bound(f"head of {one['words']} words: MB of observe", limit, one["over_mb"], at_most=True))
    return found


def main() -> None:
    """Run all, write results/wide.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two widths, 16,384 rows alone")
    parser.add_argument("--head", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.head:
        print(json.dumps(head(args.head)))
        return
    load = load_average()
    heads = [alone(words) for words in HEADS]
    kinds = ("few",) if args.quick else ("few", "many")
    cases = [convolution(kind) for kind in kinds]
    for k in LINEAR[:2] if args.quick else LINEAR:
        cases += [linear(k, spectrum, kind) for spectrum in ("alike", "1/i") for kind in kinds]
    settings = {"shares": SHARES, "rows": [MANY, FEW], "length": LENGTH, "load_average_before": load}
    name = "wide-quick.json" if args.quick else "wide.json"
    tested = [] if args.quick else bounds(cases, heads)
    finish(Path(__file__).parent / "results" / name, settings, {"cases": cases, "heads": heads}, tested)


if __name__ == "__main__":
    main()

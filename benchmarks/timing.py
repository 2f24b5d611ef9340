"""A network timed against itself with a busy process beside it: how far the ratio is from 1, and what is said about it.

.venv/bin/python benchmarks/timing.py [--repeats 60] [--busy 1] [--nets mlp ...]

Both sides are the same network, so every ratio but 1 is an error and every word on speed is wrong. Beside what taut
measures stand the medians of fifteen rounds in turns, which most stopwatches give. Runs on Linux.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from ending import finish
from torch import nn

from taut.core.example import Example
from taut.measure import latencies
from taut.studies import Bound, load_average

ROOT = Path(__file__).parent.parent
WITHIN = 1.1
"""The factor by which no ratio may differ from 1."""
RESTLESS = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    sum(range(10**6))"
"""It ends with the process that started it."""
SPARE = 0.1
"""Cores that the system itself may take."""
TRIES = 4
"""Times as many repeats at most, where others use the machine, too."""
SENTENCES = 2
"""Of sixty intervals of 99 %, so many may miss 1 (with a probability of 2 % more do)."""


def mlp() -> nn.Sequential:
    """About 20 us: mostly calls."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def convnet(width: int) -> nn.Sequential:
    """Three convolutions of 32 x 32 images."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 10),
    )


NETS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, bool]] = {
    "mlp": (mlp, torch.randn(1, 64), False),
    "convnet": (lambda: convnet(32), torch.randn(1, 3, 32, 32), False),
    "convnet beside a copy of it": (lambda: convnet(32), torch.randn(1, 3, 32, 32), True),
    "wide convnet": (lambda: convnet(64), torch.randn(1, 3, 32, 32), False),
}
"""Name -> net, input, and whether the second one is a copy with weights elsewhere in memory."""


@contextmanager
def busy(number: int) -> Iterator[None]:
    """So many processes that never rest."""
    others = [subprocess.Popen([sys.executable, "-c", RESTLESS]) for _ in range(number)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def median_ratio(net: nn.Module, x: torch.Tensor, rounds: int = 15) -> float:
    """The ratio of medians of rounds in which the sides alternate."""
    sides: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for _ in range(3):
            net(x)
        for _, side in itertools.product(range(rounds), sides):
            start = time.perf_counter()
            net(x)
            side.append(time.perf_counter() - start)
    return statistics.median(sides[0]) / statistics.median(sides[1])


@contextmanager
def cores_of_others(row: dict[str, Any]) -> Iterator[None]:
    """Note how many cores all other processes kept busy meanwhile, the one beside included."""

    def counters() -> tuple[float, float, float]:
        ticks = [int(number) for number in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        idle = ticks[3] + ticks[4]
        return time.perf_counter(), (sum(ticks[:8]) - idle) / os.sysconf("SC_CLK_TCK"), time.process_time()

    start = counters()
    yield
    wall, used, own = (now - before for now, before in zip(counters(), start, strict=True))
    row |= {"seconds": wall, "cores_of_others": (used - own) / wall}


def measured(name: str, repeats: int, others: int) -> dict[str, Any]:
    """One net against itself, until it was done often enough with no more processes beside it than there should be."""
    build, x, copied = NETS[name]
    net = build().eval()
    rows: list[dict[str, Any]] = []
    while len(rows) < TRIES * repeats and sum(not row["crowded"] for row in rows) < repeats:
        row: dict[str, Any] = {}
        with cores_of_others(row):
            pair = latencies(net, copy.deepcopy(net) if copied else net, Example(net, x), quick=True).runtimes["eager"]
        row |= {**asdict(pair), "ratio": pair.ratio, "busy": pair.busy, "verdict": pair.verdict}
        row |= {"crowded": row["cores_of_others"] > others + SPARE, "medians_of_15": median_ratio(net, x)}
        rows.append(row)
    quiet, crowded = ([row for row in rows if row["crowded"] == side] for side in (False, True))
    found = {"as_asked": summary(quiet), "more_beside": summary(crowded), "rows": rows}
    print(name, found["as_asked"], found["more_beside"], sep="\n  ", flush=True)
    return found


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How far the ratios are from 1, and the medians' beside them."""
    if not rows:
        return {"repeats": 0}
    ratios, medians = ([row[key] for row in rows] for key in ("ratio", "medians_of_15"))
    return {
        "repeats": len(rows),
        "ratios": (min(ratios), max(ratios)),
        "outside": sum(not 1 / WITHIN <= ratio <= WITHIN for ratio in ratios),
        "words_on_speed": sum(row["verdict"] is not None for row in rows),
        "called_busy": sum(row["busy"] for row in rows),
        "interval_width_median": statistics.median(row["high"] / row["low"] - 1 for row in rows),
        "seconds_median": statistics.median(row["seconds"] for row in rows),
        "cores_of_others_median": statistics.median(row["cores_of_others"] for row in rows),
        "medians_of_15": (min(medians), max(medians)),
        "medians_of_15_outside": sum(not 1 / WITHIN <= ratio <= WITHIN for ratio in medians),
    }


def main() -> None:
    """All nets; write results/timing.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--busy", type=int, default=1, help="processes beside it that never rest")
    args = parser.parse_args()
    os.environ["TAUT_RUNTIMES"] = "eager"
    torch.manual_seed(0)
    load = load_average()
    with busy(args.busy):
        results = {name: measured(name, args.repeats, args.busy) for name in args.nets}
    bounds = []
    for name, found in results.items():
        asked = found["as_asked"]
        bounds += [
            Bound(f"{name}: repeats with no more beside it", args.repeats, asked["repeats"]),
            Bound(f"{name}: ratios outside 10 %", 0, asked.get("outside", 0), at_most=True),
            Bound(f"{name}: words on speed", SENTENCES, asked.get("words_on_speed", 0), at_most=True),
        ]
    settings = {
        "repeats": args.repeats,
        "busy_processes": args.busy,
        "load_average_before": load,
        "machine": "repeats with more than the busy process beside them are counted apart",
    }
    finish(ROOT / "benchmarks" / "results" / "timing.json", settings, results, bounds)


if __name__ == "__main__":
    main()

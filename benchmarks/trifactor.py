"""Joint tri-factorization of whole nets beside scikit-fusion, and of a VGG16-size net, in one run.

.venv/bin/python benchmarks/trifactor.py [--data FOLDER]     (run it alone on the machine)

scikit-fusion 0.2.1 is no dependency: put it on PYTHONPATH (pip install --no-deps --target SITE scikit-fusion==0.2.1;
joblib and threadpoolctl come with scikit-learn). It dates from 2016 and is mended when it is imported, for today's
Python and numpy; none of its arithmetic changes. Without it only the VGG16-size net is measured.

Nets 784-625-625-10 and 784-625x5-10 without biases, trained for two epochs on the MNIST IDX files in FOLDER, otherwise
with He's random weights. Errors are those of the whole net, sqrt(sum |W - H|^2 / sum |W|^2), weights as they are. Both
sides run in turns in one process: `signed` in the nets' float32 and in float64, scikit-fusion in float64 (it has no
other), with one thread each and with two each; "times faster" is the smaller ratio. OpenBLAS, which numpy and scipy
bring once each, can be slower with two threads than with one, and far slower on a busy machine. With two threads
ten iterations of the multiplicative updates are timed and scaled to a hundred. Paper mode starts from the factors that
scikit-fusion drew; its time for drawing them is left out. The VGG16-size net has its shapes and random weights; a
convolution is nine relations between its channels, the first dense layer 49. It runs with two threads in a process of
its own, which notes its peak of resident memory.
"""

from __future__ import annotations

import argparse
import collections
import collections.abc
import importlib
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from ending import finish
from torch import Tensor, nn

from taut.decompose.dfmf import dfmf
from taut.decompose.trifactor import Relation, Trifactors, shared_size, signed
from taut.studies import Bound, load_average

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments" / "nets"))

NETS = {"2 hidden": (784, 625, 625, 10), "5 hidden": (784, 625, 625, 625, 625, 625, 10)}
FASTER = {50: 8.0, 100: 12.0, 200: 12.0}
"""Rank, and how many times faster `signed` has to be."""
REPEATS = {50: 5, 100: 3, 200: 3}
ITERATIONS, FEW, THREADS = 100, 10, 2
PEER = "scikit-fusion"
SECONDS = 180.0
WIDTHS = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Result and seconds."""
    start = time.perf_counter()
    return work(), time.perf_counter() - start


class Peer:
    """scikit-fusion's Dfmf, mended at run time: what numpy and Python have dropped since, and one comparison."""

    def __init__(self) -> None:
        """Import it.

        Raises:
            ImportError: it, or what limits its threads, is not there.
        """
        self.limit = importlib.import_module("threadpoolctl").threadpool_limits
        collections.Iterable = collections.abc.Iterable
        vars(np)["float"] = float
        self.fusion = importlib.import_module("skfusion.fusion")
        self.inner = importlib.import_module("skfusion.fusion.decomposition._dfmf")
        self.draw = self.inner.initialize
        self.inner.initialize, self.inner._par_bdot = self._begin, self._products
        self.given: dict[Any, Any] | None = None
        self.start: dict[str, Tensor] = {}
        self.drawing = 0.0

    def _products(self, A: Any, B: Any, types: Any, *_: Any) -> dict[Any, Any]:
        """Its block products in turn; the emptiness it tests by comparing with [] numpy refuses today."""
        block = vars(self.inner)["__bdot"]
        found = (block(A, B, i, j, types) for i in types for j in types)
        return {(i, j): entry for i, j, entry in found if len(entry)}

    def _begin(self, *drawn: Any) -> dict[Any, Any]:
        """The factors given, or its own, which are noted."""
        if self.given is not None:
            return dict(self.given)
        bases, self.drawing = timed(lambda: self.draw(*drawn))
        self.start = {str(name): torch.from_numpy(G.copy()) for (name, _), G in bases.items()}
        return dict(bases)

    def __call__(self, weights: list[Tensor], ranks: dict[str, int], iterations: int, *, again: bool = False) -> Any:
        """Factorize a chain; `again` from the factors noted last. Bases by type, the net composed, seconds."""
        types = {name: self.fusion.ObjectType(name, rank) for name, rank in ranks.items()}
        relations = [
            self.fusion.Relation(W.double().numpy(), types[str(i)], types[str(i + 1)], name=f"relation {i}")
            for i, W in enumerate(weights)
        ]
        self.given = {(types[name], types[name]): G.numpy().copy() for name, G in self.start.items()} if again else None
        solver = self.fusion.Dfmf(max_iter=iterations, random_state=0)
        with self.limit(torch.get_num_threads(), user_api="blas"):
            _, seconds = timed(lambda: solver.fuse(self.fusion.FusionGraph(relations)))
        bases = {name: torch.from_numpy(solver.factor(each)) for name, each in types.items()}
        return bases, [torch.from_numpy(solver.complete(r)) for r in relations], seconds


def weights_of(sizes: tuple[int, ...], folder: Path | None) -> list[Tensor]:
    """A net's matrices (inputs, outputs): He's scale, trained for two epochs if there is a folder."""
    torch.manual_seed(0)
    layers = [nn.Linear(a, b, bias=False) for a, b in pairwise(sizes)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.in_features))
    if folder:
        train(nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1]), folder)
    return [layer.weight.detach().T.contiguous() for layer in layers]


def train(net: nn.Sequential, folder: Path) -> None:
    """Two epochs of Adam on the training images, in batches of 128."""
    load = importlib.import_module("data").load
    (x, y), (test, truth) = (load("mnist", split, folder) for split in ("train", "test"))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(2):
        for batch in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[batch].flatten(1)), y[batch]).backward()
            optimizer.step()
    accuracy = (net(test.flatten(1)).argmax(1) == truth).double().mean()
    print(f"trained: {accuracy:.4f} of the test images", file=sys.stderr, flush=True)


def whole_error(weights: list[Tensor], found: list[Tensor]) -> float:
    """sqrt(sum |W - H|^2 / sum |W|^2)."""
    left = sum(float((W.double() - H.double()).square().sum()) for W, H in zip(weights, found, strict=True))
    return math.sqrt(left / sum(float(W.double().square().sum()) for W in weights))


def graph(weights: list[Tensor], dtype: torch.dtype) -> list[Relation]:
    """The chain."""
    return [Relation.of(str(i), str(i + 1), W.to(dtype)) for i, W in enumerate(weights)]


def composed(found: Trifactors) -> list[Tensor]:
    """The net put together again."""
    return [found.compose(place)[0] for place in range(len(found.cores))]


def compare(peer: Peer, weights: list[Tensor], k: int) -> dict[str, Any]:
    """Errors of both sides at one rank, and their median seconds by the number of threads."""
    sizes = [len(weights[0]), *(W.shape[1] for W in weights)]
    ranks = {str(i): min(k, size) for i, size in enumerate(sizes)}
    narrow, wide = graph(weights, torch.float32), graph(weights, torch.float64)
    ways: dict[str, Callable[[], Trifactors]] = {
        "signed": lambda: signed(narrow, ranks),
        "signed, not normalized": lambda: signed(narrow, ranks, normalize=False),
        "signed, float64": lambda: signed(wide, ranks),
    }
    seconds: dict[str, dict[int, list[float]]] = {name: {1: [], 2: []} for name in (PEER, "drawing", "paper", *ways)}
    rows: dict[str, dict[str, Any]] = {}
    for turn in range(REPEATS[k]):
        torch.set_num_threads(1)
        _, net, took = peer(weights, ranks, ITERATIONS)
        seconds[PEER][1].append(took)
        seconds["drawing"][1].append(peer.drawing)
        found, took = timed(lambda: dfmf(wide, ranks, iterations=ITERATIONS, start=peer.start))
        seconds["paper"][1].append(took)
        rows |= {PEER: {"error": whole_error(weights, net)}, "paper": {"error": whole_error(weights, composed(found))}}
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for name, way in ways.items():
                found, took = timed(way)
                seconds[name][threads].append(took)
                rows[name] = {"error": whole_error(weights, composed(found)), "sweeps": len(found.errors)}
        if turn == 0:  # still with two threads
            theirs, _, took = peer(weights, ranks, FEW, again=True)
            seconds[PEER][2].append(took * ITERATIONS / FEW + peer.drawing)
            found, took = timed(lambda: dfmf(wide, ranks, iterations=FEW, start=peer.start))
            seconds["paper"][2].append(took * ITERATIONS / FEW)
            apart = max(float((found.bases[name] - G).norm() / G.norm()) for name, G in theirs.items())
    rows["paper"]["difference"] = apart
    middle = {name: {threads: median(each) for threads, each in by.items() if each} for name, by in seconds.items()}
    drawing = middle.pop("drawing")[1]
    for name, by in middle.items():
        row, spared = rows[name], drawing if name == "paper" else 0.0
        ratios = {threads: (middle[PEER][threads] - spared) / by[threads] for threads in (1, 2)}
        row |= {"seconds": by, "ratios": ratios, "times faster": min(ratios.values())}
        print(f"{k:4d} {name:24s} {row}", file=sys.stderr, flush=True)
    return rows


def nets(folder: Path | None) -> dict[str, Any]:
    """Both nets at every rank; without scikit-fusion nothing."""
    try:
        peer = Peer()
    except ImportError as error:
        print(f"scikit-fusion cannot be imported ({error}): only the VGG16-size net is measured", file=sys.stderr)
        return {}
    found = {}
    for name, sizes in NETS.items():
        weights = weights_of(sizes, folder)
        found[name] = {str(k): compare(peer, weights, k) for k in FASTER}
    return found


def vgg16() -> list[Relation]:
    """The 16 layers of VGG16 as one graph, types named by place: channels, then the dense layers' neurons."""
    random = torch.Generator().manual_seed(0)

    def relation(place: int, *shape: int) -> Relation:
        return Relation(str(place), str(place + 1), torch.randn(*shape, generator=random))

    found = [relation(i, 9, c, d) for i, (c, d) in enumerate(pairwise(WIDTHS))]
    found.append(relation(len(found), 49, WIDTHS[-1], 4096))
    found.append(relation(len(found), 1, 4096, 4096))
    found.append(relation(len(found), 1, 4096, 1000))
    return found


def peak() -> int:
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def large() -> dict[str, Any]:
    """Seconds and memory of the VGG16-size net."""
    baseline = peak()
    relations = vgg16()
    sizes = {r.rows: r.matrices.shape[1] for r in relations} | {r.columns: r.matrices.shape[2] for r in relations}
    ranks = {name: min(size, 256, max(3, size // 4)) for name, size in sizes.items()}
    made = peak()
    found, seconds = timed(lambda: signed(relations, ranks))
    parameters = sum(r.matrices.numel() for r in relations)
    print(f"VGG16-size: {seconds:.1f} s, {len(found.errors)} sweeps, {peak() / 1e6:.0f} MB", file=sys.stderr)
    return {
        "weights": parameters,
        "sizes": list(sizes.values()),
        "ranks": list(ranks.values()),
        "kept": shared_size(relations, ranks) / parameters,
        "seconds": seconds,
        "sweeps": len(found.errors),
        "error of the normalized graph": found.errors[-1],
        "baseline_mb": round(baseline / 1e6),
        "made_mb": round(made / 1e6),
        "peak_mb": round(peak() / 1e6),
        "peak less baseline, in models": (peak() - baseline) / (4 * parameters),
    }


def bounds_of(found: dict[str, Any]) -> list[Bound]:
    """What is promised."""
    bounds = []
    for net, by_rank in found["nets"].items():
        for k, rows in by_rank.items():
            label, theirs = f"{net}, rank {k}", rows[PEER]["error"]
            for way in ("signed", "signed, not normalized", "signed, float64"):
                bounds.append(
                    Bound(f"{label}: error of scikit-fusion ({way})", theirs, rows[way]["error"], at_most=True)
                )
                bounds.append(Bound(f"{label}: times faster ({way})", FASTER[int(k)], rows[way]["times faster"]))
            bounds.append(
                Bound(f"{label}: paper mode, difference", 1e-8, rows["paper"]["difference"], at_most=True),
            )
            bounds.append(Bound(f"{label}: paper mode, times faster", 1.6, rows["paper"]["times faster"]))
    return [*bounds, Bound("VGG16-size net, seconds", SECONDS, found["VGG16-size"]["seconds"], at_most=True)]


def child(part: str, data: Path | None) -> Any:
    """One part in a process of its own, whose threads sleep while they wait and whose order of types is fixed."""
    threads = {name: str(THREADS) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    run = [sys.executable, __file__, "--part", part, *(["--data", str(data)] if data else [])]
    waiting = {"OMP_WAIT_POLICY": "passive", "OPENBLAS_THREAD_TIMEOUT": "4"}
    environment = {**os.environ, **threads, **waiting, "PYTHONHASHSEED": "0"}
    done = subprocess.run(run, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"the measurement failed with exit code {done.returncode}")
    return json.loads(done.stdout)


def main() -> None:
    """Measure in child processes, print, write benchmarks/results/trifactor.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of the MNIST IDX files to train the nets on")
    parser.add_argument("--part", choices=("nets", "large"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        torch.set_num_threads(THREADS)
        print(json.dumps(large() if args.part == "large" else nets(args.data)))
        return
    load = load_average()
    found = {"nets": child("nets", args.data), "VGG16-size": child("large", None)}
    torch.set_num_threads(THREADS)
    settings: dict[str, Any] = {
        "weights": "trained on MNIST, two epochs" if args.data else "He's, random",
        "scikit-fusion": "0.2.1, float64, random_c" if found["nets"] else "not importable",
        "iterations": ITERATIONS,
        "repeats": {str(k): n for k, n in REPEATS.items()},
        "load_average_before": load,
    }
    finish(Path(__file__).parent / "results" / "trifactor.json", settings, found, bounds_of(found))


if __name__ == "__main__":
    main()

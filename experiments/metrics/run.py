"""`taut reproduce metrics`: what counts as damage, what recovery brings, and how the strongest peer does.

Untrained: six ways to plan (plans.py), bare and refitted, calibration seeds, MACs /2 /4 /8, on the two trained
Fashion-MNIST nets. Fine-tuned: our default, uniform ranks, the uncompressed net as control, and Torch-Pruning by L2
and Taylor importance, all with the same images, loop and optimizer (Adam 1e-3, half a cosine; the best validation
weights), for 36,000 images and for 5 full epochs. Test images are looked at once per finished net; nothing is chosen
on them.

One seed trains. "before" is after our recovery for our nets and as it comes for the peer's, which has none. In the
fine-tuned part "uniform" cuts the classifier too, and stays far behind; "spared" is the fairer of the two.

--paper changes nothing here: this study has no source with a protocol of its own.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import taut
from taut.artifact.manifest import taut_version
from taut.studies import Bound, Cell, run_grid, write_results
from taut.studies.grid import cells

NEEDS = ("accelerate", "matplotlib")
"""Packages beside taut's own, looked for before the first step."""

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "nets")]

from data import load, split_train  # noqa: E402 - found through the line above: experiments are scripts, no package
from fashion import trained  # noqa: E402
from plans import WAYS, Planner  # noqa: E402
from running import BATCH, Shuffled, accuracy  # noqa: E402
from tables import draw, markdown  # noqa: E402

POINTS = {"vgg": 8, "resnet": 4}
"""Net -> how many times fewer MACs the fine-tuned nets have."""

TUNED = ("default", "uniform", "spared", "control", "torch-pruning l2", "torch-pruning taylor")
CALIBRATION = 2048
LENGTHS = {"36,000 images": (12_000, 3), "5 epochs": (55_000, 5)}
"""Name -> images of an epoch, epochs."""

QUICK = {"6,000 images": (2000, 3)}
QUICK_WAYS = ("spared", "frobenius", "default")


class Study:
    """The data, and one function per kind of run."""

    def __init__(self, data: Path | None, quick: bool) -> None:
        """Read the images; a validation part of the training images chooses epochs."""
        self.x, self.y, self.valid_x, self.valid_y = split_train("fashion-mnist", data)
        self.test = load("fashion-mnist", "test", data)
        self.lengths = QUICK if quick else LENGTHS
        self.planners: dict[tuple[str, int], Planner] = {}

    def planner(self, net: str, seed: int) -> Planner:
        """One per net and calibration seed; only the last is kept."""
        if (net, seed) not in self.planners:
            order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(seed))
            self.planners = {(net, seed): Planner(trained(net), list(self.x[order[:CALIBRATION]].split(256)))}
        return self.planners[net, seed]

    def untrained(self, cell: Cell) -> dict[str, Any]:
        """Bare and refitted test accuracy of one plan."""
        shop = self.planner(cell["net"], cell["seed"])
        plan, stats = shop.plan(cell["way"], cell["times"])
        nets = {"bare": taut.apply(shop.net, plan, stats)}
        nets["refitted"] = taut.apply(shop.net, plan, stats, data=shop.batches)
        macs, params = self.sizes(shop.net, nets["refitted"])
        return {name: accuracy(net, *self.test) for name, net in nets.items()} | {"macs": macs, "params": params}

    def sizes(self, net: nn.Module, small: nn.Module) -> tuple[float, float]:
        """Ratios of MACs and parameters."""
        before, after = (taut.trace(each, self.x[:1]).cost for each in (net, small))
        return before.macs / after.macs, before.params / after.params

    def compressed(self, net: str, way: str, seed: int) -> nn.Module:
        """One of our nets, a peer's, or the original itself."""
        shop = self.planner(net, seed)
        if way == "control":
            return shop.net
        if way.startswith("torch-pruning"):
            from peer import prune  # noqa: PLC0415 - the peer is not needed for the rest

            rows = torch.cat(shop.batches)[:CALIBRATION]
            order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(seed))[: len(rows)]
            batches = list(zip(self.x[order].split(256), self.y[order].split(256), strict=True))
            return prune(shop.net, self.x[:1], POINTS[net], way.split()[1], batches)
        plan, stats = shop.plan(way, POINTS[net])
        return taut.apply(shop.net, plan, stats, data=shop.batches)

    def tuned(self, cell: Cell) -> dict[str, Any]:
        """Test accuracy before and after fine-tuning."""
        small = self.compressed(cell["net"], cell["way"], cell["seed"])
        images, epochs = self.lengths[cell["length"]]
        done = taut.finetune(
            small,
            None,
            None,
            Shuffled(self.x, self.y, images),
            lambda net: accuracy(net, self.valid_x, self.valid_y),
            loss=nn.functional.cross_entropy,
            schedule=(taut.Stage(epochs=epochs),),
            example=self.x[:8],
            seed=cell["seed"],
        )
        macs, params = self.sizes(trained(cell["net"]), done)
        before, after = (accuracy(net, *self.test) for net in (small, done))
        return {"before": before, "after": after, "macs": macs, "params": params}


def main(data: Path | None, out: Path, paper: bool, quick: bool, seeds: int | None) -> bool:
    """Run what is missing, write results.json, table.md and front.svg into `out`.

    Returns:
        Whether every stated bound holds.
    """
    del paper
    try:
        study = Study(data, quick)
    except FileNotFoundError as error:
        (out / "table.md").write_text(f"Nothing was measured. {error}\n")
        return False
    many = range(1 if quick else seeds or 3)
    grid = cells(net=POINTS, seed=many, way=WAYS, times=[2, 4, 8])
    if quick:
        grid = [cell for cell in grid if cell["times"] == POINTS[cell["net"]] and cell["way"] in QUICK_WAYS]
    marker = "quick-" if quick else ""
    mark = f"taut {taut_version()}, torch {torch.__version__}, {CALIBRATION} calibration images, batch {BATCH}"
    untrained = run_grid(grid, study.untrained, out / f"{marker}untrained.jsonl", "untrained", mark)
    ways = ("default", "control", "torch-pruning l2") if quick else TUNED
    peer = importlib.util.find_spec("torch_pruning") is not None
    ways = tuple(way for way in ways if peer or not way.startswith("torch-pruning"))
    tuning = cells(net=POINTS, seed=[0], way=ways, length=study.lengths)
    tuning.sort(key=lambda cell: list(study.lengths).index(cell["length"]))
    tuning = [cell for cell in tuning if cell["length"] != "5 epochs" or cell["way"] not in {"uniform", "spared"}]
    tuned = run_grid(tuning, study.tuned, out / f"{marker}tuned.jsonl", "fine-tuned", mark)
    dense = {name: accuracy(trained(name), *study.test) for name in POINTS}
    bounds = limits(untrained, tuned, next(iter(study.lengths))) if peer else []
    skipped = [] if peer else ["The peer is not here: pip install --no-deps torch-pruning==1.6.1. No bound was tested."]
    (out / "table.md").write_text(markdown(untrained, tuned, dense, POINTS, [*bounds, *skipped]))
    draw(untrained, dense, out / "front.svg")
    settings = {
        "quick": quick,
        "seeds": len(many),
        "calibration": CALIBRATION,
        "batch": BATCH,
        "lengths": study.lengths,
    }
    results = {"dense": dense, "untrained": untrained, "tuned": tuned}
    return write_results(out / "results.json", settings, results, bounds)


def limits(untrained: list[dict[str, Any]], tuned: list[dict[str, Any]], length: str) -> list[Bound]:
    """Ours above the peer's, fine-tuned alike; ours untrained above the peer's fine-tuned."""
    bounds = []
    for net, times in POINTS.items():
        rows = {row["way"]: row for row in tuned if (row["net"], row["length"]) == (net, length)}
        peers = [row["after"] for way, row in rows.items() if way.startswith("torch-pruning")]
        ours = [
            row["refitted"] for row in untrained if (row["net"], row["way"], row["times"]) == (net, "default", times)
        ]
        bounds += [
            Bound(
                f"{net} MACs /{times}: fine-tuned accuracy above Torch-Pruning's", max(peers), rows["default"]["after"]
            ),
            Bound(f"{net} MACs /{times}: UNTRAINED accuracy above its fine-tuned", max(peers), statistics.mean(ours)),
        ]
    return bounds

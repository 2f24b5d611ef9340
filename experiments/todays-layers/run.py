"""`taut reproduce todays-layers`: attention, padding masks and transposed convolutions in trained nets, made smaller.

Three small nets (nets.py), trained here: a ViT of `nn.MultiheadAttention`, an `nn.TransformerEncoder` with a padding
mask on letters read column by column, a U-Net of `nn.ConvTranspose2d` that takes noise from images. Each at a half and
a quarter of its multiply-accumulates: by taut on unlabelled training inputs, in its default call and by channels
alone, and by Torch-Pruning 1.6.1 in four ways, of which the best on validation samples counts. Untrained, and after
equal training of all sides and of the uncompressed control: the same samples, epochs, loss and optimizer, at one
learning rate per net, chosen on validation samples of the control, the default call and the peer at a half.

Test samples are read once per net that is shown, and only there; the difference of ours and the peer's is paired over
them. --paper changes nothing here, and one seed trains. speed.py measures times afterwards.
"""

from __future__ import annotations

import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import taut
from taut.artifact.manifest import taut_version
from taut.studies import Cell, run_grid, write_results
from taut.studies.grid import cells

NEEDS = ("accelerate",)
"""Packages beside taut's own, looked for before the first step."""

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "nets")]

from nets import NETS, trained  # noqa: E402 - found through the line above: experiments are scripts, no package
from sides import CALIBRATION, CONTROL, FRACTIONS, OURS, Shelf, line, peers, smaller  # noqa: E402
from tasks import Part, Task, learned, load_task, scores  # noqa: E402
from verdicts import best_peer, best_rate, limits, markdown  # noqa: E402

RATES = (1e-3, 3e-4, 1e-4)
EPOCHS = 2
TRAINING = {"vit": (10_000, 2_500), "letters": (10_000, 2_500), "unet": (5_000, 1_000)}
"""Net -> training samples of an epoch, and validation samples."""

QUICK = {"letters": (512, 256)}
UNTRAINED, TUNED = "untrained", "trained equally"


class Study:
    """The data of each net, and one function per kind of run."""

    def __init__(self, data: Path | None, out: Path, quick: bool) -> None:
        """Nets are kept in `out`."""
        self.data, self.quick = data, quick
        self.training, self.epochs = (QUICK, 1) if quick else (TRAINING, EPOCHS)
        self.calibration = 256 if quick else CALIBRATION
        self.shelf = Shelf(out / ("quick-nets" if quick else "nets"))
        self.task, self.scored = cache(self._task), cache(self._scored)

    def _task(self, name: str) -> Task:
        return load_task(name, self.data)

    def part(self, name: str, count: int, seed: int) -> Part:
        """Training samples in an order of that seed."""
        train = self.task(name).train
        return train.chosen(torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:count])

    def small(self, cell: Cell) -> nn.Module:
        """The net of a side, untrained, as it was kept."""
        held = self.shelf.get(cell)
        if held is not None:
            return held
        made = smaller(cell, self.task(cell["net"]), self.part(cell["net"], self.calibration, 0))
        return self.shelf.put(cell, made)

    def valid(self, name: str, net: nn.Module) -> float:
        """Mean score of validation samples."""
        task = self.task(name)
        return float(scores(net, task.valid.first(self.training[name][1]), task).mean())

    def made(self, cell: Cell) -> dict[str, Any]:
        """What a side makes of a net: its size and validation score, or why there is none."""
        start, example = time.perf_counter(), self.task(cell["net"]).train.first(1).inputs
        try:
            small = self.small(cell)
        except Exception as error:  # whatever the peer raises is the finding
            if cell["side"] in OURS:
                raise
            return {"error": line(error)}
        seconds = time.perf_counter() - start
        before, after = (taut.trace(net, example).cost for net in (trained(cell["net"]), small))
        left = {"macs_left": after.macs / before.macs, "params_left": after.params / before.params}
        return {"seconds": seconds, "valid": self.valid(cell["net"], small), **left}

    def tune(self, cell: Cell) -> dict[str, Any]:
        """Validation score after training."""
        task, start = self.task(cell["net"]), time.perf_counter()
        small = self.small({key: value for key, value in cell.items() if key != "rate"})
        samples, judges = self.training[cell["net"]]
        train, valid = self.part(cell["net"], samples, 1), task.valid.first(judges)
        done = learned(small, task, train, valid, (self.epochs, cell["rate"]))
        self.shelf.put(cell, done)
        return {"seconds": time.perf_counter() - start, "valid": self.valid(cell["net"], done)}

    def finished(self, net: str, side: str, macs: float, rate: float | None) -> nn.Module:
        """An untrained net, or a trained one; what was not kept is made again."""
        cell = {"net": net, "side": side, "macs": macs}
        if rate is None:
            return self.small(cell)
        if self.shelf.get(cell | {"rate": rate}) is None:
            self.tune(cell | {"rate": rate})
        held = self.shelf.get(cell | {"rate": rate})
        assert held is not None
        return held

    def _scored(self, net: str, side: str, macs: float, rate: float | None) -> np.ndarray:
        """Test scores of a finished net."""
        part = self.task(net).test.first(512 if self.quick else None)
        return scores(self.finished(net, side, macs, rate), part, self.task(net)).double().numpy()

    def tested(self, cell: Cell) -> dict[str, Any]:
        """Test scores of ours, the peer's where there is one, and the control; paired differences with intervals."""
        (net, macs, rate), scale = (cell[key] for key in ("net", "macs", "rate")), self.task(cell["net"]).scale
        ours, control = self.scored(net, cell["side"], macs, rate), self.scored(net, CONTROL, 1.0, rate)
        result: dict[str, Any] = {"ours": float(ours.mean()), "control": float(control.mean()), "samples": len(ours)}
        result |= interval("gained", scale * (control - self.scored(net, CONTROL, 1.0, None)))
        if cell["peer"] is not None:
            theirs = self.scored(net, cell["peer"], macs, rate)
            result |= {"theirs": float(theirs.mean()), **interval("above", scale * (ours - theirs))}
        return result


def interval(name: str, differences: np.ndarray) -> dict[str, float]:
    """Mean of paired differences, and the ends of its 95 % interval."""
    mean, half = float(differences.mean()), float(1.96 * differences.std(ddof=1) / len(differences) ** 0.5)
    return {name: mean, f"{name}_low": mean - half, f"{name}_high": mean + half}


def main(data: Path | None, out: Path, paper: bool, quick: bool, seeds: int | None) -> bool:
    """Run what is missing, write results.json and table.md into `out`.

    Returns:
        Whether every stated bound holds.
    """
    del paper, seeds
    study, marker = Study(data, out, quick), "quick-" if quick else ""
    names, fractions, rates = (("letters",), (0.5,), RATES[:1]) if quick else (tuple(NETS), FRACTIONS, RATES)
    absent = _absent(study, names)
    names = tuple(name for name in names if name not in absent)
    mark = f"taut {taut_version()}, torch {torch.__version__}, {study.calibration} calibration samples"
    trained_mark = f"{mark}, {study.epochs} epochs of {study.training}"
    sides = [*list(OURS)[:1], *peers()[:1]] if quick else [*OURS, *peers()]
    controls = cells(net=names, side=[CONTROL], macs=[1.0])
    grid = [*controls, *cells(net=names, side=sides, macs=fractions)]
    made = run_grid(grid, study.made, out / f"{marker}made.jsonl", "made smaller", mark)

    def tune(wanted: list[Cell]) -> list[dict[str, Any]]:
        return run_grid(wanted, study.tune, out / f"{marker}trained.jsonl", "trained", trained_mark)

    tried = [cell for name in names for cell in _trials(name, made, fractions[0], rates)]
    chosen = {name: best_rate([row for row in tune(tried) if row["net"] == name]) for name in names}
    wanted = [
        *tried,
        *(
            {"net": r["net"], "side": r["side"], "macs": r["macs"], "rate": chosen[r["net"]]}
            for r in made
            if "error" not in r
        ),
    ]
    tuned = tune(wanted)
    compared = _points(
        cells(net=names, macs=fractions, side=[side for side in sides if side in OURS]), made, tuned, chosen
    )
    tested = run_grid(compared, study.tested, out / f"{marker}tested.jsonl", "tested", trained_mark)
    units = {name: (study.task(name).unit, study.task(name).points) for name in names}
    bounds = [] if quick else limits(made, tested, units)
    (out / "table.md").write_text(markdown(made, tuned, tested, units, bounds, absent))
    training = {"epochs": study.epochs, "samples, validation samples": study.training}
    settings = {"quick": quick, "calibration": study.calibration, "training": training, "rates": chosen}
    results = {"made": made, "trained": tuned, "tested": tested}
    return write_results(out / "results.json", settings, results, bounds)


def _absent(study: Study, names: tuple[str, ...]) -> dict[str, str]:
    """Nets of which the data are not here, and what is missing."""
    absent = {}
    for name in names:
        try:
            study.task(name)
        except FileNotFoundError as error:
            absent[name] = str(error)
    return absent


def _points(
    wanted: list[Cell], made: list[dict[str, Any]], tuned: list[dict[str, Any]], rates: dict[str, float]
) -> list[Cell]:
    """Nets of ours, untrained and trained, each beside the peer's best there."""
    points = []
    for cell in wanted:
        at_rate = [row for row in tuned if row["rate"] == rates[cell["net"]]]
        for rate, rows in ((None, made), (rates[cell["net"]], at_rate)):
            points.append(cell | {"rate": rate, "peer": best_peer(rows, cell["net"], cell["macs"])})
    return points


def _trials(name: str, made: list[dict[str, Any]], macs: float, rates: tuple[float, ...]) -> list[Cell]:
    """By which the rate is chosen: the control, the default call and the peer at a half."""
    peer, ours = best_peer(made, name, macs), next(iter(OURS))
    sides = [(CONTROL, 1.0), (ours, macs), *([(peer, macs)] if peer else [])]
    return [{"net": name, "side": side, "macs": left, "rate": rate} for side, left in sides for rate in rates]

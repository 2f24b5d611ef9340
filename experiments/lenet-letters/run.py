"""LeNet-5 on letters: magnitude pruning, SVD and CP with early stopping, and the comparators of every honest table.

    taut reproduce lenet-letters --data DIR [--quick] [--paper]

DIR holds `emnist/` with its IDX files, or `letters26.npz` (letters rendered from fonts); `fashion-mnist/` and `mnist/`
for the comparators. `--paper` runs the four tables in the text's own protocol alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from taut.artifact.manifest import taut_version
from taut.studies import Cell, run_grid, write_results

NEEDS = ("accelerate", "matplotlib")
"""Packages beside taut's own, looked for before the first step."""

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "nets")]

import study  # noqa: E402 - found through the line above: experiments are scripts, no package
import surgeons  # noqa: E402
import vectors  # noqa: E402
import wanted  # noqa: E402
from answers import findings  # noqa: E402
from comparators import NETS, compared  # noqa: E402
from limits import limits  # noqa: E402
from masking_facts import facts  # noqa: E402
from panels import draw_methods, draw_shares  # noqa: E402
from printed import markdown  # noqa: E402

OTHERS = (vectors.WIDTHS, vectors.EPOCHS, vectors.MORE, vectors.IMAGES, surgeons.CALIBRATION, surgeons.SPARSITIES)
"""What the runs without letters depend on."""


def main(data: Path | None, out: Path, paper: bool, quick: bool, seeds: int | None) -> bool:
    """Run what is missing, write results.json, table.md and the figures into `out`.

    Returns:
        Whether at least one stated bound was tested and all hold.
    """
    many = seeds or (1 if quick else 3)
    place: Cell = {"folder": None if data is None else str(data), "out": str(out), "quick": quick}
    try:
        kind = study.letters(data, quick).kind
    except FileNotFoundError as error:
        (out / "table.md").write_text(f"Nothing was measured. {error}\n")
        return False
    found: dict[str, Any] = {"left out": {}}
    found["tables"] = _tables(place, many, paper)
    if not paper:
        _others(found, place)
    found["facts"] = facts()
    bounds = limits(found)
    (out / "table.md").write_text(markdown(found, bounds, kind))
    draw_shares(found["tables"], out / "figure-4.svg")
    if found.get("comparators"):
        draw_methods(found["comparators"], out / "methods.svg")
    if not quick and not paper:
        found["claims"] = findings(found, kind)
    settings = {"letters": kind, "quick": quick, "paper": paper, "seeds": many, "batch": study.BATCH}
    return write_results(out / "results.json", settings, found, bounds)


def _tables(place: Cell, seeds: int, paper: bool) -> list[dict[str, Any]]:
    cells = wanted.tables(seeds, place["quick"])
    if paper:
        cells = [cell for cell in cells if cell["way"] in {"text", "control"}]
    return _grid("tables", [wanted.trained("lenet", seeds), cells], place, study.run)


def _others(found: dict[str, Any], place: Cell) -> None:
    """The open question and the comparators; what is not here is left out and named."""
    quick = place["quick"]
    if not quick:
        few = wanted.LARGER_SEEDS
        found["larger"] = _grid("larger", [wanted.trained("larger", few), wanted.larger(few)], place, study.run)
    try:
        cells = vectors.wanted(quick, 1)
        _grid("vectors", [vectors.first(cells)], place, vectors.run)
        found["vectors"] = _grid("vectors", [cells], place, vectors.run)
        cells = surgeons.wanted(quick)
        for net in {cell["net"] for cell in cells}:
            if why := surgeons.missing(net):
                found["left out"][f"surgeons on {net}"] = why
        cells = [cell for cell in cells if f"surgeons on {cell['net']}" not in found["left out"]]
        found["surgeons"] = _grid("surgeons", [cells], place, surgeons.run)
        nets = ("lenet",) if quick else NETS
        found["comparators"] = {net: compared(place, net, _jobs()) for net in nets}
    except FileNotFoundError as error:
        found["left out"]["comparators"] = str(error)


def _grid(name: str, stages: Sequence[list[Cell]], place: Cell, work: Any) -> list[dict[str, Any]]:
    """Runs of every stage after those of the one before, as many at a time as there are cores."""
    path = Path(place["out"]) / f"{'quick-' if place['quick'] else ''}{name}.jsonl"
    mark = f"taut {taut_version()}, torch {torch.__version__}, {OTHERS}"
    if work is study.run:
        mark = study.mark(None if place["folder"] is None else Path(place["folder"]), place["quick"])
    rows = []
    for cells in stages:
        rows += run_grid(cells, partial(work, place), path, name, mark, _jobs())
    return rows


def _jobs() -> int:
    return max(1, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))

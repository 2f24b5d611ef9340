"""Filter pruning, Tucker with automatic ranks, both in either order, and both in one plan; Torch-Pruning beside.

    taut reproduce prune-then-tucker --data DIR [--quick] [--paper] [--seeds N]

`--paper` runs everything on GoogLeNet, the net of the source, too, and automatic ranks on CREPE.

DIR holds `fashion-mnist/`; `mnist/` for the digit net. With `imagefolder/train` and `imagefolder/test` (folders of
classes, such as Food-101) the three curves run there, too, with GoogLeNet at 224: see `folderlike.py`.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from taut.studies import Cell, run_grid, write_results

NEEDS = ("accelerate", "matplotlib")
"""Packages beside taut's own, looked for before the first step."""

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "nets")]

import automatic_ranks  # noqa: E402 - found through the line above: experiments are scripts, no package
import contest  # noqa: E402
import folderlike  # noqa: E402
import pipelines  # noqa: E402
from answers_both import findings  # noqa: E402
from matched import draw, matched  # noqa: E402
from tested import limits  # noqa: E402
from written import markdown  # noqa: E402


def main(data: Path | None, out: Path, paper: bool, quick: bool, seeds: int | None) -> bool:
    """Run what is missing, write results.json, table.md and the figures into `out`.

    Returns:
        Whether at least one stated bound was tested and all hold.
    """
    nets = (*pipelines.NETS, "googlenet") if paper else pipelines.NETS
    place: Cell = {"folder": None if data is None else str(data), "out": str(out), "quick": quick}
    try:
        mark = pipelines.mark(place["folder"])
    except FileNotFoundError as error:
        (out / "table.md").write_text(f"Nothing was measured. {error}\n")
        return False
    found: dict[str, Any] = {}
    found["pipelines"] = _grid("pipelines", pipelines.wanted(quick, seeds, nets), place, pipelines.run, mark)
    if cells := folderlike.wanted(place["folder"], quick):
        images = folderlike.mark(place["folder"])
        found["pipelines"] += _grid("imagefolder", cells, place, folderlike.run, images, jobs=1)
    found["contest"] = _grid("contest", contest.wanted(quick, nets), place, contest.run, mark)
    fast = _grid("contest", contest.hurried(quick, nets), place, contest.run, mark, jobs=1)
    found["contest"] += [row for row in fast if "missing" not in row]
    found["automatic"] = _grid("automatic", automatic_ranks.wanted(quick, paper), place, automatic_ranks.run, mark)
    found["speeds"] = _grid("speeds", contest.timed(quick, nets), place, contest.speed, mark, jobs=1)
    found["matched"] = matched(found["pipelines"])
    bounds = limits(found, quick)
    (out / "table.md").write_text(markdown(found, bounds))
    draw(found["pipelines"], out)
    if not quick:
        found["claims"] = findings(found)
    settings = {"quick": quick, "epoch": pipelines.IMAGES, "epochs": pipelines.EPOCHS, "contest epoch": contest.IMAGES}
    return write_results(out / "results.json", settings, found, bounds)


def _grid(name: str, cells: list[Cell], place: Cell, work: Any, mark: str, jobs: int | None = None) -> list[Any]:
    path = Path(place["out"]) / f"{'quick-' if place['quick'] else ''}{name}.jsonl"
    return run_grid(cells, partial(work, place), path, name, mark, jobs or _jobs())


def _jobs() -> int:
    return max(1, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))

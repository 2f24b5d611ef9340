"""Nearly a hundred architectures of well-known libraries at half of their multiply-accumulates, beside Torch-Pruning.

.venv/bin/python -m pip install --no-deps --target DIR -r benchmarks/families.txt
PYTHONPATH=DIR .venv/bin/python benchmarks/families.py [--jobs 2] [--only hf/T5 ...] [--redo]

The libraries stay out of the environment: they want another torch. Weights are random, sizes reduced where they would
be large (architectures/*.py), nothing is downloaded; so this is about what a tool survives, not about accuracy. Every
row has a process of its own, one thread and at most 90 seconds of it; times are measured once, however busy the
machine is. Finished rows are kept in results/families.jsonl:
started again, only the missing ones run; --redo runs those that are asked for once more.

taut runs as `taut.compress(model, example, budget=taut.Budget(macs=0.5), data=data)`: four batches of four samples,
default methods. Where the budget cannot be met, `BudgetError.best` is the result (`missed` holds the message). Then

    structure   the outputs have the same containers, shapes and types of numbers; all finite, on calibration data too
    unharmed    the model that was handed in has the bits that it had
    reloads     `taut.load` of the saved folder computes the same bits
    onnx        worst relative difference of `taut.export`, where it exports the original
    reach       share of MACs and parameters in layers that default methods take, and in layers that channels narrow;
                of the others, by kind, what is in the way

Torch-Pruning 1.6.1 runs as its README does: BasePruner, magnitude importance, the layers that make outputs ignored,
everything else at its default, in five steps of which the first that reaches half of the MACs is the last.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from architectures import ARCHITECTURES
from ending import finish
from family import SECONDS

from taut.measure import rounds
from taut.studies import Bound, load_average, run_grid
from taut.studies.grid import cells

HERE = Path(__file__).parent
ROWS, RESULTS = HERE / "results" / "families.jsonl", HERE / "results" / "families.json"
SIDES = ("taut", "torch-pruning")
LIMIT = 1e-4
"""Largest relative difference of an exported file; as `taut.export`."""

LIBRARIES = (
    "conformer",
    "diffusers",
    "efficientnet_pytorch",
    "monai",
    "open_clip_torch",
    "pytorchcv",
    "segmentation_models_pytorch",
    "timm",
    "torch-pruning",
    "torchaudio",
    "torchvision",
    "transformers",
    "x-transformers",
)

Row = dict[str, Any]


def measured(cell: Row) -> Row:
    """A row, from a process of its own."""
    run = [sys.executable, str(HERE / "family.py"), cell["side"], cell["net"]]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    start = time.perf_counter()
    done = subprocess.run(run, capture_output=True, text=True, check=False, env=os.environ | threads)
    lines = done.stdout.strip().splitlines()
    if done.returncode == -signal.SIGXCPU:
        return {"crashed": f"not done after {SECONDS} s", "whole_seconds": round(time.perf_counter() - start, 1)}
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return {"crashed": f"exit code {done.returncode}: {last}"[:400], "whole_seconds": 0.0}
    row: Row = json.loads(lines[-1])
    print(printed({**cell, **row}), flush=True)
    return row | {"whole_seconds": round(time.perf_counter() - start, 1)}


def faults(row: Row) -> list[str]:
    """What is wrong with a row, in words; a budget that cannot be met is nothing wrong."""
    if row["crashed"]:
        return [row["crashed"]]
    if row["does_not_run"]:
        return [f"does not run: {row['does_not_run']}"]
    missing = [f"not {word}" for word in ("structure_kept", "finite", "unharmed", "reloads") if not row.get(word, True)]
    if "worst" in row.get("onnx_before", {}) and not row["onnx"].get("worst", 1.0) <= LIMIT:
        missing.append(f"onnx: {row['onnx'].get('error', row['onnx'].get('worst'))}")
    return missing


def printed(row: Row) -> str:
    """One line of the table."""
    left = row.get("macs_left")
    cost = "" if left is None else f"{left:.2f}"
    reach = row.get("reach") or {}
    parts = " ".join(f"{reach[key]['macs']:4.0%}" for key in ("low_rank", "channels")) if reach else ""
    onnx = "worst" in row.get("onnx_before", {}) and f"{row['onnx'].get('worst', 1):.0e}"
    words = "; ".join(faults(row)) or ("budget not met" if row.get("missed") else "")
    seconds = row.get("whole_seconds", row.get("seconds", 0))
    return f"{row['net']:34s} {row['side']:14s} {cost:5s} {parts:10s} {onnx or '':6s} {seconds:5.0f} s  {words[:120]}"


def counts(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """For each side: how many went well, and what went wrong with the others."""
    tally = {}
    for side in SIDES:
        mine = [row for row in rows if row["side"] == side]
        whole = [row for row in mine if not faults(row)]
        tally[side] = {
            "nets": len(mine),
            "whole": len(whole),
            "half_of_the_macs": sum((row["macs_left"] or 1.0) <= 0.5 for row in whole),
            "crashed": sum(row["crashed"] is not None for row in mine),
            "does_not_run": sum(bool(row.get("does_not_run")) for row in mine),
            "structure_changed": sum(row.get("structure_kept") is False for row in mine),
            "not_finite": sum(row.get("finite") is False for row in mine),
        }
    mine = [row for row in rows if row["side"] == "taut"]
    exported = [row for row in mine if "worst" in row.get("onnx_before", {})]
    tally["taut"] |= {
        "harmed": sum(row.get("unharmed") is False for row in mine),
        "reloads_otherwise": sum(row.get("reloads", True) is not True for row in mine),
        "exported_before": len(exported),
        "export_lost": sum(not row["onnx"].get("worst", 1.0) <= LIMIT for row in exported),
    }
    return tally


def bounds(tally: dict[str, dict[str, int]]) -> list[Bound]:
    """Of our side."""
    mine = tally["taut"]
    words = ("crashed", "does_not_run", "structure_changed", "not_finite", "harmed", "reloads_otherwise", "export_lost")
    least = tally["torch-pruning"]["half_of_the_macs"]
    return [
        Bound("families: architectures tried", 80, mine["nets"]),
        *(Bound(f"families: {word.replace('_', ' ')}", 0, mine[word], at_most=True) for word in words),
        Bound("families: at half of the MACs and whole, as many as by Torch-Pruning", least, mine["half_of_the_macs"]),
    ]


def versions() -> dict[str, str]:
    """Of the libraries that are there."""
    return {name: number for name in LIBRARIES if (number := _version(name))}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def dropped(names: Sequence[str], sides: Sequence[str]) -> None:
    """Forget the rows of these, so that they run again."""
    if ROWS.exists():
        lines = ROWS.read_text().splitlines(keepends=True)
        kept = [
            line
            for line in lines
            if not (json.loads(line)["settings"]["net"] in names and json.loads(line)["settings"]["side"] in sides)
        ]
        ROWS.write_text("".join(kept))


def main() -> None:
    """All rows; write results/families.json where none is left out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES), metavar="NAME")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time")
    parser.add_argument("--redo", action="store_true", help="run again what is there already")
    args = parser.parse_args()
    libraries = versions()
    if args.redo:
        dropped(args.only, args.sides)
    load = load_average()
    mark = json.dumps(libraries, sort_keys=True)
    rows = run_grid(cells(net=args.only, side=args.sides), measured, ROWS, "architectures", mark, args.jobs)
    for row in rows:
        print(printed(row))
    if len(args.only) < len(ARCHITECTURES) or len(args.sides) < len(SIDES):
        return
    tally = counts(rows)
    for side, numbers in tally.items():
        print(f"{side:14s} {', '.join(f'{word}: {many}' for word, many in numbers.items())}")
    settings = {
        "seconds": SECONDS,
        "tries of a timing": 1 + rounds.EXTRA_TRIES,
        "libraries": libraries,
        "jobs": args.jobs,
        "load_average_before": load,
    }
    finish(RESULTS, settings, {"counts": tally, "rows": rows}, bounds(tally))


if __name__ == "__main__":
    main()

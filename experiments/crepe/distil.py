"""CREPE distilled without labels, from the nets that untrained.py made: pitch accuracy at 8x and 16x fewer MACs.

python experiments/crepe/distil.py [--nets FOLDER]

The original teaches on tones of other seeds than calibration, validation and evaluation; the best weights on the
validation tones count. The control is the original with the same training: its loss is 0 from the start.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import task
from net import crepe, untrained
from torch import Tensor, nn

import taut

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "benchmarks"))

from ending import finish  # noqa: E402 - found through the line above: experiments are scripts, no package

from taut.studies import Bound  # noqa: E402
from taut.studies.grid import Cell, run_grid  # noqa: E402

LIMITS = {8: 0.5, 16: 2.0}
"""Times fewer MACs -> points of pitch accuracy at 20 dB that may be lost."""

TRAIN_SEED, VALID_SEED = 2000, 3000
BATCH = 32
CELLS: list[Cell] = [
    {"net": 8, "clips": 60, "epochs": 4, "rate": 5e-5},
    {"net": 16, "clips": 160, "epochs": 5, "rate": 3e-4},
    {"net": "control", "clips": 10, "epochs": 1, "rate": 5e-5},  # its gradient is 0: longer training changes nothing
]
"""Rates were tried on validation tones, from 2e-5 to 1e-3: above 5e-4 the first steps lose more than is regained."""


def tones(clips: int, seed: int) -> list[Tensor]:
    """Frames of all noise levels without labels."""
    return list(task.tones(clips, seed).split(BATCH))


def distil(cell: Cell, nets: Path) -> dict[str, Any]:
    """Pitch accuracy before and after."""
    dense = crepe()
    small: nn.Module = dense if cell["net"] == "control" else taut.load(nets / f"x{cell['net']}", base=untrained)
    start = time.perf_counter()
    done = taut.finetune(
        small,
        None,
        None,
        tones(cell["clips"], TRAIN_SEED),
        tones(20, VALID_SEED),
        teacher=dense,
        example=task.example(),
        schedule=(taut.Stage(epochs=cell["epochs"], rate=cell["rate"]),),
    )
    seconds = time.perf_counter() - start
    before, after = (task.evaluate(net) for net in (small, done))
    return {"before": before, "after": after, "seconds": seconds}


def main() -> None:
    """All nets; write results/distil.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nets", type=Path, default=HERE / "taut-crepe")
    nets = parser.parse_args().nets.resolve()
    rows = run_grid(CELLS, partial(distil, nets=nets), nets / "distil.jsonl", "distilling")
    key = next(iter(rows[-1]["before"]))
    dense = rows[-1]["before"][key]
    for row in rows:
        print(json.dumps(row))
    bounds = [
        Bound(
            f"CREPE at MACs /{row['net']}, distilled: points of pitch accuracy lost at 20 dB",
            LIMITS[row["net"]],
            round(100 * (dense - row["after"][key]), 4),
            at_most=True,
        )
        for row in rows[:-1]
    ]
    settings = {"batch": BATCH, "train_seed": TRAIN_SEED, "valid_seed": VALID_SEED}
    finish(HERE / "results" / "distil.json", settings, rows, bounds)


if __name__ == "__main__":
    main()

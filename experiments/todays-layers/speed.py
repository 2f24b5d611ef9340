"""How fast the nets of todays-layers are beside the peer's: eager and ONNX Runtime, batches of 1 and 32.

Each of ours, trained, is timed in turns with the peer's best net at the same budget of multiply-accumulates; a ratio is
that of the lower quintiles (`taut.compare`); besides, each side in its fastest runtime. What speed.jsonl holds is not
timed again: remove it first where the machine was busy.

Channels alone leave the layers' number and kind as they are: what they save is saved in time, too, and each side in its
fastest runtime is where that counts. Ranks put a second layer behind each, which nets as small as these pay for call by
call. In eager at batch 1 torch runs the peer's attention (and encoder layers, with masks) as one fused operation, for
which heads have to divide the width; `taut.nn.Attention`, of heads that went on their own, is several.

python experiments/todays-layers/speed.py [--out FOLDER] [--rounds 30]    (after run.py; run it alone on the machine)
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

os.environ["TAUT_RUNTIMES"] = "eager,onnxruntime"

import taut

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "nets"), str(HERE.parents[1] / "benchmarks")]

from ending import finish  # noqa: E402 - found through the line above: experiments are scripts, no package
from nets import HEIGHT  # noqa: E402
from sides import OURS, Shelf  # noqa: E402
from verdicts import point, ratios  # noqa: E402

from taut.artifact.manifest import taut_version  # noqa: E402
from taut.studies import Bound, Cell, load_average, run_grid  # noqa: E402

BATCHES = (1, 32)


def example(net: str, batch: int) -> Any:
    """Inputs of full size."""
    generator = torch.Generator().manual_seed(0)
    if net == "letters":
        columns = torch.rand(batch, HEIGHT, HEIGHT, generator=generator)
        return columns, torch.zeros(batch, HEIGHT, dtype=torch.bool)
    return torch.rand(batch, 1, 28, 28, generator=generator)


def timed(shelf: Shelf, rounds: int, cell: Cell) -> dict[str, Any]:
    """The peer's time over ours in each runtime."""
    nets, load = [], load_average()
    for side in (cell["peer"], cell["side"]):
        nets.append(shelf.get({"net": cell["net"], "side": side, "macs": cell["macs"], "rate": cell["rate"]}))
        if nets[-1] is None:
            raise SystemExit(f"'{shelf.folder}' does not hold the nets of {cell['net']}: start run.py first.")
    latency = taut.compare(*nets, None, example(cell["net"], cell["batch"]), rounds=rounds).latency
    found = {}
    for runtime, pair in latency.runtimes.items():
        times = {"theirs_ms": pair.before, "ours_ms": pair.after, "faster": pair.ratio, "apart": pair.apart}
        found[runtime] = {**times, "low": pair.low, "high": pair.high}
        print(f"{point(cell)}, {runtime}, batch {cell['batch']}: {pair.ratio:.2f}", flush=True)
    return {"load_average_before": load, "runtimes": found}


def main() -> None:
    """Time the trained nets of results.json; write speed.json beside it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    tested = json.loads((args.out / "results.json").read_text())["results"]["tested"]
    keys = ("net", "macs", "rate", "side", "peer")
    points = [{key: row[key] for key in keys} for row in tested if row["rate"] is not None and row["peer"] is not None]
    points.sort(key=lambda row: list(OURS).index(row["side"]))
    wanted = [row | {"batch": batch} for row in points for batch in BATCHES]
    mark = f"taut {taut_version()}, torch {torch.__version__}, {args.rounds} rounds"
    work = partial(timed, Shelf(args.out / "nets"), args.rounds)
    rows = run_grid(wanted, work, args.out / "speed.jsonl", "timed", mark)
    bounds = [
        Bound(f"{point(row)}, {where}, batch {row['batch']}: times faster than Torch-Pruning", 1.0, faster)
        for row in rows
        for where, faster in ratios(row["runtimes"]).items()
    ]
    finish(args.out / "speed.json", {"rounds": args.rounds}, rows, bounds)


if __name__ == "__main__":
    main()

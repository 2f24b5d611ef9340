"""How fast the nets of todays-layers are beside the peer's: eager and ONNX Runtime, batches of 1 and 32.

Each of ours, trained, is timed in turns with the peer's best net at the same budget of multiply-accumulates; a ratio is
that of the lower quintiles (`taut.compare`).

python experiments/todays-layers/speed.py [--out FOLDER] [--rounds 30]    (after run.py; run it alone on the machine)
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

os.environ["TAUT_RUNTIMES"] = "eager,onnxruntime"

import taut

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "nets"), str(HERE.parents[1] / "benchmarks")]

from ending import finish  # noqa: E402 - found through the line above: experiments are scripts, no package
from nets import HEIGHT  # noqa: E402
from sides import Shelf  # noqa: E402
from verdicts import point  # noqa: E402

from taut.studies import Bound, load_average  # noqa: E402

BATCHES = (1, 32)


def example(net: str, batch: int) -> Any:
    """Inputs of full size."""
    generator = torch.Generator().manual_seed(0)
    if net == "letters":
        columns = torch.rand(batch, HEIGHT, HEIGHT, generator=generator)
        return columns, torch.zeros(batch, HEIGHT, dtype=torch.bool)
    return torch.rand(batch, 1, 28, 28, generator=generator)


def timed(row: dict[str, Any], shelf: Shelf, rounds: int) -> list[dict[str, Any]]:
    """Both batches of one point, in each runtime."""
    nets, found = {}, []
    for side in (row["peer"], row["side"]):
        nets[side] = shelf.get({"net": row["net"], "side": side, "macs": row["macs"], "rate": row["rate"]})
        if nets[side] is None:
            raise SystemExit(f"'{shelf.folder}' does not hold the nets of {row['net']}: start run.py first.")
    for batch in BATCHES:
        latency = taut.compare(*nets.values(), None, example(row["net"], batch), rounds=rounds).latency
        for runtime, pair in latency.runtimes.items():
            times = {"theirs_ms": pair.before, "ours_ms": pair.after, "faster": pair.ratio, "apart": pair.apart}
            kept = {key: row[key] for key in ("net", "macs", "rate", "side", "peer")}
            found.append({**kept, "batch": batch, "runtime": runtime, **times, "low": pair.low, "high": pair.high})
            print(found[-1], flush=True)
    return found


def main() -> None:
    """Time the trained nets of results.json; write speed.json beside it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    load, shelf = load_average(), Shelf(args.out / "nets")
    tested = json.loads((args.out / "results.json").read_text())["results"]["tested"]
    points = [row for row in tested if row["rate"] is not None and row["peer"] is not None]
    rows = [found for row in points for found in timed(row, shelf, args.rounds)]
    bounds = [
        Bound(
            f"{point(row)}, {row['runtime']}, batch {row['batch']}: times faster than Torch-Pruning", 1.0, row["faster"]
        )
        for row in rows
    ]
    finish(args.out / "speed.json", {"rounds": args.rounds, "load_average_before": load}, rows, bounds)


if __name__ == "__main__":
    main()

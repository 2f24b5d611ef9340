"""How much faster CREPE becomes: every runtime, batch 32 and batch 1, beside the ratio of MACs.

python experiments/crepe/speed.py [--nets FOLDER]     (after untrained.py; run it alone on the machine)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import task
from net import crepe, untrained

import taut

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "benchmarks"))

from ending import finish  # noqa: E402 - found through the line above: experiments are scripts, no package

from taut.studies import load_average  # noqa: E402

RATIOS = (4, 8, 16)


def main() -> None:
    """All nets and batches; write results/speed.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nets", type=Path, default=HERE / "taut-crepe")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    load, dense, rows = load_average(), crepe(), []
    for times in RATIOS:
        small = taut.load(args.nets / f"x{times}", base=untrained)
        for batch in (32, 1):
            found = taut.compare(dense, small, None, task.example()[:batch], rounds=args.rounds).to_dict()
            speedups: dict[str, Any] = {key: value for key, value in found.items() if key.startswith("speedup_")}
            print(f"x{times} batch {batch}: MACs {found['macs_ratio']:.2f}x, {speedups}", flush=True)
            rows.append({"times": times, **found})
    finish(HERE / "results" / "speed.json", {"rounds": args.rounds, "load_average_before": load}, rows, [])


if __name__ == "__main__":
    main()

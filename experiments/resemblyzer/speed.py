"""How much faster the speaker encoder becomes: every runtime, batch 1 and 16, best beside best.

python experiments/resemblyzer/speed.py [--nets FOLDER]    (after run.py; run it alone on the machine)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from speakers import BANDS, FRAMES, encoder, untrained

import taut

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "benchmarks"))

from ending import finish  # noqa: E402 - found through the line above: experiments are scripts, no package

from taut.studies import Bound, load_average  # noqa: E402

FASTER = 1.6
"""Times that the original's best runtime over the small net's has to be, at batch 1."""


def main() -> None:
    """Both batches; write results/speed.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nets", type=Path, default=HERE / "results" / "nets")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    load, dense, rows = load_average(), encoder(), []
    small = taut.load(args.nets / "0", base=untrained)
    for batch in (1, 16):
        example = torch.rand(batch, FRAMES, BANDS, generator=torch.Generator().manual_seed(0))
        found = taut.compare(dense, small, None, example, rounds=args.rounds).to_dict()
        speedups = {key: value for key, value in found.items() if key.startswith("speedup_")}
        print(f"batch {batch}: MACs {found['macs_ratio']:.2f}x, {speedups}", flush=True)
        rows.append({"batch": batch, **found})
    bound = Bound("best runtime beside best, batch 1: times faster", FASTER, rows[0]["speedup_best"])
    finish(HERE / "results" / "speed.json", {"rounds": args.rounds, "load_average_before": load}, rows, [bound])


if __name__ == "__main__":
    main()

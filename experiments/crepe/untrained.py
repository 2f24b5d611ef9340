"""CREPE through the command line, without training: pitch accuracy at 4x, 8x and 16x fewer MACs.

python experiments/crepe/untrained.py [--out FOLDER]

Each model is made by `taut compress` in this folder and stays in OUT/x4, OUT/x8, OUT/x16 (for distil.py and speed.py).
Calibrated on clean and noisy tones without labels; evaluated on tones of other seeds. TAUT_RUNTIMES=eager leaves the
timing in other runtimes to speed.py, which runs alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "benchmarks"))

from ending import finish  # noqa: E402 - found through the line above: experiments are scripts, no package

from taut.studies import Bound  # noqa: E402

RATIOS = {4: 0.5, 8: 1.0, 16: 9.6}
"""Times fewer MACs -> points of pitch accuracy at 20 dB that may be lost (at 16x the value of an earlier trial)."""

METHODS = "dead_taps,svd,tucker"


def compress(times: int, out: Path) -> dict[str, Any]:
    """One call of the command line; its comparison."""
    command = f"taut compress net:crepe --task task.py --budget macs={1 / times} --methods {METHODS} --sensitivity"
    print(f"$ {command}", flush=True)
    taut = [sys.executable, "-c", "from taut.cli import main; main()"]
    start = time.perf_counter()
    subprocess.run([*taut, *command.split()[1:], "--out", str(out)], cwd=HERE, check=True)
    return json.loads((out / "comparison.json").read_text()) | {
        "command": command,
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    """All ratios; write results/untrained.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE / "taut-crepe")
    out = parser.parse_args().out.resolve()
    os.environ["TAUT_RUNTIMES"] = "eager"
    found = {}
    for times in RATIOS:
        known = out / f"x{times}.json"
        if not known.exists():
            out.mkdir(parents=True, exist_ok=True)
            known.write_text(json.dumps(compress(times, out / f"x{times}")))
        found[str(times)] = json.loads(known.read_text())
    bounds = [
        Bound(
            f"CREPE at MACs /{times}, untrained: points of pitch accuracy lost at 20 dB",
            limit,
            round(0.0 - 100 * found[str(times)]["accuracy_change"], 4),
            at_most=True,
        )
        for times, limit in RATIOS.items()
    ]
    keep = ("command", "metric", "params_ratio", "macs_ratio", "bytes_ratio", "seconds")
    rows = {
        times: {key: value for key, value in row.items() if key in keep or key.startswith(("accuracy_", "other_"))}
        for times, row in found.items()
    }
    finish(HERE / "results" / "untrained.json", {"methods": METHODS}, rows, bounds)


if __name__ == "__main__":
    main()

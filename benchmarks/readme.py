"""Writes the measured results into README.md, between its markers, from the committed JSON files.

python benchmarks/readme.py            write
python benchmarks/readme.py --check    exit 1 if the README differs from what would be written
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN = "<!-- results:begin (written by benchmarks/readme.py from benchmarks/results/*.json) -->"
END = "<!-- results:end -->"


def demo(found: dict[str, Any]) -> str:
    """The table of the demo's comparison.json."""
    rows = [
        ("parameters", found["params_before"], found["params_after"], found["params_ratio"]),
        ("MACs", found["macs_before"], found["macs_after"], found["macs_ratio"]),
        ("file bytes", found["bytes_before"], found["bytes_after"], found["bytes_ratio"]),
    ]
    lines = [f"| {name} | {before:,} | {after:,} | {ratio:.1f}x |" for name, before, after, ratio in rows]
    lines.append(
        f"| milliseconds, batch {found['batch']}, each in its fastest layout | {found['best_ms_before']:.1f} "
        f"| {found['best_ms_after']:.1f} | {found['speedup_best']:.1f}x |"
    )
    lines.append(
        f"| test accuracy, n = {found['accuracy_n_after']:,} | {found['accuracy_before']:.3f} "
        f"| {found['accuracy_after']:.3f} | {found['accuracy_change']:+.3f} |"
    )
    return "\n".join(["`make demo`, untrained after compression:", "", *_head("", "before", "after", "change"), *lines])


def _head(*names: str) -> list[str]:
    return [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {"demo.json": demo}
"""Which committed files are shown, in this order, and how; a missing file is left out."""


def written(readme: str) -> str:
    """The README with its results replaced by what the committed files say."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    shown = [
        show(json.loads((RESULTS / name).read_text())) for name, show in SECTIONS.items() if (RESULTS / name).exists()
    ]
    return "\n".join([before + BEGIN, *(f"\n{section}\n" for section in shown), END + after])


def main() -> int:
    """Write or check."""
    path = ROOT / "README.md"
    old = path.read_text()
    new = written(old)
    if "--check" in sys.argv[1:]:
        return int(old != new)
    path.write_text(new)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

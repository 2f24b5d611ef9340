"""Writes the measured results from the committed JSON files into README.md and docs/measured.md, between markers.

    benchmarks/results/demo.json           comparison.json of `taut demo`: into the README
    */results/*.json with "bounds"         limits beside what was measured: into docs/measured.md

    python benchmarks/readme.py            write
    python benchmarks/readme.py --check    exit 1 if a page differs from what would be written

Numbers are never typed into these pages by hand.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BEGIN = "<!-- results:begin (written by benchmarks/readme.py from committed JSON) -->"
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
        f"| milliseconds, batch {found['batch']}, each in its fastest runtime | {found['best_ms_before']:.1f} "
        f"| {found['best_ms_after']:.1f} | {found['speedup_best']:.1f}x |"
    )
    lines.append(
        f"| test accuracy, n = {found['accuracy_n_after']:,} | {found['accuracy_before']:.3f} "
        f"| {found['accuracy_after']:.3f} | {found['accuracy_change']:+.3f} |"
    )
    return "\n".join(["`make demo`, untrained after compression:", "", *_head("", "before", "after", "change"), *lines])


def bounds(name: str, found: dict[str, Any]) -> str:
    """The stated limits of a result file beside what was measured; a limit that does not hold is said in bold."""
    rows = [
        f"| {bound['name']} | {'at most' if bound['at_most'] else 'at least'} {bound['limit']:g} "
        f"| {bound['found']:.4g} | {'yes' if bound['holds'] else '**no**'} |"
        for bound in found["bounds"]
    ]
    return "\n".join([f"`{name}`:", "", *_head("what", "limit", "measured", "holds"), *rows])


def _head(*names: str) -> list[str]:
    return [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]


def _machine(found: dict[str, Any]) -> str:
    machine = found["environment"]
    return f"{machine['cpu']}, {machine['cores']} cores, torch {machine['versions']['torch']}"


def sections() -> tuple[list[str], list[str]]:
    """What the committed files say: the demo; and every file that tested a bound."""
    files = sorted([*ROOT.glob("benchmarks/results/*.json"), *ROOT.glob("experiments/*/results/*.json")])
    found = {path: json.loads(path.read_text()) for path in files}
    shown = [demo(content) for path, content in found.items() if path.name == "demo.json"]
    tested = {path: content for path, content in found.items() if content.get("bounds")}
    limits = [bounds(path.relative_to(ROOT).as_posix(), content) for path, content in tested.items()]
    machines = sorted({_machine(content) for content in tested.values()})
    return shown, [*limits, *([f"Measured on: {'; '.join(machines)}."] if machines else [])]


def written(page: str, shown: list[str]) -> str:
    """A page with its results replaced."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return "\n".join([before + BEGIN, *(f"\n{section}" for section in shown), "", END + after])


def main() -> int:
    """Write or check."""
    for path, shown in zip((ROOT / "README.md", ROOT / "docs" / "measured.md"), sections(), strict=True):
        old = path.read_text()
        new = written(old, shown)
        if "--check" in sys.argv[1:] and old != new:
            return 1
        if old != new:
            path.write_text(new)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

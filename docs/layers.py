"""Writes the table of layers in architecture.md from pyproject.toml and the first lines of the packages.

.venv/bin/python docs/layers.py [--check]
"""

from __future__ import annotations

import ast
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"
START, END = "<!-- layers -->\n", "<!-- end of layers -->\n"


def first_line(module: str) -> str:
    """The first sentence of a module's docstring."""
    place = ROOT / "src" / "taut" / module
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    text = (ast.get_docstring(ast.parse(file.read_text())) or "").splitlines()[0]
    return text.split(". ")[0].rstrip(".")


def table() -> str:
    """Markdown, from the top layer to the lowest."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = next(one["layers"] for one in settings["contracts"] if one["containers"] == ["taut"])
    rows = [f"| `{name}` | {first_line(name)} |" for layer in layers for name in layer.split(" | ")]
    return "\n".join(["| layer | what it is |", "|---|---|", *rows, ""])


def main() -> int:
    """Write, or with --check say whether there is anything to write."""
    page = PAGE.read_text()
    before, rest = page.split(START)
    new = f"{before}{START}{table()}{END}{rest.split(END)[1]}"
    if "--check" in sys.argv[1:]:
        return int(new != page)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())

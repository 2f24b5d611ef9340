"""How numbers and tables are written, everywhere the same."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

GAP = 3
"""Between two columns."""

LAST = 48
"""What the last column of a wide table gets at least, where it is so long."""


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = (), width: int = 160) -> str:
    """A plain-text table; the columns whose index is in `right` are right-aligned, the last one wraps.

    It is as wide as all columns but the last need: no digit is cut, wherever it is printed.
    """
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, header in enumerate(headers):
        last = index == len(headers) - 1
        grid.add_column(header, justify="right" if index in right else "left", no_wrap=not last, overflow="fold")
    for row in rows:
        grid.add_row(*(Text(str(cell)) for cell in row))
    out = StringIO()
    columns = list(zip(headers, *rows, strict=True))
    fixed = sum(max(cell_len(str(cell)) for cell in column) + GAP for column in columns[:-1])
    needed = fixed + min(LAST, max(cell_len(str(cell)) for cell in columns[-1]))
    Console(file=out, width=max(width, needed), color_system=None, legacy_windows=False).print(grid)
    return "\n".join(line.rstrip() for line in out.getvalue().strip("\n").splitlines())


def count(n: float) -> str:
    """A count in at most five characters: 950, 12.3k, 4.56M, 15.5G."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= 0.9995 * size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.0f}"


def numbered(amount: int, noun: str) -> str:
    """A number with its noun: 1 layer, 2 layers."""
    return f"{amount} {noun}" if amount == 1 else f"{amount} {noun}s"


def fold(before: float, after: float) -> str:
    """How many times smaller: 4.00x."""
    return "-" if not after else f"{before / after:.3g}x"


def shape(sizes: Sequence[int]) -> str:
    """Sizes joined as 64x3x3x3."""
    return "x".join(str(size) for size in sizes)


def some(names: Sequence[str], most: int = 3) -> str:
    """The first of many names, each in quotes."""
    return ", ".join(f"'{name}'" for name in names[:most]) + (", ..." if len(names) > most else "")


def brief(value: object, most: int = 60) -> str:
    """A value as messages show it, cut to `most` letters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= most else text[: most - 3] + "..."


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A hook for `json.loads` that refuses an object with the same key twice.

    Raises:
        ValueError: a key is repeated.
    """
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key '{next(key for key in keys if keys.count(key) > 1)}' is repeated")
    return result

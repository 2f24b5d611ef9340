"""A grid of runs (settings x seeds), each finished one a line of a file: started again, only the missing ones run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from taut.errors import CallError
from taut.files import guarded
from taut.progress import stage

Cell = dict[str, Any]
"""Settings of one run: plain data, its identity."""


def cells(**axes: Iterable[Any]) -> list[Cell]:
    """Every combination of the values of the axes, the last axis fastest."""
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def run_grid(
    wanted: Iterable[Cell], work: Callable[[Cell], Mapping[str, Any]], path: Path, title: str = "runs", mark: str = ""
) -> list[dict[str, Any]]:
    """The results of all wanted cells, in their order; those that `path` holds are not run again.

    Args:
        wanted: settings that JSON can carry.
        work: cell -> results that JSON can carry.
        path: JSON lines, one for every finished run, flushed to the disk; a line torn by a kill is dropped.
        title: shown beside the progress.
        mark: of everything else that the results depend on, such as versions and constants; lines of another one do
            not count.

    Returns:
        One dict per cell: its settings and its results.

    Raises:
        CallError: a cell or a result is no plain data, or results use the name of a setting.
    """
    wanted = list(wanted)
    known = _read(path, mark)
    missing = [cell for cell in wanted if _key(cell) not in known]
    with stage(title, len(wanted)) as bar:
        bar(len(wanted) - len(missing))
        for cell in missing:
            found = dict(work(dict(cell)))
            if set(found) & set(cell):
                raise CallError(f"A result may not be named like a setting: {sorted(set(found) & set(cell))}.")
            known[_key(cell)] = cell | found
            _append(path, cell, found, mark)
            bar()
    return [known[_key(cell)] for cell in wanted]


def _key(cell: Cell) -> str:
    try:
        return json.dumps(cell, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CallError(f"The settings of a run must be plain data: {error}. Got {cell!r:.100}.") from None


def _read(path: Path, mark: str) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    known = {}
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
            if record["mark"] == mark:
                known[_key(record["settings"])] = record["settings"] | record["results"]
        except (ValueError, KeyError, TypeError):
            continue
    return known


def _append(path: Path, cell: Cell, found: Mapping[str, Any], mark: str) -> None:
    try:
        line = json.dumps({"mark": mark, "settings": cell, "results": dict(found)}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CallError(f"The results of a run must be plain, finite data: {error}. Got {found!r:.100}.") from None
    with guarded(f"Cannot write '{path}'"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            torn = file.tell() and not path.read_bytes().endswith(b"\n")
            file.write((b"\n" if torn else b"") + line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

"""A grid of runs (settings x seeds), each finished one a line of a file: started again, only the missing ones run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from taut.core.atomic_folder import recover
from taut.core.files import guarded
from taut.core.progress import stage
from taut.core.workers import Jobs, check_jobs, finished
from taut.errors import CallError

Cell = dict[str, Any]
"""Settings of one run: plain data, its identity."""


def cells(**axes: Iterable[Any]) -> list[Cell]:
    """Every combination of the values of the axes, the last axis fastest."""
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def run_grid(
    wanted: Iterable[Cell],
    work: Callable[[Cell], Mapping[str, Any]],
    path: Path,
    title: str = "runs",
    mark: str = "",
    jobs: Jobs = 1,
) -> list[dict[str, Any]]:
    """The results of all wanted cells, in their order; those that `path` holds are not run again.

    Args:
        wanted: settings that JSON can carry.
        work: cell -> results that JSON can carry. With several jobs it is sent to other processes: a function at the
            top level of a module that they can import (modules beside a study's run.py are, for `sys.path` goes
            along), or `functools.partial` of one with plain arguments. What run.py itself defines is not: its module
            has a name in the first process only. Where cloudpickle is installed, all functions go.
        path: JSON lines, one for every finished run, flushed to the disk; a line torn by a kill is dropped.
        title: shown beside the progress.
        mark: of everything else that the results depend on, such as versions and constants; lines of another one do
            not count.
        jobs: how many runs at a time, each in a process of its own with one thread; 1 stays in this process. Or a
            `concurrent.futures.Executor` that runs them, here or on other machines. What a killed worker was at is
            done again by another, twice at most. Only this process writes `path`; a kill or Ctrl-C loses the runs in
            progress and no others.

    Returns:
        One dict per cell: its settings and its results, the same in the same order whoever works; with 1 job and
        several threads torch rounds sums otherwise.

    Raises:
        CallError: a cell or a result is no plain data, results use the name of a setting, `jobs` is neither a
            positive number nor an executor, or `work` cannot be sent to other processes.
        DataError: a worker was lost, for example because memory ran out; the message says in which run.
    """
    check_jobs(jobs, " of a grid")
    wanted = list(wanted)
    known = _read(recover(path.parent) / path.name, mark)
    missing = list({key: cell for cell in wanted if (key := _key(cell)) not in known}.values())
    results = finished(partial(_checked, work), missing, jobs)
    with stage(title, len(wanted)) as bar, closing(results):
        bar(len(wanted) - len(missing))
        for place, found in results:
            cell = missing[place]
            known[_key(cell)] = cell | found
            _append(path, cell, found, mark)
            bar()
    return [known[_key(cell)] for cell in wanted]


def _checked(work: Callable[[Cell], Mapping[str, Any]], cell: Cell) -> dict[str, Any]:
    """The results of a run, once it is sure that they can be written."""
    found = dict(work(dict(cell)))
    if set(found) & set(cell):
        raise CallError(f"A result may not be named like a setting: {sorted(set(found) & set(cell))}.")
    try:
        json.dumps(found, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CallError(f"The results of a run must be plain, finite data: {error}. Got {found!r:.100}.") from None
    return found


def _key(cell: Cell) -> str:
    try:
        return json.dumps(cell, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CallError(f"The settings of a run must be plain data: {error}. Got {cell!r:.100}.") from None


def _read(path: Path, mark: str) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    known = {}
    with guarded(f"Cannot read '{path}'"):
        lines = path.read_bytes().splitlines()
    for line in lines:
        try:
            record = json.loads(line)
            if record["mark"] == mark:
                known[_key(record["settings"])] = record["settings"] | record["results"]
        except (ValueError, KeyError, TypeError):
            continue
    return known


def _append(path: Path, cell: Cell, found: Mapping[str, Any], mark: str) -> None:
    line = json.dumps({"mark": mark, "settings": cell, "results": found})
    with guarded(f"Cannot write '{path}'"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            torn = file.tell() and not path.read_bytes().endswith(b"\n")
            file.write((b"\n" if torn else b"") + line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

"""A study of one model: methods x sizes x seeds, each run made, trained, measured and saved; resumable, in parallel.

OUT/runs.jsonl, latency.jsonl   finished runs, one a line; started again, only missing ones are made
OUT/models/NAME                 the models, as `taut.save` writes them
OUT/study.csv                   a row for every run
OUT/table.md, pareto.svg        means over the seeds
OUT/study.json                  the same with the environment it was measured in
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from taut.artifact.manifest import taut_version
from taut.core.atomic_folder import rehearse_within
from taut.core.data import collect
from taut.core.files import guarded, write_atomic
from taut.core.fingerprint import fingerprint
from taut.core.workers import Jobs, check_jobs
from taut.errors import CallError
from taut.measure.accuracy import measure
from taut.recovery.samples import SAMPLES
from taut.structure.keeping import shares_of
from taut.structure.tracing import trace
from taut.studies import sheets
from taut.studies.grid import run_grid
from taut.studies.making import Run, Source, Subject, Timing, opened
from taut.studies.results import cpu_model, write_results
from taut.studies.rows import Row
from taut.studies.wishes import Grid
from taut.training.loop import require_training

RUNS, LATENCY, MODELS = "runs.jsonl", "latency.jsonl", "models"
SHEET, TABLE, PICTURE, RESULTS = "study.csv", "table.md", "pareto.svg", "study.json"


def study(source: Source, out: str | Path, grid: Grid | None = None, jobs: Jobs = 1) -> tuple[Row, ...]:
    """Run a grid of methods, sizes and seeds on a model, and write down what each run costs and is worth.

    With several jobs runs are made in processes of their own. Latency is always measured afterwards, in this one, one
    model after the other: other work would disturb it.

    Args:
        source: builds the model and its task; with several jobs a function that other processes can import.
        out: a folder; the finished runs in it count if they belong to the same model, task, training and versions.
        grid: what to run; None for its defaults.
        jobs: how many runs at a time, or a `concurrent.futures.Executor` that runs them, as in `run_grid`; on other
            machines `out` must be the same folder.

    Returns:
        A row for every run, the original and the controls first.

    Raises:
        CallError: no such method or setting, the training has no data, or `out` is a file.
        DataError: `evaluate` or the training data cannot be used, or a worker was lost.
        ModelError: the model cannot be run.
        ArtifactError: the folder cannot be written, or a model that it should hold is gone.
    """
    check_jobs(jobs)
    grid, folder = grid or Grid(), Path(out)
    rehearse_within(folder)
    opened.cache_clear()  # what the source builds may have changed
    subject = opened(source)
    _check(subject, grid)
    with guarded(f"Cannot write '{folder}'"):
        folder.mkdir(parents=True, exist_ok=True)
    asked: tuple[Any, ...] = (subject.identity, grid.epochs, taut_version(), torch.__version__)
    mark = fingerprint(subject.model, None, (*asked, dict(grid.keep)) if grid.keep else asked)
    run = Run(source, subject.state, grid.epochs, (folder / MODELS).absolute(), mark, grid.keep)
    found = run_grid(grid.cells(), run, folder / RUNS, "runs", mark, jobs)
    times = _timed(found, Timing(source, folder / MODELS), mark, folder)
    rows = tuple(Row(**(each | times.get(each.get("model", ""), {}))) for each in found)
    _write(folder, rows, asdict(grid) | {"jobs": jobs if isinstance(jobs, int) else type(jobs).__name__})
    return rows


def _check(subject: Subject, grid: Grid) -> None:
    """What can be known to fail is said before anything is run."""
    if grid.epochs is not None:
        require_training()
    example = trace(subject.model, subject.example).example
    shares_of(subject.model, grid.keep)
    if subject.data is not None:
        collect(example, subject.data(), SAMPLES)
    measure(subject.evaluate, subject.model)
    if grid.epochs is not None:
        if subject.training is None:
            raise CallError("Training needs data: the subject of the study has none.")
        subject.training()


def _timed(found: Sequence[Mapping[str, Any]], timing: Timing, mark: str, folder: Path) -> dict[str, dict[str, float]]:
    """Milliseconds and speedup by model; on another processor, or with other threads, all are measured again."""
    names = [each["model"] for each in found if "model" in each]
    path, here = folder / LATENCY, fingerprint(nn.Module(), None, (mark, cpu_model(), torch.get_num_threads()))
    times = run_grid(({"model": name} for name in names), timing, path, "timing", here)
    return {name: {"ms": each["ms"], "speedup": each["speedup"]} for name, each in zip(names, times, strict=True)}


def _write(folder: Path, rows: Sequence[Row], settings: Mapping[str, Any]) -> None:
    write_atomic(folder / SHEET, sheets.to_csv(rows).encode())
    write_atomic(folder / TABLE, sheets.to_markdown(rows).encode())
    if find_spec("matplotlib") is not None:
        write_atomic(folder / PICTURE, sheets.draw(rows))
    write_results(folder / RESULTS, settings, [asdict(row) for row in rows], ())

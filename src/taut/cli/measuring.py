"""`taut evaluate` and `taut benchmark`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import taut
from taut.cli import models, signals, tasks
from taut.cli.options import Base, ModelArgument, TaskFile, Weights
from taut.cli.output import show
from taut.core import text

if TYPE_CHECKING:
    from torch import nn

    from taut.measure import Score


def evaluate(model: ModelArgument, task: TaskFile, weights: Weights = None, base: Base = None) -> None:
    """Print the task's metric of a model, with a 95 % interval where the number of samples is known."""
    tasks.require(task)
    models.require(model, weights, base)
    from taut.measure import measure

    job = tasks.read(task)
    metric = job.required_evaluate("evaluate")
    net = models.load(model, weights, base)
    signals.work_begins()
    taut.trace(net, job.example)
    score = measure(metric, net)
    show(_shown(score))
    for name, value in score.others.items():
        show(f"{name} {value:.4f}")


def benchmark(
    model: ModelArgument,
    task: TaskFile,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL2", help="A second model, measured in turns with the first.")
    ] = None,
    weights: Weights = None,
    against_weights: Annotated[Path | None, typer.Option(help="Weights of MODEL2.")] = None,
    base: Base = None,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Rounds of timing; 60 if left out, more of fast models, fewer of slow ones."),
    ] = None,
) -> None:
    """Print the latency of a model on the task's example, alone or against a second one."""
    tasks.require(task)
    models.require(model, weights, base or _base(model, against))
    if against is not None:
        models.require(against, against_weights, base or _base(against, model))
    job = tasks.read(task)
    net = models.load(model, weights, base or _base(model, against))
    signals.work_begins()
    taut.trace(net, job.example)
    if against is None:
        show(_alone(net, job, rounds))
        return
    other = models.load(against, against_weights, base or _base(against, model))
    taut.trace(other, job.example)
    from taut.artifact.comparison import UNJUDGED

    said = str(taut.compare(net, other, None, job.example, rounds=rounds))
    if job.evaluate is not None:
        said = said.replace(
            UNJUDGED, "Costs and times alone: `taut evaluate` asks the task's evaluate(model) of either."
        )
    show(said)


def _base(model: str, other: str | None) -> str | None:
    """A saved folder beside a factory is most likely built from it."""
    return other if other is not None and models.is_folder(model) and not models.is_folder(other) else None


def _alone(net: nn.Module, job: tasks.Task, rounds: int | None) -> str:
    from taut.measure import busy_note, model_times
    from taut.structure.calling import read_example

    example = read_example(net, job.example)
    times = model_times(net, example, rounds)
    rows = [
        (name, f"{ms.value:.3g}", f"[{ms.low:.3g}, {ms.high:.3g}]", f"{1e3 * example.batch / ms.value:.4g}")
        for name, ms in times.runtimes.items()
    ]
    rows += [(name, "-", "", reason) for name, reason in times.skipped.items()]
    headers = (f"batch {example.batch}", "ms", "99 % interval", "samples per second")
    notes = busy_note({name: ms.apart for name, ms in times.runtimes.items()})
    return "\n".join((text.table(headers, rows, right=(1, 2, 3)), *notes))


def _shown(score: Score) -> str:
    interval = "" if score.low is None or score.high is None else f" [{score.low:.4f}, {score.high:.4f}]"
    samples = "" if score.n is None else f", n = {score.n}"
    return f"{score.name} {score.value:.4f}{interval}{samples}"

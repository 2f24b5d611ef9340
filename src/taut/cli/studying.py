"""`taut study`: methods x sizes x seeds on one model, as a table."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from taut.cli import models, signals, tasks
from taut.cli.options import Base, KeepNames, ModelArgument, OutputText, TaskFile, Weights
from taut.cli.output import say, show
from taut.errors import TautError

if TYPE_CHECKING:
    from taut.studies.making import Subject


@dataclass(frozen=True)
class Asked:
    """What the command line names; other processes build the model and its task from it.

    Attributes:
        model, weights, base, task, output: the arguments.
    """

    model: str
    weights: Path | None
    base: str | None
    task: Path
    output: str = "auto"

    def __call__(self) -> Subject:
        """The model and its task."""
        from taut.studies.making import Subject

        job = tasks.read(self.task)
        metric = job.required_evaluate("study")
        net = models.load(self.model, self.weights, self.base)
        identity = f"{self.model} {sha256(self.task.read_bytes()).hexdigest()}"
        data = None if job.calibration is None else job.data
        identity = identity if self.output == "auto" else f"{identity} {self.output}"
        return Subject(net, job.example, metric, data, job.training, job.loss, identity, self.output, job.mask)


def study(
    model: ModelArgument,
    task: TaskFile,
    out: Annotated[Path, typer.Option(help="Folder for tables and models; run again, only missing runs are made.")],
    weights: Weights = None,
    base: Base = None,
    methods: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help='Names (`taut methods`), with settings as "tucker(metric=fisher)"; auto: the default ones together.',
        ),
    ] = "auto,magnitude",
    sizes: Annotated[
        str, typer.Option(metavar="FRACTION,...", help="What is kept of the parameters; of the weights, if pruned.")
    ] = "0.5,0.25,0.125",
    keep: KeepNames = None,
    output: OutputText = None,
    seeds: Annotated[int, typer.Option(min=1, help="How often each run is repeated.")] = 1,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Train every model that long, the uncompressed control too.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, each in a process of its own.")] = 1,
) -> None:
    """Run methods x sizes x seeds on a model, and write what each result costs and is worth."""
    tasks.require(task)
    models.require(model, weights, base)
    from taut.recipe import checked
    from taut.studies import studying
    from taut.studies.wishes import CONTROL, ORIGINAL, Grid, read_sizes, split
    from taut.types.keep import parse_keep

    grid = Grid(split(methods), read_sizes(sizes), seeds, epochs, parse_keep(keep or ()))
    signals.work_begins()
    try:
        asked = Asked(model, weights, base, task, "auto" if output is None else checked(output))
        rows = studying.study(asked, out, grid, jobs)
    except KeyboardInterrupt:
        signals.advise(f"The same command goes on: finished runs are kept in {out}.")
        raise
    show((out / studying.TABLE).read_text())
    name = studying.PICTURE
    picture = f", the picture {name}" if (out / name).exists() else "; a picture needs pip install 'taut[report]'"
    say(f"All runs are in {out}{picture}.")
    compressed = [row for row in rows if row.method not in {ORIGINAL, CONTROL}]
    if all(row.reason for row in compressed):
        reasons = dict.fromkeys(f"{row.method}: {row.reason}" for row in compressed)
        raise TautError(f"No run of the study made a model. {next(iter(reasons))}")

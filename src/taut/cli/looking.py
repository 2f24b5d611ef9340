"""`taut inspect` and `taut methods`: what there is."""

from __future__ import annotations

from typing import Annotated

import typer

import taut
from taut.cli import models, tasks
from taut.cli.listing import method_rows
from taut.cli.options import Base, ModelArgument, TaskFile, Weights
from taut.cli.output import show
from taut.core import text


def inspect(
    model: ModelArgument,
    task: TaskFile,
    weights: Weights = None,
    base: Base = None,
    as_json: Annotated[bool, typer.Option("--json", help="All of it as JSON, for programs.")] = False,
) -> None:
    """Print what can be done to every layer, what stands in the way, and what to change."""
    tasks.require(task)
    models.require(model, weights, base)
    net, job = models.load(model, weights, base), tasks.read(task)
    inspection = taut.inspect(net, job.example, job.data())
    show(inspection.to_json() if as_json else inspection)


def methods() -> None:
    """List the methods, and which of them are tried unasked."""
    show(text.table(("method", "tried", "what it does"), method_rows()))

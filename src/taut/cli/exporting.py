"""`taut export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import taut
from taut.cli import models, signals, tasks
from taut.cli.options import Base, ModelArgument, TaskFile, Weights
from taut.cli.output import show


def export(
    model: ModelArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What to write: *.onnx, or *.xml for OpenVINO.")],
    task: TaskFile,
    weights: Weights = None,
    base: Base = None,
) -> None:
    """Write a model for another runtime, and check there that it computes the same; else nothing is written."""
    tasks.require(task)
    models.require(model, weights, base)
    from taut.artifact.exporting import check_target

    check_target(file)
    net, example = models.load(model, weights, base), tasks.read(task).example
    signals.work_begins()
    show(taut.export(net, example, file))

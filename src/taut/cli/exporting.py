"""`taut export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import taut
from taut.artifact.exporting import check_target
from taut.cli import models, tasks
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
    check_target(file)
    show(taut.export(models.load(model, weights, base), tasks.read(task).example, file))

"""`taut inspect` and `taut methods`: what there is."""

from __future__ import annotations

import taut
from taut.cli import models, tasks
from taut.cli.listing import method_rows
from taut.cli.options import Base, ModelArgument, TaskFile, Weights
from taut.cli.output import show
from taut.core import text


def inspect(model: ModelArgument, task: TaskFile, weights: Weights = None, base: Base = None) -> None:
    """Print every layer with its cost, and why it is skipped if no method may touch it."""
    tasks.require(task)
    models.require(model, weights, base)
    show(taut.trace(models.load(model, weights, base), tasks.read(task).example))


def methods() -> None:
    """List the methods, and which of them are tried unasked."""
    rows = [(name, "default" if default else "on request", summary) for name, default, summary in method_rows()]
    show(text.table(("method", "tried", "what it does"), rows))

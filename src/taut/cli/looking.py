"""`taut inspect` and `taut methods`: what there is."""

from __future__ import annotations

import inspect as reflection
from typing import Any

import taut
from taut.cli import models, tasks
from taut.cli.options import Base, ModelArgument, TaskFile, Weights
from taut.cli.output import show
from taut.core import text
from taut.methods import METHODS


def inspect(model: ModelArgument, task: TaskFile, weights: Weights = None, base: Base = None) -> None:
    """Print every layer with its cost, and why it is skipped if no method may touch it."""
    show(taut.trace(models.load(model, weights, base), tasks.read(task).example))


def methods() -> None:
    """List the methods, and which of them are tried unasked."""
    rows = [(name, "default" if kind.default else "on request", _summary(kind)) for name, kind in METHODS.items()]
    show(text.table(("method", "tried", "what it does"), rows))


def _summary(kind: type[Any]) -> str:
    return (reflection.getdoc(kind) or "").partition("\n")[0]

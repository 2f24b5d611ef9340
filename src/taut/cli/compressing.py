"""`taut compress` and `taut explore`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from torch import nn

import taut
from taut.checkpoint import check_folder
from taut.cli import models, tasks
from taut.cli.options import Base, BudgetText, MethodNames, ModelArgument, RecipeFile, Seed, TaskFile, Weights
from taut.cli.output import say, show
from taut.errors import BudgetError, CallError
from taut.methods import choose
from taut.recipe import Recipe


def explore(
    model: ModelArgument,
    task: TaskFile,
    weights: Weights = None,
    base: Base = None,
    recipe: RecipeFile = None,
    methods: MethodNames = None,
    seed: Seed = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the measured points; run again, only missing ones are measured.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the front into this image file (.svg, .png).")] = None,
) -> None:
    """Measure what a model can become, from 1x to 16x smaller; nothing is chosen or saved."""
    wish = _wish(recipe, None, methods, seed)
    front = _front(models.load(model, weights, base), tasks.read(task), wish, out)
    show(front)
    if plot is not None:
        front.plot(plot)
        say(f"The plot is in {plot}.")


def compress(
    model: ModelArgument,
    task: TaskFile,
    budget: BudgetText = None,
    out: Annotated[Path, typer.Option(help="Folder for the result; a missing or empty one, or one of taut's.")] = Path(
        "taut-small"
    ),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into --out whatever it holds.")] = False,
    weights: Weights = None,
    base: Base = None,
    recipe: RecipeFile = None,
    methods: MethodNames = None,
    seed: Seed = None,
) -> None:
    """Compress a model to a budget and save it. Without a budget: show what is possible, change nothing."""
    wish = _wish(recipe, budget, methods, seed)
    if wish.budget is not None:
        _check(out, overwrite)
    net, job = models.load(model, weights, base), tasks.read(task)
    if wish.budget is None:
        show(_front(net, job, wish, None))
        say("No budget was given, so nothing was changed. Choose a row, and say for example --budget macs=0.25.")
        return
    try:
        result = taut.compress(
            net,
            job.example,
            budget=wish.budget,
            data=job.data(),
            evaluate=job.evaluate,
            methods=wish.methods,
            seed=wish.seed,
        )
    except BudgetError as error:
        if isinstance(error.best, taut.Result):
            _finish(error.best, job, out, overwrite)
            say(f"The closest result is saved in {out}, although it does not meet the budget.")
        raise
    _finish(result, job, out, overwrite)


def _check(out: Path, overwrite: bool) -> None:
    """Whether the folder can be written, before the long work."""
    try:
        check_folder(out, overwrite=overwrite)
    except CallError as error:
        raise CallError(str(error).replace("overwrite=True", "--overwrite")) from None


def _finish(result: taut.Result, job: tasks.Task, out: Path, overwrite: bool) -> None:
    result.save(out, overwrite=overwrite)
    show(result.plan, result.comparison, f"Saved in {out}")
    _unchecked(job)


def _front(net: nn.Module, job: tasks.Task, wish: Recipe, folder: Path | None) -> taut.Front:
    _unchecked(job)
    return taut.explore(
        net,
        job.example,
        data=job.data(),
        evaluate=job.evaluate,
        methods=wish.methods,
        seed=wish.seed,
        folder=folder,
    )


def _unchecked(job: tasks.Task) -> None:
    """What the numbers do not prove is said beside them."""
    if job.evaluate is None:
        say(f"'{job.path}' defines no evaluate(model): only costs and the layers' outputs were checked, no accuracy.")
    if job.calibration is None:
        say(f"'{job.path}' defines no calibration(): the weights alone decided, and nothing was refitted.")


def _wish(recipe: Path | None, budget: str | None, methods: str | None, seed: int | None) -> Recipe:
    """The recipe, overridden by the options that were given."""
    written = Recipe() if recipe is None else Recipe.read(recipe)
    names = None if methods is None else [name.strip() for name in methods.split(",")]
    return Recipe(
        budget=written.budget if budget is None else taut.Budget.parse(budget),
        methods=written.methods if names is None else choose(names),
        seed=written.seed if seed is None else seed,
    )

"""`taut compress`, `taut resume` and `taut explore`."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import taut
from taut.cli import models, signals, tasks, unfinished
from taut.cli.options import (
    Base,
    BudgetText,
    Compare,
    KeepNames,
    MethodNames,
    ModelArgument,
    OutputText,
    RecipeFile,
    Seed,
    TaskFile,
    Weights,
)
from taut.cli.output import say, show
from taut.core.atomic_folder import rehearse, rehearse_within
from taut.core.files import NEW
from taut.errors import CallError, TautError

if TYPE_CHECKING:
    from torch import nn

    from taut.measure.timing import Timing
    from taut.recipe import Recipe, Training
    from taut.types.budget import Budget


def explore(
    model: ModelArgument,
    task: TaskFile,
    weights: Weights = None,
    base: Base = None,
    recipe: RecipeFile = None,
    methods: MethodNames = None,
    keep: KeepNames = None,
    output: OutputText = None,
    compare: Compare = None,
    seed: Seed = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the measured points; run again, only missing ones are measured.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the front into this image file (.svg, .png).")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Points at a time, each in a process of its own.")] = 1,
) -> None:
    """Measure what a model can become, from 1x to 16x smaller; nothing is chosen or saved."""
    _require(model, task, weights, base, recipe)
    wish = _wish(recipe, None, methods, seed, compare, keep, output)
    if plot is not None:
        from taut.search.front import check_plot

        check_plot(plot)
        rehearse_within(plot.parent, NEW + plot.name)
    net, job = models.load(model, weights, base), tasks.read(task)
    signals.work_begins()
    try:
        front = _front(net, job, wish, out, jobs)
    except KeyboardInterrupt:
        if out is not None:
            signals.advise(f"The same command goes on: the points that were measured are kept in {out}.")
        else:
            signals.advise("With --out FOLDER the points that are measured are kept, and the same command goes on.")
        raise
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
    keep: KeepNames = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Train the result that long (train_loader(), valid_loader(), loss).")
    ] = None,
    cascade: Annotated[bool, typer.Option("--cascade", help="With --epochs: layer by layer, front to back.")] = False,
    control: Annotated[
        bool, typer.Option(" /--no-control", help="With --epochs: do not train the original equally, to compare with.")
    ] = True,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Measure each layer's damage before planning: slower, often better.")
    ] = False,
    align: Annotated[
        int | None, typer.Option(min=1, help="Every rank a multiple of this; 16 is faster on CPUs. [default: 1]")
    ] = None,
    output: OutputText = None,
    compare: Compare = None,
    seed: Seed = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="Candidates at a time, each in a process of its own: of a budget of drop alone.")
    ] = 1,
) -> None:
    """Compress a model to a budget and save it. Without a budget: show what is possible, change nothing."""
    wanted = _budget(budget)
    _require(model, task, weights, base, recipe)
    from taut.recipe import Training

    wish = _wish(recipe, wanted, methods, seed, compare, keep, output)
    if epochs is not None:
        wish = replace(wish, finetune=replace(wish.finetune or Training(), epochs=epochs))
    if cascade:
        if wish.finetune is None:
            raise CallError("--cascade trains layer by layer: say how long with --epochs.")
        wish = replace(wish, finetune=replace(wish.finetune, cascade=True))
    if wish.finetune is not None and not control:
        wish = replace(wish, finetune=replace(wish.finetune, control=False))
    wish = replace(wish, sensitivity=wish.sensitivity or sensitivity, align=align or wish.align)
    if wish.budget is not None:
        _check(out, overwrite)
    net, job = models.load(model, weights, base), tasks.read(task)
    signals.work_begins()
    if wish.budget is None:
        show(_front(net, job, wish, None, jobs))
        say("No budget was given, so nothing was changed. Choose a row, and say for example --budget macs=0.25.")
        return
    _run(net, job, wish, out, overwrite, jobs)


def resume(
    model: ModelArgument,
    task: TaskFile,
    out: Annotated[Path, typer.Option(help="Folder in which `taut compress` was interrupted.")] = Path("taut-small"),
    weights: Weights = None,
    base: Base = None,
) -> None:
    """Go on with a `taut compress` that was interrupted, to the result that it would have had."""
    _require(model, task, weights, base, None)
    wish = unfinished.requested(out)
    _rehearse(out)
    net, job = models.load(model, weights, base), tasks.read(task)
    signals.work_begins()
    _run(net, job, wish, out, overwrite=False)


def _run(net: nn.Module, job: tasks.Task, wish: Recipe, out: Path, overwrite: bool, jobs: int = 1) -> None:
    """Compress, train where that is wished, save; what is interrupted can be resumed."""
    if wish.budget is None:
        raise CallError("The unfinished run names no budget.")
    training, new = _finetune(job, wish.finetune), not models.is_folder(out)
    state = unfinished.begin(out, wish, overwrite=overwrite)
    try:
        result = taut.compress(
            net,
            job.example,
            budget=wish.budget,
            data=job.data(),
            evaluate=job.evaluate,
            finetune=None if training is None else replace(training, folder=state),
            methods=wish.methods,
            keep=wish.keep,
            output=wish.output,
            mask=wish.mask or job.mask,
            sensitivity=wish.sensitivity,
            align=wish.align,
            compare=True if wish.compare is None else wish.compare,
            seed=wish.seed,
            jobs=jobs,
        )
    except (TautError, KeyboardInterrupt) as error:
        _settle(error, job, out, state, new=new)
        raise
    _finish(result, job, out)


def _settle(error: BaseException, job: tasks.Task, out: Path, state: Path, *, new: bool) -> None:
    """Save what was finished when the error came, and say how to go on; without either nothing is left behind."""
    best, finished = getattr(error, "best", None), getattr(error, "result", None)
    if isinstance(best, taut.Result):
        _finish(best, job, out)
        say(f"The closest result is saved in {out}, although it does not meet the budget.")
    elif isinstance(finished, taut.Result):
        finished.save(out, overwrite=True)
        say(f"The model that was finished by then is saved in {out}, without its metric and times.")
        if models.is_folder(state):
            say(f"`taut resume` with the same MODEL, --task and --out {out} goes on with the training.")
        else:
            unfinished.end(out)
    elif isinstance(error, KeyboardInterrupt):
        signals.advise(f"`taut resume` with the same MODEL, --task and --out {out} goes on.")
    elif not models.is_folder(state):  # nothing was trained: there is nothing worth resuming
        unfinished.end(out)
        if new:
            with suppress(OSError):
                out.rmdir()


def _finetune(job: tasks.Task, wish: Training | None) -> taut.Finetune | None:
    if wish is None:
        return None
    train, judge = job.training()
    return taut.Finetune(train, judge, job.loss, wish.schedule, control=wish.control)


def _check(out: Path, overwrite: bool) -> None:
    """Whether the folder can be written, before the long work."""
    if unfinished.only_unfinished(out):
        _rehearse(out)
        return
    from taut.artifact.checkpoint import check_folder

    try:
        check_folder(out, overwrite=overwrite)
    except CallError as error:
        raise CallError(str(error).replace("overwrite=True", "--overwrite")) from None


def _finish(result: taut.Result, job: tasks.Task, out: Path) -> None:
    result.save(out, overwrite=True)  # checked at the start; by now it holds the request
    unfinished.end(out)
    show(result.plan, result.comparison, f"Saved in {out}")
    _unchecked(job)


def _front(net: nn.Module, job: tasks.Task, wish: Recipe, folder: Path | None, jobs: int = 1) -> taut.Front:
    _unchecked(job)
    return taut.explore(
        net,
        job.example,
        data=job.data(),
        evaluate=job.evaluate,
        methods=wish.methods,
        keep=wish.keep,
        output=wish.output,
        mask=wish.mask or job.mask,
        compare="torch" if wish.compare is None else wish.compare,
        seed=wish.seed,
        folder=folder,
        jobs=jobs,
    )


def _unchecked(job: tasks.Task) -> None:
    """What the numbers do not prove is said beside them."""
    if job.evaluate is None:
        say(f"'{job.path}' defines no evaluate(model): only costs and the layers' outputs were checked, no accuracy.")
    if job.calibration is None:
        say(f"'{job.path}' defines no calibration(): the weights alone decided, and nothing was refitted.")


def _rehearse(out: Path) -> None:
    from taut.artifact.manifest import OURS

    rehearse(out, OURS)


def _budget(budget: Budget | str | None) -> Budget | None:
    from taut.types.budget import Budget

    return None if budget is None else Budget.of(budget)


def _require(model: str, task: Path, weights: Path | None, base: str | None, recipe: Path | None) -> None:
    """Find out before torch is imported whether the files that are named are there."""
    tasks.require(task)
    models.require(model, weights, base)
    if recipe is not None and not recipe.is_file():
        raise CallError(f"The recipe '{recipe}' cannot be read: there is no such file.")


def _wish(
    recipe: Path | None,
    budget: Budget | str | None,
    methods: str | None,
    seed: int | None,
    compare: str | None = None,
    keep: list[str] | None = None,
    output: str | None = None,
) -> Recipe:
    """The recipe, overridden by the options that were given."""
    from taut.core.randomness import check_seed
    from taut.methods import choose
    from taut.recipe import Recipe, checked
    from taut.types.keep import parse_keep

    written = Recipe() if recipe is None else Recipe.read(recipe)
    names = None if methods is None else [name.strip() for name in methods.split(",")]
    return replace(
        written,
        budget=_budget(budget) or written.budget,
        methods=written.methods if names is None else choose(names),
        keep=parse_keep(keep) if keep else written.keep,
        output=written.output if output is None else checked(output),
        compare=written.compare if compare is None else _timing(compare),
        seed=written.seed if seed is None else check_seed(seed),
    )


def _timing(word: str) -> Timing:
    timings: dict[str, Timing] = {"all": True, "torch": "torch", "none": False}
    if word not in timings:
        raise CallError(f"--compare is one of {', '.join(timings)}. Got '{word}'.")
    return timings[word]

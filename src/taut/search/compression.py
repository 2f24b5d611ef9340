"""`compress`: the verbs in a row, until the budget holds on the final model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from taut.core.atomic_folder import rehearse
from taut.core.data import collect
from taut.core.example import Mask
from taut.core.modes import quiet
from taut.core.randomness import check_seed
from taut.core.showing import shown
from taut.core.text import brief
from taut.core.workers import Jobs, check_jobs, crew
from taut.errors import BudgetError, CallError, TautError
from taut.measure.runtimes import chosen
from taut.measure.timing import Timing, check_timing
from taut.methods import choose
from taut.planning.application import warn_of_training
from taut.recovery.samples import SAMPLES
from taut.search.candidates import Ahead, Candidates
from taut.search.finishing import Result, controlled, counted, finished
from taut.search.limits import Evaluate, Evaluation, Missed, meet_budget
from taut.search.ranks import Built
from taut.search.session import Session, bare
from taut.structure.answers import Output
from taut.structure.calling import read_example
from taut.structure.keeping import shares_of
from taut.training.control import control_folder
from taut.training.finetuning import Finetune, carry_out, trains
from taut.training.loop import require_training
from taut.training.state import OURS
from taut.types import Budget, BudgetLike, Plan
from taut.types.keep import Keep
from taut.types.method import MethodLike

WIDTH = 3
"""Candidates that an executor is given at a time: two steps of a bisection."""


@shown
def compress(  # noqa: PLR0913 - the call is documented with these
    model: nn.Module,
    example: Any,
    *,
    budget: BudgetLike,
    data: Any = None,
    evaluate: Evaluate | None = None,
    finetune: Finetune | None = None,
    methods: Iterable[MethodLike] | None = None,
    keep: Keep = None,
    output: Output = "auto",
    mask: Mask = None,
    sensitivity: bool = False,
    align: int = 1,
    compare: Timing = True,
    progress: bool | None = None,  # noqa: ARG001 - read by the decorator
    seed: int = 0,
    jobs: Jobs = 1,
) -> Result:
    """One budget in, the best plan out: applied, recovered and measured, as a `taut.Result`.

    Args:
        model: a trained model; it is not changed.
        example: an input that fixes how the model is called and its size.
        budget: what the result may cost: `taut.Budget`, or as it is written: {"macs": 0.5}, "macs=50%,bytes=500kB".
        data: calibration batches, with or without targets; without them the weights alone decide.
        evaluate: `evaluate(model)` -> a float (higher is better), a dict whose first key decides, `taut.Metric` or
            per-sample scores. Needed for `Budget(drop=...)`; use VALIDATION data, never the test split.
        finetune: how to train afterwards (`taut.Finetune`); the best validation weights win, the untrained included.
        methods: names or method objects, names also with settings ({"svd": {"metric": "data"}}). None: "low rank",
            and from 64 calibration samples on channels, too. A rank that is given is the only one on offer.
        keep: layers that are left alone: by name, glob ("head.*"), kind (`nn.Linear` or "Linear"), as the module
            itself, or several of these. Neither their shapes nor their weights change, but by `finetune`, which trains
            what is not frozen. As a mapping with the share that stays, {"head": 1.0, "features.*": 0.5}: so much of
            the layer's weights and multiply-accumulates at least; 1 leaves it alone. The others meet the budget.
        output: what of the model's output counts, and how it is read: "auto", "logits", "probabilities", "sigmoid",
            "values", a part by name, number or path, "part:kind", or a function that picks it (`taut.observe`).
        mask: what says which positions of sequences are real, where their inputs are not called attention_mask or
            *padding_mask: the name of an input, or a function of the inputs (`taut.observe`).
        sensitivity: plan with measured damages (`taut.sensitivity`): slower, better at large ratios. Needs `data`.
        align: every rank is a multiple of it; 16 makes large convolutions a fifth faster on CPUs, at coarser steps.
        compare: what is timed at the end: True: both models in every runtime that is installed; "torch": in torch
            alone; False: nothing, costs are counted and `evaluate` is asked.
        progress: whether it is shown: True, False, or None: on a terminal or in a notebook, once it takes long.
        seed: of everything random; the same seed gives the same bytes, but with a budget of `latency`: times differ.
        jobs: for a budget of `drop` alone: how many candidates are made at a time, each in a process of its own with
            one thread, or a `concurrent.futures.Executor` that makes them. The result is that of 1; with 3
            jobs two steps of the search are one.

    Raises:
        BudgetError: the budget cannot be met; `.best` is the closest Result.
        CallError, DataError, ModelError: see `taut.errors`. One that is raised after a model was made, as out of
            `evaluate` or a loss, carries it as `.result`.
    """
    budget, seed = Budget.of(budget), check_seed(seed)
    check_jobs(jobs)
    methods = None if methods is None else choose(methods)
    _check(budget, evaluate, finetune, compare, measured=sensitivity and data is None)
    model, keep = bare(model), shares_of(model, keep)
    evaluation = None if evaluate is None else Evaluation.of(evaluate, model)
    with quiet(seed):
        call = read_example(model, example, output, mask)
        data = collect(call, data, SAMPLES) if jobs != 1 and data is not None else data
        given = Candidates(model, call, data, methods, keep, evaluation, seed, measured=sensitivity, align=align)
        with _ahead(given, budget, jobs) as ahead:
            session = Session.open(
                model, call, data, methods, keep=keep, measured=sensitivity, align=align, latency=_timed(budget)
            )
            built, missed = meet_budget(session, budget, evaluation, ahead)
        return _answered(session, built, missed, _Asked(budget, evaluation, finetune, compare, seed))


@contextmanager
def _ahead(candidates: Candidates, budget: Budget, jobs: Jobs) -> Iterator[Ahead | None]:
    """Candidates made by workers, where the search is one that can be made in advance."""
    if jobs == 1 or budget.drop is None or budget != Budget(drop=budget.drop):
        yield None
        return
    with crew(candidates, jobs) as results:
        yield Ahead(results, jobs if isinstance(jobs, int) else WIDTH)


@dataclass(frozen=True)
class _Asked:
    """What `compress` was asked for."""

    budget: Budget
    evaluation: Evaluation | None
    finetune: Finetune | None
    timing: Timing
    seed: int


def _answered(session: Session, built: Built, missed: Missed | None, asked: _Asked) -> Result:
    """The built model trained where that is wished, and compared.

    Raises:
        BudgetError: it misses the budget still.
    """
    warn_of_training(session.stats.outputs(session.base), built[0])
    wish, tuned = asked.finetune, None
    if wish is not None:
        with _not_lost(session, built, Exception):
            tuned = _trained(session, *built, wish, asked.seed)
        with _not_lost(session, tuned, Exception):
            built, missed = _chosen(session, built, tuned, asked.budget, asked.evaluation, missed)
    with _not_lost(session, built, BaseException):
        result = finished(session, *built, asked.evaluation, asked.budget, timing=asked.timing)
        if wish is not None and built is tuned:
            result = controlled(session, result, asked.evaluation, wish, asked.seed)
    if missed is not None:
        raise BudgetError(missed.reason, result)
    return result


@contextmanager
def _not_lost(session: Session, built: Built, kinds: type[BaseException]) -> Iterator[None]:
    """Errors of some kinds carry the finished model as `.result`: trained as far as it was, else as it was built."""
    try:
        yield
    except kinds as error:
        small, plan = built
        trained = getattr(error, "result", None)
        if isinstance(trained, nn.Module) and session.cost(trained) == session.cost(small):
            small = trained
        with suppress(TautError):
            error.result = counted(session, small, plan)  # type: ignore[attr-defined] # TautError documents it
            error.add_note("The model that was finished by then is the `.result` of this error.")
        raise


def _chosen(
    session: Session,
    built: Built,
    tuned: Built,
    budget: Budget,
    evaluation: Evaluation | None,
    missed: Missed | None,
) -> tuple[Built, Missed | None]:
    """The trained model, or the untrained one where training broke the budget; and what is missed still."""
    broken = _broken(session, tuned[0], built[0], budget, evaluation)
    if missed is not None and missed.only_drop and broken is None:
        return tuned, None  # training won it back
    if missed is not None or broken is None:
        return tuned, missed
    warnings.warn(f"Training broke the budget of {broken}: the untrained result is kept.", stacklevel=4)
    return built, missed


def _check(
    budget: Budget, evaluate: Evaluate | None, finetune: Finetune | None, timing: Timing, *, measured: bool
) -> None:
    """Refuse before any work what cannot be done; `measured`: damages are to be measured, without data."""
    check_timing(timing)
    if finetune is not None and not isinstance(finetune, Finetune):
        raise CallError(
            "The 'finetune' must be a taut.Finetune, which says on what is trained: taut.Finetune(train, valid, "
            f"loss=..., schedule=(taut.Stage(epochs=5),)). Got {brief(finetune)} instead."
        )
    chosen()  # the runtimes that are asked for are here
    if budget.drop is not None and evaluate is None:
        raise CallError("A budget of 'drop' needs evaluate=: a function of the model, on validation data.")
    if finetune is not None and trains(finetune.schedule):
        require_training()
    if finetune is not None and finetune.folder is not None:
        rehearse(finetune.folder, OURS)
        rehearse(control_folder(finetune.folder), OURS)
    if measured:
        raise CallError("sensitivity=True measures on calibration data: give data=.")


def _timed(budget: Budget) -> float | None:
    """The share of the time to plan for; None where all of it is allowed and nothing else asked for."""
    return None if budget == Budget(latency=1.0) else budget.latency


def _broken(
    session: Session, model: nn.Module, untrained: nn.Module, budget: Budget, evaluation: Evaluation | None
) -> str | None:
    """The first key of the budget that the final model does not hold."""
    limits = budget.limits(session.network.cost)
    if session.cost(model) == session.cost(untrained):
        limits.pop("latency", None)  # of equal shapes: it was timed
    amounts = session.amounts(model, limits)
    for key, limit in limits.items():
        if amounts[key] > limit:
            return key
    if budget.drop is None or evaluation is None:
        return None
    return "drop" if evaluation.score(model).value < evaluation.original.value - budget.drop else None


def _trained(session: Session, small: nn.Module, plan: Plan, wish: Finetune, seed: int) -> tuple[nn.Module, Plan]:
    """The built model trained all at once; or the schedule from the original, where its stages apply the steps."""
    schedule = wish.schedule(plan) if callable(wish.schedule) else wish.schedule
    if schedule is not None and any(stage.steps for stage in schedule):
        return session.trained(plan, replace(wish, schedule=schedule), seed)
    wish = replace(wish, schedule=schedule)
    model, _ = carry_out(small, None, session.stats, wish, teacher=session.original, seed=seed)
    return model, plan

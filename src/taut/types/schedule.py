"""A schedule: which steps of a plan are applied when, and what is trained in between; plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import ClassVar, Literal

from pydantic import ConfigDict

from taut.errors import CallError
from taut.types.budget import FORBID
from taut.types.method import METHODS
from taut.types.plan import Plan, Step

Trained = Literal["all", "above", "none"]
OPTIMIZERS = ("adam", "adamw", "sgd")


@dataclass(frozen=True)
class Stage:
    """Apply some steps of a plan, then train.

    Attributes:
        steps: positions in `Plan.steps`, applied in this order before the training; may be empty.
        train: what learns: "all", "above" (layers that run after those of this stage; what is below is frozen) or
            "none".
        epochs: passes over the training data at most.
        patience: epochs in a row without a better validation value after which the stage ends; None: never.
        target: validation value (higher is better) at which the stage ends, such as the original's; None: never.
        distill: share of the distillation loss in [0, 1], the rest is the user's loss; None: 0 with a loss, 1 without.
            At 1 dropout is off and batch norms keep their statistics.
        optimizer: "adam", "adamw" or "sgd" (momentum 0.9, Nesterov).
        rate: learning rate at the start.
        decay: whether it falls to 0 along a half cosine over the stage's epochs, or stays.
        weight_decay: as the optimizer understands it.
        hold_zeros: weights of Linear layers and convolutions that are zero when the training begins stay zero, as a
            model needs that was pruned before; those that a pruning step of the plan made zero do so in any case.
        sparsify: strength of a penalty that drives whole channels towards zero, for a stage before the one that takes
            them out (`taut.training.sparsifying.GroupLasso`); such a stage ends with its last weights, not with those
            of the best validation value. 0: none.
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID
    steps: tuple[int, ...] = ()
    train: Trained = "all"
    epochs: int = 3
    patience: int | None = None
    target: float | None = None
    distill: float | None = None
    optimizer: str = "adam"
    rate: float = 1e-3
    decay: bool = True
    weight_decay: float = 0.0
    hold_zeros: bool = False
    sparsify: float = field(default=0.0, repr=False)

    def __post_init__(self) -> None:
        """Refuse what no training can mean.

        Raises:
            CallError: a value outside its range.
        """
        places = isinstance(self.steps, tuple | list) and all(_whole(place, 0) for place in self.steps)
        _check("steps", self.steps, "positions in the plan's steps, such as (0, 1)", places)
        _check("train", self.train, "all, above or none", self.train in ("all", "above", "none"))
        _check("optimizer", self.optimizer, ", ".join(OPTIMIZERS), self.optimizer in OPTIMIZERS)
        _check("epochs", self.epochs, "a whole number, at least 0", _whole(self.epochs, 0))
        _check("patience", self.patience, "None or at least 1", self.patience is None or _whole(self.patience, 1))
        share = self.distill is None or (_number(self.distill) and 0 <= self.distill <= 1)
        _check("distill", self.distill, "None or in [0, 1]", share)
        _check("target", self.target, "None or a number", self.target is None or _number(self.target))
        _check("rate", self.rate, "above 0", _number(self.rate) and self.rate > 0)
        for key in ("weight_decay", "sparsify"):
            value = getattr(self, key)
            _check(key, value, "at least 0", _number(value) and value >= 0)
        for key in ("decay", "hold_zeros"):
            _check(key, getattr(self, key), "True or False", isinstance(getattr(self, key), bool))


Schedule = tuple[Stage, ...]


def cascade(
    plan: Plan, *, epochs: int = 10, patience: int | None = 2, target: float | None = None, rate: float = 1e-3
) -> Schedule:
    """One stage per step, front to back: compress a layer, freeze it and all below, train what is above.

    Source: Denton et al. 2014, section 3.4 (fine-tune until the original performance is restored, then the next
    layer).

    Args:
        plan: whose steps are spread over the stages, in their order.
        epochs: of every stage at most.
        patience: epochs without improvement after which the next layer's turn comes.
        target: validation value at which it comes at once; the original's value is what the source uses.
        rate: learning rate at the start of every stage.
    """
    return tuple(
        Stage((place,), "above", epochs=epochs, patience=patience, target=target, rate=rate)
        for place in range(len(plan.steps))
    )


def ramp(step: Step, times: int = 10) -> tuple[Step, ...]:
    """A pruning step as several of rising sparsity: s_t = S (1 - (1 - t / T)^3), many weights first and few at the end.

    Where channels leave the network, step t asks for (s_t - s_{t-1}) / (1 - s_{t-1}) of those that are left.

    Source: Zhu and Gupta 2017 (the cubic schedule).

    Args:
        step: of a method with a `sparsity`, which the last step reaches.
        times: how many steps, T.

    Raises:
        CallError: the step has no sparsity, or `times` is not positive.
    """
    goal = step.settings.get("sparsity")
    if not isinstance(goal, int | float) or isinstance(goal, bool):
        raise CallError(f"A ramp needs a step with a 'sparsity'. The settings of this one are {step.settings}.")
    if not 0 <= goal < 1:
        raise CallError(f"The 'sparsity' of a ramp must be in [0, 1). Got {goal} instead.")
    if not _whole(times, 1):
        raise CallError(f"The 'times' of a ramp must be a whole number, at least 1. Got {times!r} instead.")
    rising = [goal * (1 - (1 - t / times) ** 3) for t in range(1, times)] + [goal]
    if getattr(METHODS.get(step.method), "sparsity_of_rest", False):
        rising = [(now - before) / (1 - before) for before, now in zip([0.0, *rising], rising, strict=False)]
    return tuple(replace(step, settings={**step.settings, "sparsity": sparsity}) for sparsity in rising)


def alternate(plan: Plan, *, epochs: int = 1, last: int | None = None, rate: float = 1e-3) -> Schedule:
    """One stage per step with everything trained in between: prune, train, prune more, train again.

    Args:
        plan: such as the steps of `ramp`.
        epochs: after every step.
        last: after the last one, such as the step that takes out dead units; None: as after the others.
        rate: learning rate at the start of every stage.
    """
    ends = len(plan.steps) - 1
    return tuple(
        Stage((place,), epochs=last if place == ends and last is not None else epochs, rate=rate)
        for place in range(len(plan.steps))
    )


def check_schedule(schedule: Schedule, plan: Plan | None) -> None:
    """Whether every step of `plan` occurs exactly once.

    Raises:
        CallError: a step is missing, doubled or unknown, or there is no stage.
    """
    if not isinstance(schedule, tuple) or not schedule or not all(isinstance(stage, Stage) for stage in schedule):
        raise CallError(f"A schedule must be a tuple of taut.Stage, at least one. Got {schedule!r:.80} instead.")
    used = sorted(place for stage in schedule for place in stage.steps)
    count = 0 if plan is None else len(plan.steps)
    if used != list(range(count)):
        raise CallError(
            f"The schedule must apply each of the plan's {count} steps once, by its position 0 ... {count - 1}. "
            f"It applies {used}."
        )


def _number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check(key: str, value: object, wanted: str, good: bool) -> None:
    if not good:
        raise CallError(f"The '{key}' of a stage must be {wanted}. Got {value!r} instead.")

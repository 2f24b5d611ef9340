"""What was really done to a model: for a plan whose last settings were decided only when it was carried out.

It is noted on the model itself, outside of its state, so that copies and pickles of it have it, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import nn

from taut.core.copying import NOTED
from taut.methods import resolve, settings
from taut.types import Plan, Restoring, Slimming, Step


@dataclass(frozen=True)
class _Past:
    """What was done to a model.

    Attributes:
        plan: the last one, resolved. before: the steps that made the model of which this one was made.
    """

    plan: Plan
    before: tuple[Step, ...] = ()

    @property
    def steps(self) -> tuple[Step, ...]:
        """All of them, in order."""
        return (*self.before, *self.plan.steps)

    def __copy__(self) -> _Past:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> _Past:
        return self  # copies of models are made all the time, and it never changes

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        """As text: a pickled model of plain layers is to be read where there is no taut, or another version."""
        try:
            return str, (json.dumps(_schema().dump_python(self, mode="json")),)
        except (TypeError, ValueError):  # settings that no folder could hold either
            return str, ("",)


@cache
def _schema() -> TypeAdapter[_Past]:
    return TypeAdapter(_Past)


def _past(model: nn.Module) -> _Past | None:
    found = vars(model).get(NOTED)
    if isinstance(found, str):
        try:
            found = _schema().validate_python(json.loads(found))
        except (ValidationError, ValueError):  # of a version that knows other steps
            found = None
    return found if isinstance(found, _Past) else None


def remember(model: nn.Module, plan: Plan, before: tuple[Step, ...] = ()) -> None:
    """Note the resolved plan that made `model`.

    Args:
        model: the new one.
        plan: as it was carried out.
        before: the `history` of the model of which it was made.
    """
    _note(model, _Past(plan, before))
    changed = [f"{name}." for step in plan.steps for name in step.layers]
    for path, module in model.named_modules():
        if path and NOTED in vars(module) and any(name.startswith(f"{path}.") for name in changed):
            del vars(module)[NOTED]  # a part that had been compressed by itself is no longer what that made


def hand_on(model: nn.Module, trained: nn.Module) -> None:
    """What was done to `model` was done to `trained`, too."""
    done = _past(model)
    if done is not None:
        _note(trained, done)


def _note(model: nn.Module, past: _Past) -> None:
    vars(model)[NOTED] = past  # setattr may be the user's own


def history(model: nn.Module) -> tuple[Step, ...]:
    """All steps that made a model of the original, in order; () where none is known."""
    past = _past(model)
    return () if past is None else past.steps


def before(model: nn.Module, plan: Plan) -> tuple[Step, ...]:
    """The steps that made the model of which this one was made by `plan`: the last one, or all of them as one.

    The same step may be there several times, on what it made itself: so the number of steps decides where both fit.
    """
    past = _past(model)
    if past is None:
        return ()
    steps, last = past.steps, len(past.before)
    places = [last, 0] if plan.steps else [last, len(steps)]
    leading = [place for place in places if _leads(plan, steps[place:])]
    return steps[: min(leading, key=lambda place: len(steps) - place != len(plan.steps), default=last)]


def same_layers(some: Sequence[Step], others: Sequence[Step]) -> bool:
    """Whether steps are by the same methods on the same layers, whatever their settings."""
    return [(s.layers, s.method) for s in some] == [(s.layers, s.method) for s in others]


def recall(model: nn.Module, plan: Plan) -> Plan:
    """`plan` with the steps as they were carried out, where it has some that only the network or a layer resolves.

    The steps that made `model` must be steps of `plan`, in the same order, with settings that differ only where `plan`
    left them open; else it is `plan` itself.
    """
    past = _past(model)
    if past is None:
        return plan
    done = past.steps[len(before(model, plan)) :]
    left_open = any(isinstance(resolve(step), Slimming | Restoring) for step in plan.steps)
    return replace(plan, steps=done) if _leads(plan, done) and (left_open or _filled(plan, done)) else plan


def _filled(plan: Plan, done: Sequence[Step]) -> bool:
    """Whether steps have settings that the plan's, of which they came, left to their layers: none of them a rank."""
    asked = iter(plan.steps)
    pairs = [(resolve(next(s for s in asked if same_layers([s], [step]))), step.settings) for step in done]
    return any(
        value is None and known.get(key) is not None and key not in getattr(method, "rank_settings", ())
        for method, known in pairs
        for key, value in settings(method).items()
    )


def _leads(plan: Plan, done: Sequence[Step]) -> bool:
    """Whether steps are what came of a plan: some may have been rolled back, and settings that it left open are set."""
    asked = iter(plan.steps)
    for step in done:
        wish = next((s for s in asked if same_layers([s], [step])), None)
        if wish is None or any(value not in (None, step.settings.get(key)) for key, value in _plain(wish.settings)):
            return False
    return True


def _plain(settings: Mapping[str, object]) -> list[tuple[str, object]]:
    return [(key, value) for key, value in settings.items() if not isinstance(value, list | dict)]

"""What was really done to a model: for a plan whose last settings were decided only when it was carried out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

from torch import nn

from taut.methods import resolve
from taut.types import Plan, Restoring, Slimming, Step


@dataclass(frozen=True)
class _Past:
    """What was done to a model.

    Attributes:
        plan: the last one, resolved. before: the steps that made the model of which this one was made.
    """

    plan: Plan
    before: tuple[Step, ...] = ()


_DONE: WeakKeyDictionary[nn.Module, _Past] = WeakKeyDictionary()


def remember(model: nn.Module, plan: Plan, before: tuple[Step, ...] = ()) -> None:
    """Note the resolved plan that made `model`.

    Args:
        model: the new one.
        plan: as it was carried out.
        before: the `history` of the model of which it was made.
    """
    _DONE[model] = _Past(plan, before)


def hand_on(model: nn.Module, trained: nn.Module) -> None:
    """What was done to `model` was done to `trained`, too."""
    done = _DONE.get(model)
    if done is not None:
        _DONE[trained] = done


def history(model: nn.Module) -> tuple[Step, ...]:
    """All steps that made a model of the original, in order; () where none is known."""
    past = _DONE.get(model)
    return () if past is None else (*past.before, *past.plan.steps)


def before(model: nn.Module) -> tuple[Step, ...]:
    """The steps that made the model of which this one was made by its last plan."""
    past = _DONE.get(model)
    return () if past is None else past.before


def same_steps(some: Sequence[Step], others: Sequence[Step]) -> bool:
    """Whether steps are the same ones on the same layers, however far their settings are resolved."""
    return [(s.layers, s.method) for s in some] == [(s.layers, s.method) for s in others]


def recall(model: nn.Module, plan: Plan) -> Plan:
    """`plan` with the steps as they were carried out, where it has some that only the network resolves.

    The steps that made `model` must be steps of `plan`, in the same order, with settings that differ only where `plan`
    left them open; else it is `plan` itself.
    """
    past = _DONE.get(model)
    if past is None or not any(isinstance(resolve(step), Slimming | Restoring) for step in plan.steps):
        return plan
    done, asked = past.plan, iter(plan.steps)
    for step in done.steps:
        wish = next((s for s in asked if (s.layers, s.method) == (step.layers, step.method)), None)
        if wish is None or any(value not in {None, step.settings.get(key)} for key, value in _plain(wish.settings)):
            return plan
    return replace(plan, steps=done.steps)


def _plain(settings: Mapping[str, object]) -> list[tuple[str, object]]:
    return [(key, value) for key, value in settings.items() if not isinstance(value, list)]

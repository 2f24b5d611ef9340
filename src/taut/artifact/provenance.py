"""What was really done to a model: for a plan whose last settings were decided only when it was carried out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from weakref import WeakKeyDictionary

from torch import nn

from taut.methods import resolve
from taut.types import Plan, Restoring, Slimming

_DONE: WeakKeyDictionary[nn.Module, Plan] = WeakKeyDictionary()


def remember(model: nn.Module, plan: Plan) -> None:
    """Note the resolved plan that made `model`."""
    _DONE[model] = plan


def hand_on(model: nn.Module, trained: nn.Module) -> None:
    """What was done to `model` was done to `trained`, too."""
    done = _DONE.get(model)
    if done is not None:
        _DONE[trained] = done


def recall(model: nn.Module, plan: Plan) -> Plan:
    """`plan` with the steps as they were carried out, where it has some that only the network resolves.

    The steps that made `model` must be steps of `plan`, in the same order, with settings that differ only where `plan`
    left them open; else it is `plan` itself.
    """
    done = _DONE.get(model)
    if done is None or not any(isinstance(resolve(step), Slimming | Restoring) for step in plan.steps):
        return plan
    asked = iter(plan.steps)
    for step in done.steps:
        wish = next((s for s in asked if (s.layers, s.method) == (step.layers, step.method)), None)
        if wish is None or any(value not in {None, step.settings.get(key)} for key, value in _plain(wish.settings)):
            return plan
    return replace(plan, steps=done.steps)


def _plain(settings: Mapping[str, object]) -> list[tuple[str, object]]:
    return [(key, value) for key, value in settings.items() if not isinstance(value, list)]

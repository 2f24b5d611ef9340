"""What a layer would lose in a plain form that computes the same by now: states, zeros, and what of it is trained."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from taut.core.copying import deep_copy
from taut.core.modes import generator

STATE = "it keeps a state from call to call (running statistics, a count), which a plain layer has no place for"
"""Why a layer stays that changes when it is run."""

ZEROS = (
    "part of its computed weight is zero whatever its parameters are (a mask, a triangle): training would fill that in "
    "a plain layer"
)
"""Why a layer stays whose weight has a structure."""

PARTLY_TRAINED = (
    "some of the parameters that its weight is computed from are trained and some are frozen (an adapter), which one "
    "plain weight cannot be: merge them first, or train all of them or none"
)
"""Why a layer stays of which a part is frozen."""

SPREAD = 0.1
"""Share by which the sizes of drawn parameters differ: what rounds them to a few values makes none of them zero."""


def partly_trained(parameters: Iterable[Tensor]) -> bool:
    """Whether some of these are trained and some are not."""
    return len({p.requires_grad for p in parameters}) > 1


def trained(module: nn.Module) -> tuple[bool, bool]:
    """Whether what a weight is computed from is trained, and whether the bias is."""
    weight = any(p.requires_grad for name, p in module.named_parameters() if name != "bias")
    bias = module._parameters.get("bias")
    return weight, weight if bias is None else bias.requires_grad


def always_zero(module: nn.Module, weights: Sequence[str], weight_of: Callable[[nn.Module], Tensor | None]) -> bool:
    """Whether some of what a module computes is zero whatever its parameters are.

    Seen at four draws of these in float64: each is positive in some of them and negative in others.

    Args:
        module: is not changed.
        weights: names of the parameters that are its weight; others that are frozen, as a mask may be, stay.
        weight_of: what is computed, of a copy of the module; None: it cannot be, then nothing is known.
    """
    zero: Tensor | None = None
    for sign in (1.0, -1.0):
        for other in (1.0, -1.0):
            copied = deep_copy(module).double().eval()
            _draw(copied, weights, sign, other)
            with torch.no_grad():
                weight = weight_of(copied)
            if weight is None:
                return True
            zero = weight == 0 if zero is None else zero & (weight == 0)
            if not bool(zero.any()):
                return False
    return True


def _draw(module: nn.Module, weights: Sequence[str], sign: float, other: float) -> None:
    """Other values for parameters, none of them zero: weights of random signs, turned by `sign`, others of one sign."""
    random = generator(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not parameter.is_floating_point() or not (name in weights or parameter.requires_grad):
                continue
            size = float(parameter.abs().max()) if parameter.numel() else 0.0
            noise = torch.rand(parameter.shape, generator=random, dtype=torch.float64)
            signs = torch.randint(2, parameter.shape, generator=random) * 2 - 1
            drawn = (1 - SPREAD * noise) * (size or 1.0) * (signs * sign if name in weights else other)
            parameter.copy_(drawn.to(parameter.device))


def keeps_state(module: nn.Module, inputs: Sequence[Tensor]) -> bool:
    """Whether runs change a module: its parameters, its buffers, or numbers and tensors among its attributes.

    What it has made for itself in its first run, such as a copy of its weight, is no state.

    Args:
        module: is not changed.
        inputs: of one shape, on which it runs; several.
    """
    copied = deep_copy(module).double()
    held = _tensors_of(copied)
    for training in (False, True):
        copied.train(training)
        before: dict[str, Any] | None = None
        for x in inputs:
            with torch.no_grad(), suppress(Exception):  # what it refuses in one mode it may take in the other
                copied.forward(x.clone())
            now = dict(_attributes_of(copied))
            if _differ(held, _tensors_of(copied)) or (before is not None and _differ(before, now)):
                return True
            before = now
    return False


def _tensors_of(module: nn.Module) -> dict[str, Any]:
    named = (*module.named_parameters(), *module.named_buffers())
    return {name: t.detach().clone() for name, t in named}


def _attributes_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, part in module.named_modules():
        own = {key: value for key, value in vars(part).items() if key not in KNOWN}
        yield from _numbers(path, own)


KNOWN = frozenset(vars(nn.Module()))
"""What every module has."""


def _numbers(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Numbers and tensors in a nest of containers."""
    if isinstance(value, Tensor):
        yield path, value.detach().clone()
    elif isinstance(value, bool | int | float | complex):
        yield path, value
    elif isinstance(value, dict):
        yield f"{path}()", len(value)
        for key, item in value.items():
            yield from _numbers(f"{path}.{key}", item)
    elif isinstance(value, list | tuple | deque):
        yield f"{path}()", len(value)
        for number, item in enumerate(value):
            yield from _numbers(f"{path}.{number}", item)


def _differ(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether anything that is in both is another."""
    return any(not _equal(first[key], second[key]) for key in first.keys() & second.keys())


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        same = first.shape == second.shape and first.dtype == second.dtype
        return same and torch.equal(first.nan_to_num(), second.nan_to_num())
    return bool(first == second) if type(first) is type(second) else False

"""The modes in which models are run: evaluating, without autograd, from a fixed random state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from itertools import chain
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from taut.core.randomness import own_states, seed_globals

P = ParamSpec("P")
R = TypeVar("R")


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter or buffer lives; the CPU for a model that has none."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode; every module's own training flag is put back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, flag in flags:
            module.training = flag


_QUIET: ContextVar[bool] = ContextVar("taut_quiet", default=False)


@contextmanager
def quiet(seed: int = 0) -> Iterator[None]:
    """Run without autograd, in normal (not inference) mode, from a fixed random state that is undone afterwards.

    Nested, the outermost seed stays in force.
    """
    if _QUIET.get():
        with torch.inference_mode(False), torch.no_grad():
            yield
        return
    token = _QUIET.set(True)
    try:
        with torch.inference_mode(False), torch.no_grad(), own_states():
            seed_globals(seed)
            yield
    finally:
        _QUIET.reset(token)


def generator(offset: int = 0) -> torch.Generator:
    """A random generator of our own, from the seed in force."""
    return torch.Generator().manual_seed((torch.initial_seed() + offset) % (1 << 63))


def quietly(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator of the public verbs: `quiet`, so that they work under a caller's no_grad or inference_mode."""

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with quiet():
            return function(*args, **kwargs)

    return wrapper

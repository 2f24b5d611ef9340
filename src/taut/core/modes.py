"""The modes in which models are run: evaluating, without autograd, from a fixed random state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import wraps
from itertools import chain
from typing import ParamSpec, TypeVar

import torch
from torch import nn
from torch.utils import checkpoint as checkpointing

from taut.core.randomness import own_states, seed_globals

P = ParamSpec("P")
R = TypeVar("R")


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter or buffer lives; the CPU for a model that has none."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


@contextmanager
def evaluating(model: nn.Module, *, training: bool = False) -> Iterator[nn.Module]:
    """The model in eval mode, or in train mode; every module's own training flag is put back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield model
    finally:
        for module, flag in flags:
            if module.training is not flag:  # a module is slow to take an attribute
                module.training = flag


@contextmanager
def unfused() -> Iterator[None]:
    """Run torch's encoder layers module by module: their fused path calls no layer, and hands on nested tensors."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _NotCheckpointed:
    """Stands in for torch's reentrant checkpoint, which refuses `torch.autograd.grad`: the same values, all kept."""

    @staticmethod
    def apply(function: Callable[..., R], preserve: bool, *args: object) -> R:
        """What the function gives."""
        del preserve
        return function(*args)


@contextmanager
def looked_into(*, fused: bool) -> Iterator[None]:
    """Run what a model is made of one after the other: not checkpointed, and not fused where that is not wished.

    Functions run under `torch.utils.checkpoint(use_reentrant=True)` as if nothing was to be saved:
    what `checkpoint` looks up when it is called is replaced, so that it does not matter who imported it before.
    """
    before = checkpointing.CheckpointFunction
    checkpointing.CheckpointFunction = _NotCheckpointed  # type: ignore[misc, assignment]
    try:
        with nullcontext() if fused else unfused():
            yield
    finally:
        checkpointing.CheckpointFunction = before  # type: ignore[misc]


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

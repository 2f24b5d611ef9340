"""What code outside of a block reads of it beside modules and tensors: attributes that it sets, its methods."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import suppress
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from taut.core.example import Example
from taut.core.modes import evaluating
from taut.errors import ModelError
from taut.nn.answering import is_plain
from taut.structure.channels.lookups import reads
from taut.structure.channels.mentions import SETTING_UP, of_library, of_torch, words_of, wrapped
from taut.structure.coverage import seeded
from taut.structure.surgery import shallow

INTERNAL = frozenset(dir(nn.Module())) | {"forward"}
"""What every module has."""


def read_elsewhere(model: nn.Module, example: Example, name: str) -> str | None:
    """An attribute or a method of a module that other code reads, or may read, and `Skipped` would not have.

    Looked for in runs in eval mode and in train mode, and by name in all methods of the model.

    Args:
        model: is not changed.
        example: how it is called.
        name: of the module.
    """
    copied = shallow(model)
    module = copied.get_submodule(name)
    before = dict(vars(module))
    asked = _watched(module)
    with suppress(ModelError), evaluating(copied):
        example.run(copied)
    with suppress(ModelError), torch.no_grad(), seeded():  # some do not run in train mode
        example.run(copied.train(), training=True)
    after = {key: value for key, value in vars(module).items() if key not in INTERNAL}
    written = {key for key, value in after.items() if key not in before or before[key] is not value}
    shared = {id(value) for other in _outside(copied, module) for value in vars(other).values()}
    own = {key for key, value in after.items() if not is_plain(value) and id(value) not in shared}
    missing = written | own | _methods(model.get_submodule(name))
    if not missing:
        return None
    return min((missing & asked) | _named(model, missing), default=None)


def _watched(module: nn.Module) -> set[str]:
    """Have a module of a copy note what is read of it while it is not called."""
    own, asked, inside = type(module), set[str](), [0]

    def noted(held: Any, key: str) -> Any:
        if not inside[0] and key not in INTERNAL:
            asked.add(key)
        return own.__getattribute__(held, key)

    def enter(*_: Any) -> None:
        inside[0] += 1

    def leave(*_: Any) -> None:
        inside[0] -= 1

    module.__class__ = type(own.__name__, (own,), {"__getattribute__": noted, "__module__": own.__module__})
    module.register_forward_pre_hook(enter, prepend=True)
    module.register_forward_hook(leave, always_call=True)
    return asked


def _outside(model: nn.Module, block: nn.Module) -> Iterator[nn.Module]:
    """The modules around a block and beside it."""
    within = {id(module) for module in block.modules()}
    return (module for module in model.modules() if id(module) not in within)


def _methods(module: nn.Module) -> set[str]:
    """Methods and properties of a module's classes."""
    kinds = (kind for kind in type(module).__mro__ if not kind.__module__.startswith("torch.") and kind is not object)
    held = {key for kind in kinds for key, value in vars(kind).items() if _is_code(value)}
    return held - INTERNAL - SETTING_UP


def _is_code(value: Any) -> bool:
    return inspect.isroutine(value) or hasattr(value, "__get__")


def _named(model: nn.Module, names: set[str]) -> set[str]:
    """Those of the names that code of the model reads of something else than its own `self`, or holds as strings.

    Code is all methods of its modules, functions that these hold, and what these name; names that are computed are not
    known.
    """
    kinds = {kind for module in model.modules() for kind in type(module).__mro__ if not of_torch(kind)} - {object}
    waiting = [value for kind in kinds for key, value in vars(kind).items() if key not in SETTING_UP]
    waiting += [value for module in model.modules() for value in vars(module).values() if callable(value)]
    hooks = (held for module in model.modules() for held in (module._forward_hooks, module._forward_pre_hooks))
    waiting += [hook for held in hooks for hook in held.values()]
    seen, found = set[FunctionType](), set[str]()
    while waiting:
        value = waiting.pop()
        waiting += wrapped(value)
        if isinstance(value, functools.partial):
            waiting.append(value.func)
        if not isinstance(value, FunctionType) or value in seen or of_library(value.__module__):
            continue
        seen.add(value)
        words = set(words_of(value.__code__))
        if not words.isdisjoint(names):
            found |= names & reads(value.__code__)
        around = [value.__globals__[word] for word in words if word in value.__globals__]
        python = [vars(one) for one in around if isinstance(one, ModuleType) and not of_library(one.__name__)]
        waiting += around + [held[word] for held in python for word in words if word in held]
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # nothing is in it yet
                waiting.append(cell.cell_contents)
    return found

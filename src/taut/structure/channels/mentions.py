"""Which parts of a model its code names: one that is not called and not named anywhere reads nothing."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from types import CodeType, FunctionType
from typing import Any

from torch import nn

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict)
"""Modules whose parts go by numbers or keys: who names them may mean any part."""


def named_in_code(model: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """Those of the modules that code which runs in a forward pass names, by an attribute or in a string.

    Args:
        model: the network.
        names: of modules that were not reached.
    """
    unreached = list(names)
    words: set[str] = set()
    for name, module in model.named_modules():
        if not any(name == other or name.startswith(f"{other}.") for other in unreached if other):
            words |= _words(module)
    return tuple(name for name in unreached if _is_named(model, name, words))


def _is_named(model: nn.Module, name: str, words: set[str]) -> bool:
    """Whether every part of a module's name is among the words; of one that holds parameters of its own, any of these.

    A module may be called by those that hold it alone: then its own code names what it reads.
    """
    module, parent = model.get_submodule(name), model
    own = {*module._parameters, *module._buffers}
    if not name or (list(module.children()) and not words.isdisjoint(own)):
        return not words.isdisjoint(own)
    for part in name.split("."):
        if not isinstance(parent, CONTAINERS) and part not in words:
            return False
        parent = parent.get_submodule(part)
    return True


def _words(module: nn.Module) -> set[str]:
    """Attributes and strings in the code that may run when a module of a user's class is called."""
    kind = type(module)
    if kind.__module__.startswith("torch.nn.") and "forward" not in vars(module):
        return set()
    words: set[str] = set()
    seen: set[int] = set()
    left: list[Any] = [module.forward, *module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    while left:
        function = inspect.unwrap(left.pop())
        function = getattr(function, "__func__", function)
        if not isinstance(function, FunctionType) or id(function) in seen:
            continue
        seen.add(id(function))
        more = _names_in(function.__code__)
        words |= more
        for word in more:
            places = vars(module).get(word), getattr(kind, word, None), function.__globals__.get(word)
            left += [f for f in places if isinstance(f, FunctionType) and not f.__module__.startswith("torch.")]
    return words


def _names_in(code: CodeType) -> set[str]:
    words = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, str):
            words.add(constant)
        elif isinstance(constant, tuple):
            words |= {item for item in constant if isinstance(item, str)}
        elif isinstance(constant, CodeType):
            words |= _names_in(constant)
    return words

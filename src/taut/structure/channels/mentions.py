"""Which parts of a model its code may use: one that is not called and that no code can name reads nothing.

Whatever cannot be decided counts as named: code that finds parts by computed names or by going through them, and code
that cannot be looked into.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from taut.core.copying import NOTED
from taut.core.tensors import address
from taut.structure.channels.lookups import DYNAMIC, looks_up

Mark = tuple[type, tuple[int, ...]]

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict)
"""Modules whose parts go by numbers or keys: who names them may mean any part."""

SETTING_UP = frozenset(
    "__init__ __repr__ __setstate__ extra_repr reset_parameters _reset_parameters init_weights _init_weights".split()  # noqa: SIM905
)
"""Methods that make or show a module; they count where other code names them."""

LIBRARIES = frozenset({"torch", "numpy"}) | sys.stdlib_module_names - {"__main__"}
"""Packages whose functions name no parts of a user's model."""


PLAIN = (str, bytes, int, float, Tensor, torch.dtype, torch.device, type, ModuleType, type(None))
"""What holds no parts."""


def named_in_code(model: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """Those of the modules that code of the model may use.

    Code is all methods and properties of the classes of modules that are named themselves, hooks, and what these name:
    functions, also of other Python modules, closures, objects that hold a part.

    Args:
        model: the network.
        names: of modules that were not reached.
    """
    names = list(names)
    if not names:
        return ()
    mentions = _Mentions(model)
    size = -1
    while size != len(mentions.live):  # what is named may name more
        size = len(mentions.live)
        for name, module in model.named_modules(remove_duplicate=False):
            if name not in mentions.live and mentions.by_name(name):
                mentions.live.add(name)
                try:
                    mentions.look_at(module)
                except Exception:  # an object that cannot be looked into, or is nested too deep
                    mentions.dynamic = True
            if mentions.dynamic:
                return tuple(names)
    return tuple(name for name in names if mentions.uses_own(name))


@dataclass
class _Mentions:
    """What code names.

    Attributes:
        model: the network.
        words: attributes, and strings.
        held: parts that are at hand under other names: in a list, a closure.
        live: modules whose code counts.
        dynamic: whether some code may name anything.
    """

    model: nn.Module
    words: set[str] = field(default_factory=set)
    held: set[Mark] = field(default_factory=set)
    live: set[str] = field(default_factory=set)
    dynamic: bool = False
    seen: dict[int, Any] = field(default_factory=dict)  # the objects themselves, so that no number is used again

    def by_name(self, name: str) -> bool:
        """Whether every part of a module's name is among the words, or it, or what it lies in, is at hand."""
        parent = self.model
        named = True
        for part in name.split(".") if name else ():
            child = parent.get_submodule(part)
            named = _mark(child) in self.held or (named and (isinstance(parent, CONTAINERS) or part in self.words))
            parent = child
        return named

    def uses_own(self, name: str) -> bool:
        """Whether code may use what a module holds itself; a user's own code does so by its name."""
        module = self.model.get_submodule(name)
        own = {key: t for key, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}
        if any(_mark(t) in self.held for t in own.values()):
            return True
        by_torch = any(kind is not nn.Module and of_torch(kind) for kind in _classes(module))
        return name in self.live and (by_torch or not self.words.isdisjoint(own))

    def look_at(self, module: nn.Module) -> None:
        """Add what a module's code names."""
        self.dynamic |= isinstance(module, torch.jit.ScriptModule)
        for kind in _classes(module):
            if not of_torch(kind):
                self._follow_class(kind)
            elif kind is not nn.Module and module._modules:  # torch knows its own parts, and takes no others
                functions = (
                    f for key, f in vars(kind).items() if key not in SETTING_UP and isinstance(f, FunctionType)
                )
                self.words.update(word for function in functions for word in words_of(function.__code__))
        hidden = {"_parameters", "_buffers", "_modules", NOTED}
        for value in [value for key, value in vars(module).items() if key not in hidden]:
            self._hold(value)

    def _follow_class(self, kind: type) -> None:
        for key, value in vars(kind).items():
            if key not in SETTING_UP:
                self._follow(value)

    def _hold(self, value: Any) -> bool:
        """Note the parts that a value holds, and follow functions; whether it holds any part."""
        if isinstance(value, nn.Module | nn.Parameter):
            self.held.add(_mark(value))
            return True
        if isinstance(value, PLAIN) or id(value) in self.seen or (callable(value) and self._follow(value)):
            return False
        self.seen[id(value)] = value
        if isinstance(value, Mapping):
            return self._hold_all(value.values())
        if isinstance(value, list | tuple | set | frozenset | deque):
            return self._hold_all(value)
        holds = self._hold_all(_attributes(value))
        if holds or callable(value):
            self._follow_object(value)
        return holds

    def _hold_all(self, values: Iterable[Any]) -> bool:
        holds = [self._hold(value) for value in values]  # every one is looked at
        return any(holds)

    def _follow_object(self, value: Any) -> None:
        """Follow the code of an object's class."""
        for kind in type(value).__mro__:
            if not of_library(kind.__module__):
                self._follow_class(kind)

    def _follow(self, value: Any) -> bool:
        """Add what a function names, however it is wrapped; whether the value is one."""
        if isinstance(value, MethodType):
            self._hold(value.__self__)
        for inner in wrapped(value):
            self._follow(inner)
            return True
        if isinstance(value, functools.partial):
            self._hold((value.args, value.keywords))
            return self._follow(value.func) or self._hold(value.func)
        if isinstance(value, FunctionType):
            self._read(value)
        elif type(value).__name__ == "cython_function_or_method":  # without code that could be read
            self.dynamic = True
        elif not isinstance(value, BuiltinFunctionType):
            return False
        return True

    def _read(self, function: FunctionType) -> None:
        if id(function) in self.seen or of_library(function.__module__) or self.dynamic:
            return
        self.seen[id(function)] = function
        words = set(words_of(function.__code__))
        self.words |= words
        self.dynamic |= bool(words & DYNAMIC) or looks_up(function.__code__)
        for value in (*_cells(function), function.__defaults__, function.__kwdefaults__):
            self._hold(value)
        for word in words:
            self._named(function.__globals__.get(word), words)

    def _named(self, value: Any, words: set[str]) -> None:
        """Follow what a function names of its Python module, or of others."""
        if isinstance(value, ModuleType):
            if not of_library(value.__name__) and id(value) not in self.seen:
                for word in words:
                    item = vars(value).get(word)
                    if not isinstance(item, ModuleType):
                        self._named(item, words)
        elif isinstance(value, type):
            if not of_library(value.__module__) and id(value) not in self.seen and not issubclass(value, nn.Module):
                self.seen[id(value)] = value
                self._follow_class(value)
        else:
            self._hold(value)


def _mark(part: nn.Module | Tensor) -> Mark:
    """What a part and its copy on the same storage have in common, and other parts have not."""
    held = part.parameters() if isinstance(part, nn.Module) else (part,)
    return type(part), tuple(address(t) for t in held)


def _cells(function: FunctionType) -> Iterator[Any]:
    """What a function finds around it."""
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # nothing is in it yet
            yield cell.cell_contents


def wrapped(value: Any) -> Iterator[Any]:
    """What stands behind a property, a method or a decorated function."""
    if isinstance(value, property):
        yield value.fget
    elif isinstance(value, functools.cached_property | functools.partialmethod):
        yield value.func
    elif isinstance(value, staticmethod | classmethod | MethodType):
        yield value.__func__
    elif not isinstance(value, type) and callable(value) and "__wrapped__" in getattr(value, "__dict__", {}):
        yield value.__wrapped__


def _attributes(value: Any) -> Iterator[Any]:
    """What an object holds."""
    yield value() if isinstance(value, weakref.ref) else None
    yield from getattr(value, "__dict__", {}).values()
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            yield getattr(value, slot, None) if slot not in {"__dict__", "__weakref__"} else None


def _classes(module: nn.Module) -> list[type]:
    return [kind for kind in type(module).__mro__ if kind is not object]


def of_torch(kind: type) -> bool:
    """Whether torch, or taut for what takes a layer's place, defines a class, and has not made it of a user's code."""
    known = vars(sys.modules.get(kind.__module__, object)).get(kind.__qualname__)
    return (kind.__module__.split(".")[0] == "torch" or kind.__module__.startswith("taut.nn.")) and known is kind


def of_library(name: Any) -> bool:
    """Whether a Python module is of a package whose functions name no parts of a user's model."""
    return isinstance(name, str) and name.split(".")[0] in LIBRARIES


def words_of(code: CodeType) -> Iterator[str]:
    """Names and strings in code, and in what is defined inside of it."""
    yield from code.co_names
    for constant in code.co_consts:
        yield from _strings(constant)


def _strings(constant: Any) -> Iterator[str]:
    if isinstance(constant, str):
        yield from (constant, *constant.split("."))
    elif isinstance(constant, tuple | frozenset):
        for item in constant:
            yield from _strings(item)
    elif isinstance(constant, CodeType):
        yield from words_of(constant)

"""Copies of models: what deepcopy makes, and what it refuses without need."""

from __future__ import annotations

import copy
import copyreg
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import (
    AsyncGeneratorType,
    BuiltinFunctionType,
    CellType,
    CoroutineType,
    FunctionType,
    GeneratorType,
    MethodType,
    ModuleType,
)
from typing import Any

import torch
from torch import Tensor, nn

from taut.core.nested import PLAIN, attributes_of
from taut.errors import ModelError

CONSUMED = GeneratorType, CoroutineType, AsyncGeneratorType
"""What a run of the model would use up for its owner."""

SHARED_ROOMS = frozenset({"threading", "_thread", "multiprocessing", "concurrent", "socket", "subprocess", "asyncio"})
"""Packages whose objects are the process's own: a copy shares them as a whole."""

NOTED = "_taut_history"
"""The attribute in which taut notes what was done to a model (`artifact/provenance.py`); copies share it."""

ATOMIC = frozenset(
    {type(None), bool, int, float, complex, str, bytes, type, range, FunctionType, BuiltinFunctionType, torch.dtype}
)
"""Kinds of objects that deepcopy hands out as they are."""

HELD = frozenset({dict, OrderedDict, set})
"""Kinds of what every module holds, most of it empty."""

SEEN_THROUGH = ATOMIC | HELD | {list, tuple}
"""Kinds of attributes that are no tensors."""

NEW_OBJECT: Any = copyreg.__newobj__  # type: ignore[attr-defined]
"""What makes an object of a class that has no way of its own to be taken apart."""

_SEALED: set[type] = set()
"""Kinds of objects that did not let themselves be copied so far."""


def deep_copy(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A copy of a model; what `memo` names by its id stays, or becomes what stands there.

    What deepcopy refuses does not keep a model from being copied: tensors with history in lists and objects of the
    model are copied without it, and locks, files, threads and handles of other libraries are shared with the copy.

    Raises:
        ModelError: the model cannot be copied.
    """
    memo = {} if memo is None else memo
    wrapped: list[tuple[nn.Module, str, FunctionType]] = []
    for module in modules_of(model):
        for key, value in vars(module).items():
            kind = type(value)
            if kind is FunctionType and value.__closure__:
                wrapped.append((module, key, value))
            elif kind not in SEEN_THROUGH and isinstance(value, Tensor) and value.grad_fn is not None:
                # Old-style weight_norm and prune keep a computed tensor as an attribute, which deepcopy refuses.
                memo[id(value)] = value.detach().clone()
    try:
        return _copied(model, memo, {}, wrapped)
    except Exception as error:
        refusal = error
    for trying in (False, True):
        shared = _shared(model, memo, trying=trying)
        try:
            return _copied(model, memo, shared, wrapped)
        except Exception as error:
            refusal = error
    raise ModelError(f"The model cannot be copied: {type(refusal).__name__}: {refusal}") from refusal


def modules_of(model: nn.Module) -> Iterator[nn.Module]:
    """All modules of a tree, each once; `Module.modules` hands every one of them up through all levels above it."""
    seen, waiting = {id(model)}, [model]
    while waiting:
        module = waiting.pop()
        yield module
        for part in module._modules.values():
            if part is not None and id(part) not in seen:
                seen.add(id(part))
                waiting.append(part)


def _copied(
    model: nn.Module,
    memo: dict[int, Any],
    shared: Mapping[int, Any],
    wrapped: Sequence[tuple[nn.Module, str, FunctionType]],
) -> nn.Module:
    """A copy, and in `memo` what became of everything in it."""
    copies = {**memo, **shared}  # deepcopy trusts ids: `memo` and `shared` hold what they belong to
    copied: nn.Module = _copy(model, copies)
    for module, key, value in wrapped:
        own = copies.get(id(module), module)
        if own is not module and isinstance(own, type(module)) and vars(own).get(key) is value:
            vars(own)[key] = _rebound(value, copies)
    memo.update(copies)
    return copied


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    """What `copy.deepcopy(value, memo)` gives; modules, which have a dozen dictionaries for hooks, in half its time."""
    kind = type(value)
    if kind in ATOMIC:
        return value
    if (known := memo.get(id(value), memo)) is not memo:
        return known
    if kind is tuple and ATOMIC.issuperset(map(type, value)):
        return value
    if kind is dict or (kind is OrderedDict and not vars(value)):
        return _copy_of_entries(value, memo)
    if kind is set and ATOMIC.issuperset(map(type, value)):
        memo[id(value)] = made = set(value)
        return made
    return _copy_of_module(value, memo) if isinstance(value, nn.Module) else copy.deepcopy(value, memo)


def _bare(held: Any) -> bool:
    """Whether a container is empty, and has no attributes either."""
    return not held and not getattr(held, "__dict__", None)


def _copy_of_entries(entries: dict[Any, Any], memo: dict[int, Any]) -> dict[Any, Any]:
    """A copy of a dictionary; this is the loop in which copies of models spend their time."""
    made: dict[Any, Any] = type(entries)()
    memo[id(entries)] = made
    for key, item in entries.items():
        kind = type(item)
        own = key if type(key) is str or type(key) in ATOMIC else _copy(key, memo)
        if kind in ATOMIC:
            made[own] = item
        elif kind in HELD and not item and id(item) not in memo and not (kind is OrderedDict and vars(item)):
            made[own] = memo[id(item)] = kind()
        else:
            made[own] = _copy(item, memo)
    return made


def _copy_of_module(module: nn.Module, memo: dict[int, Any]) -> Any:
    """A copy of a module as pickle would take it apart; the class's own, where it has one."""
    kind = type(module)
    plain = kind.__getattr__ is nn.Module.__getattr__ and "__deepcopy__" not in vars(module)
    if kind not in copyreg.dispatch_table and not hasattr(kind if plain else module, "__deepcopy__"):
        taken: Any = module.__reduce_ex__(4)
        if taken[:2] == (NEW_OBJECT, (kind,)) and type(taken[2]) is dict and not any(taken[3:]):
            made: Any = kind.__new__(kind)
            memo[id(module)] = made
            memo.setdefault(id(memo), []).append(taken)  # as deepcopy does: what stands in the memo must live
            made.__setstate__(_copy(taken[2], memo))
            return made
    for each in module.modules():
        empty = (value for value in vars(each).values() if type(value) in HELD and _bare(value))
        memo.update({id(value): type(value)() for value in empty if id(value) not in memo})
    return copy.deepcopy(module, memo)


def _rebound(function: FunctionType, copies: Mapping[int, Any]) -> FunctionType:
    """A function that is kept on a module (a wrapped forward), for the copy: its closure names the original's parts."""

    def moved(value: Any) -> Any:
        if isinstance(value, nn.Module):
            return copies.get(id(value), value)
        if isinstance(value, MethodType) and id(value.__self__) in copies:
            return MethodType(value.__func__, copies[id(value.__self__)])
        return _rebound(value, copies) if isinstance(value, FunctionType) and value.__closure__ else value

    cells, changed = [], False
    for cell in function.__closure__ or ():
        try:
            content = cell.cell_contents
        except ValueError:  # not bound yet
            cells.append(cell)
            continue
        new = content if content is function else moved(content)
        changed |= new is not content
        cells.append(CellType(new) if new is not content else cell)
    if not changed:
        return function
    bound = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells)
    )
    bound.__kwdefaults__ = function.__kwdefaults__
    vars(bound).update({key: moved(value) for key, value in vars(function).items()})
    return bound


def _shared(model: nn.Module, memo: Mapping[int, Any], *, trying: bool) -> dict[int, Any]:
    """What a copy of the model is to hold in the place of things that deepcopy refuses, by their ids.

    Args:
        model: is looked through, with the containers and objects that it holds.
        memo: what is settled already.
        trying: whether to try objects of kinds that are not known to refuse.

    Raises:
        ModelError: something that a run would use up, or a sealed object that holds parts of the model.
    """
    search = _Search(model, memo, trying=trying)
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in {"_parameters", "_buffers", "_modules", NOTED}:
                search.visit(value, f"{name}.{key}".lstrip("."))
    return search.shared


class _Search:
    """A walk through what a model holds.

    Attributes:
        shared: what copies hold instead, by id.
        parts: modules, parameters and buffers of the model, by id.
    """

    def __init__(self, model: nn.Module, memo: Mapping[int, Any], *, trying: bool) -> None:
        self.memo, self.trying = memo, trying
        self.shared: dict[int, Any] = {}
        self.parts = {id(part): part for part in (*model.modules(), *model.parameters(), *model.buffers())}
        self.seen: dict[int, bool] = {}

    def visit(self, value: Any, path: str) -> bool:
        """Look into one value; whether it holds a part of the model."""
        if id(value) in self.parts:
            return True
        if id(value) in self.seen:
            return self.seen[id(value)]
        if isinstance(value, (*PLAIN, FunctionType)) or id(value) in self.memo:
            return False
        self.seen[id(value)] = False
        if isinstance(value, Tensor):
            if value.grad_fn is not None:
                self.shared[id(value)] = value.detach().clone()
            return False
        holds = self.seen[id(value)] = self._visit_parts(value, path)
        return holds

    def _visit_parts(self, value: Any, path: str) -> bool:
        if isinstance(value, CONSUMED):
            raise ModelError(
                f"The model cannot be copied: '{path}' is a {type(value).__name__}, which runs of the model would use "
                "up. Take it off the model."
            )
        if isinstance(value, ModuleType) or type(value).__module__.partition(".")[0] in SHARED_ROOMS:
            self.shared[id(value)] = value
            return False
        holds = False
        items: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, dict) else ()
        if isinstance(value, list | tuple | set | frozenset | deque):
            items = enumerate(value)
        for key, item in (*items, *attributes_of(value).items()):
            holds |= self.visit(item, f"{path}.{key}")
        if not isinstance(value, dict | list | tuple | set | frozenset | deque | nn.Module) and not self._copies(value):
            if holds:
                raise ModelError(
                    f"The model cannot be copied: '{path}', a {type(value).__name__}, refuses to be, and holds parts "
                    "of the model. Take it off the model, or give its class a __deepcopy__."
                )
            self.shared[id(value)] = value
        return holds

    def _copies(self, value: Any) -> bool:
        """Whether an object lets itself be copied, once what is refused inside of it is shared."""
        if type(value) in _SEALED:
            return False
        if self.trying:
            try:
                with torch.no_grad():
                    copy.deepcopy(value, {**self.memo, **self.parts, **self.shared})
            except Exception:  # whatever its class raises
                _SEALED.add(type(value))
                return False
        return True

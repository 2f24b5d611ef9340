"""The multiply-accumulates of a running model, split by module, and the operations that nobody can count."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from taut.measure.formulas import RECURRENT, OpCall
from taut.measure.operations import CREATING, OUTER, Operation, describe_operation, outer_macs, torch_formula
from taut.measure.origins import NO_NAMES, Origins


@dataclass
class _Call:
    """A call of a module that has not returned: what the count was at its start, and what its children counted."""

    name: str
    start: int
    children: int = 0


class Tally(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The running count of a forward pass.

    Attributes:
        macs: of the whole batch so far.
        by_module: of every module that was called, submodules included.
        own: the same without submodules.
        recurrent: of every module, what fused recurrent layers took.
        uncounted: for a module and an operation that may multiply and is not counted: the parameters that it reads.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        """Prepare for one run of `model`."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs = 0
        self.by_module: dict[str, int] = {}
        self.own: dict[str, int] = {}
        self.recurrent: dict[str, int] = defaultdict(int)
        self.uncounted: dict[tuple[str, str], dict[str, None]] = {}
        self._origins = Origins(model)
        self._operations: dict[Any, Operation] = {}
        self._calls: list[_Call] = []

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Count every operation, and every call of every module of `model`."""
        names = {module: name for name, module in model.named_modules()}
        handles = []
        try:
            for module, name in names.items():
                if not isinstance(module, torch.jit.ScriptModule):  # refuses hooks
                    handles.append(module.register_forward_pre_hook(self._entering(name), prepend=True))
                    handles.append(module.register_forward_hook(self._leaving(name), always_call=True))
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, name: str) -> Callable[..., None]:
        def enter(_module: nn.Module, _args: Any) -> None:
            self._calls.append(_Call(name, self.macs))

        return enter

    def _leaving(self, name: str) -> Callable[..., None]:
        def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
            call = self._calls.pop()
            macs = self.macs - call.start
            self.own[name] = self.own.get(name, 0) + macs - call.children
            if self._calls:
                self._calls[-1].children += macs
            if all(outer.name != name for outer in self._calls):  # what calls itself is counted by its outermost call
                self.by_module[name] = self.by_module.get(name, 0) + macs

        return leave

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation and note what it took."""
        kwargs = kwargs or {}
        if any(kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ for kind in types):
            return NotImplemented  # a tensor class of its own: it runs other operations, which are seen then
        if not isinstance(func, torch._ops.OpOverload):
            return self._run_higher_order(func, args, kwargs)
        operation = self._operations.get(func)
        if operation is None and not any(tensor.is_nested for tensor in _tensors((args, kwargs))):
            with self:  # one that is made of others is seen whole in inference mode only
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
            operation = self._operations[func] = describe_operation(func)
        out = func(*args, **kwargs)
        self._record(operation or describe_operation(func), OpCall(args, kwargs, out))
        return out

    def _run_higher_order(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation that takes functions (cond, scan, flex_attention), and count what those do."""
        formula = torch_formula(func)
        if formula is not None:
            out = func(*args, **kwargs)
            self.macs += formula(OpCall(args, kwargs, out))
            return out
        if not any(_is_function(item) for item in args):
            self._note(str(func), self._parameters(_tensors((args, kwargs))))
        return func(*(self._watched(item) if _is_function(item) else item for item in args), **kwargs)

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return run

    def _record(self, operation: Operation, call: OpCall) -> None:
        """Add what one call took, or note that nobody knows; then follow what became of the parameters."""
        operands = list(_tensors((call.args, call.kwargs)))
        origins = [self._origins.of(tensor) for tensor in operands]
        parameters = NO_NAMES.union(*(names for names in origins if names))
        reads_input = operation.random or None in origins
        macs = operation.macs(call)
        if macs is not None:
            self.macs += macs
            if operation.name in RECURRENT:
                self.recurrent[self._module()] += macs
        elif parameters and reads_input and operation.name in OUTER:
            self.macs += outer_macs(operands, call.result)
        elif operands and not operation.light:
            self._note(operation.title, parameters)
        if operation.name in CREATING:
            self._origins.add(_tensors(call.out), NO_NAMES)
        elif reads_input:
            self._origins.drop(_tensors(operation.written(call)))
        else:
            self._origins.add(_tensors((call.out, operation.written(call))), parameters)

    def _parameters(self, operands: Iterable[Tensor]) -> frozenset[str]:
        return NO_NAMES.union(*(self._origins.of(tensor) or NO_NAMES for tensor in operands))

    def _module(self) -> str:
        return self._calls[-1].name if self._calls else ""

    def _note(self, title: str, parameters: frozenset[str]) -> None:
        self.uncounted.setdefault((self._module(), title), {}).update(dict.fromkeys(sorted(parameters)))


def _is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, Tensor | torch._ops.OperatorBase)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in the nested arguments of an operation."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)

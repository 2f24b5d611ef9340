"""Which tensors of a running model are its parameters, or are made of parameters alone."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

NO_NAMES: frozenset[str] = frozenset()


class Origins:
    """The parameters behind every tensor that does not depend on the model's input.

    Parameters, their views, casts, products with each other or with a constant (a buffer, a tensor that is new) have
    names; constants have none; what is not listed depends on the input. Tensors are known by their storage, so that
    views need no bookkeeping.
    """

    def __init__(self, model: nn.Module) -> None:
        """List what `model` holds."""
        self._names: dict[int, frozenset[str]] = {}
        self._kept: dict[int, object] = {}  # as long as these live no other tensor has their key
        self._fixed: set[int] = set()
        for name, parameter in model.named_parameters():
            self._hold(parameter, frozenset({name}))
        for module in model.modules():
            for value in (*module.buffers(recurse=False), *vars(module).values()):
                if isinstance(value, Tensor):
                    self._hold(value, NO_NAMES)

    def _hold(self, tensor: Tensor, names: frozenset[str]) -> None:
        """List a tensor of the model; one of a class that wraps other tensors with what it wraps."""
        if is_traceable_wrapper_subclass(tensor):
            for attribute in tensor.__tensor_flatten__()[0]:
                self._hold(getattr(tensor, attribute), names)
            return
        self.add([tensor], names)
        if names:
            self._fixed.add(_key(tensor))

    def of(self, tensor: Tensor) -> frozenset[str] | None:
        """The parameters that a tensor is made of, None where it depends on the input."""
        return self._names.get(_key(tensor))

    def add(self, tensors: Iterable[Tensor], names: frozenset[str]) -> None:
        """List tensors that are made of these parameters alone."""
        for tensor in tensors:
            key = _key(tensor)
            before = self._names.get(key)
            if before is None:
                self._kept[key] = tensor if key == id(tensor) else _weak(tensor)
            self._names[key] = names if before is None else before | names

    def drop(self, tensors: Iterable[Tensor]) -> None:
        """What depends on the input was written into these tensors."""
        for tensor in tensors:
            if _key(tensor) not in self._fixed:
                self._names.pop(_key(tensor), None)


def _weak(tensor: Tensor) -> object:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def _key(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse and opaque tensors have no storage
        return id(tensor)

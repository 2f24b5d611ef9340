"""A replacement that still answers what other code asks of the layer that it replaces."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

Answer = int | float | str | tuple[int, ...] | None
"""A size, a setting; of a tensor its shape."""

TENSORS = "weight", "bias"
"""The attributes of a layer that are tensors."""

ASKED = frozenset(
    "dtype device layout requires_grad is_cuda is_cpu is_meta is_mps is_xpu is_sparse is_quantized is_nested is_leaf "  # noqa: SIM905
    "is_floating_point is_complex element_size itemsize new_zeros new_ones new_empty new_full new_tensor".split()
)
"""What is the same for every tensor of this dtype, on this device."""

LIKE = frozenset("zeros_like ones_like empty_like full_like rand_like randn_like".split())  # noqa: SIM905
"""Functions that take a shape, a dtype and a device from a tensor, and no values."""

KINDS = frozenset("to type_as is_floating_point is_complex".split())  # noqa: SIM905
"""Functions that take a dtype and a device from it."""


GONE = "The layer was replaced by taut and has no dense weight, whose values"


class Described:
    """Stands where a layer had its weight or bias: all that the tensor is, without its values.

    torch knows by `__torch_function__` that it is no ordinary tensor: fused paths that would read its values decline.

    Args:
        shape: of the tensor.
        owner: holds tensors of its dtype and on its device.
        values: gives the tensor itself where somebody asks for more than that; None: that is an error.
        strides: of the tensor; None: as it lies in memory by itself.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        owner: nn.Module,
        values: Callable[[], Tensor] | None = None,
        strides: tuple[int, ...] | None = None,
    ) -> None:
        """See the class."""
        self.__dict__.update(_shape=torch.Size(shape), _owner=owner, _values=values, _strides=strides)

    @property  # type: ignore[misc] # what isinstance asks
    def __class__(self) -> type:
        """A parameter's."""
        return nn.Parameter

    @property
    def shape(self) -> torch.Size:
        """Of the tensor."""
        size: torch.Size = self.__dict__["_shape"]
        return size

    @property
    def ndim(self) -> int:
        """How many axes it has."""
        return len(self.shape)

    @property
    def data(self) -> Described:
        """Itself, since it has no history."""
        return self

    def detach(self) -> Described:
        """Itself."""
        return self

    @property
    def grad(self) -> None:
        """None: nothing was trained."""
        return

    def stride(self, dim: int | None = None) -> tuple[int, ...] | int:
        """How far apart neighbours on every axis, or on one, lie in memory."""
        strides = self._strides_in_memory()
        return strides if dim is None else strides[dim]

    def is_contiguous(self) -> bool:
        """Whether its values lie in memory one behind the other."""
        return self._strides_in_memory() == _strides_of(self.shape)

    def _strides_in_memory(self) -> tuple[int, ...]:
        """As a replacement would say; where the tensor lies otherwise, it is asked itself."""
        strides = self.__dict__["_strides"]
        if strides in {None, _strides_of(self.shape)}:
            return _strides_of(self.shape)
        values = self.__dict__["_values"]
        return strides if values is None else values().stride()  # type: ignore[no-any-return]

    def t(self) -> Described | Tensor:
        """With its axes turned around."""
        values = self.__dict__["_values"]
        if self.ndim > 2:
            return self._dense("t").t()
        turned = None if values is None else lambda: values().t()
        strides = self.__dict__["_strides"] or _strides_of(self.shape)
        return Described(self.shape[::-1], self.__dict__["_owner"], turned, strides[::-1])

    @property
    def T(self) -> Described | Tensor:  # noqa: N802 - torch's name
        """With its axes turned around."""
        return self.t() if self.ndim < 3 else self._dense("T").T

    def size(self, dim: int | None = None) -> torch.Size | int:
        """The shape, or the length of one axis."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """How many axes it has."""
        return len(self.shape)

    def numel(self) -> int:
        """How many values it had."""
        return self.shape.numel()

    nelement = numel
    ndimension = dim

    def __len__(self) -> int:
        return self.shape[0]

    def __getattr__(self, name: str) -> Any:
        """What holds for all tensors of the kind; nothing that needs values."""
        if name in ASKED:
            return getattr(self._like(()), name)
        values = self.__dict__["_values"]
        if values is None or name.startswith("_"):  # torch itself asks for private marks
            raise AttributeError(f"{GONE} '{name}' would need.")
        return getattr(values(), name)

    def _like(self, shape: tuple[int, ...]) -> Tensor:
        """A tensor of the kind, without memory of its own for every value."""
        owner = self.__dict__["_owner"]
        held = [t for t in chain(owner.parameters(), owner.buffers()) if t.is_floating_point()]
        like = held[0] if held else torch.empty(())
        blank = torch.empty((), dtype=like.dtype, device=like.device).expand(shape)
        return blank.requires_grad_() if like.requires_grad and not shape else blank

    def _dense(self, name: str) -> Tensor:
        values = self.__dict__["_values"]
        if values is None:
            raise TypeError(f"{GONE} torch's '{name}' would need.")
        dense: Tensor = values()
        return dense

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run functions that take the kind of a tensor from it; nothing that needs values."""
        del types
        name = getattr(func, "__name__", "")

        def plain(item: Any) -> Any:
            if type(item) in {list, tuple}:
                return type(item)(map(plain, item))
            if type(item) is not cls:
                return item
            if name in KINDS | LIKE:
                return item._like(tuple(item.shape) if name in LIKE else ())
            return item._dense(name)

        return func(*map(plain, args), **{key: plain(item) for key, item in (kwargs or {}).items()})


def _strides_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _operator(name: str) -> Callable[..., Any]:
    def operator(self: Any, *args: Any) -> Any:
        return getattr(self._dense(name), name)(*args)

    return operator


OPERATORS = (
    "add radd sub rsub mul rmul truediv rtruediv pow rpow matmul rmatmul neg abs getitem setitem iter bool float int "  # noqa: SIM905
    "lt le gt ge invert floordiv rfloordiv mod rmod and or xor iadd isub imul itruediv".split()
)

for _name in OPERATORS:  # Python looks for them on the type
    setattr(Described, f"__{_name}__", _operator(f"__{_name}__"))


class Answering(nn.Sequential):
    """Layers in a row, in the place of one of which other code reads attributes: these are answered as it would.

    Attributes:
        answers: attribute -> value; of `weight` and `bias` the shape.
    """

    def __init__(self, *parts: Any, answers: Mapping[str, Answer]) -> None:
        """Layers as `nn.Sequential` takes them."""
        super().__init__(*parts)
        self.answers = dict(answers)

    def __getattr__(self, name: str) -> Any:
        """A layer by its name; or what the replaced layer would answer."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            answers = self.__dict__.get("answers", {})
            if name not in answers:
                raise
        value = answers[name]
        return Described(value, self) if name in TENSORS and value is not None else value


def read_attributes(layer: nn.Module, names: set[str]) -> dict[str, Answer]:
    """What a layer answers when it is asked for attributes that hold plain values, or for its tensors."""
    answers: dict[str, Answer] = {}
    for name in sorted(names):
        value = getattr(layer, name)
        answers[name] = tuple(value.shape) if isinstance(value, Tensor) else value
    return answers


def is_plain(value: Any) -> bool:
    """Whether an attribute's value can be answered without the layer."""
    return isinstance(value, int | float | str | None) or (
        type(value) is tuple and all(isinstance(item, int) for item in value)
    )

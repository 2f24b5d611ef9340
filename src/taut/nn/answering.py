"""A replacement that still answers what other code asks of the layer that it replaces."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from taut.nn.tensor_names import ALIASES, ASKED, HELD, KINDS, LIKE, OPERATORS, SET, is_range, writes, written

Answer = int | float | str | tuple[int, ...] | None
"""A size, a setting; of a tensor its shape."""

TENSORS = "weight", "bias"
"""The attributes of a layer that are tensors."""

GONE = "The layer was replaced by taut and has no dense weight, whose values '{}' would need."

MADE = (
    "taut computes this tensor from other parameters, or it is a part of one: what '{}' does to it would be lost. Do "
    "it to the parameters inside of the layer that was asked for it."
)


class Described:
    """Stands where a layer had its weight or bias: all that the tensor is, without its values.

    torch knows by `__torch_function__` that it is no ordinary tensor: fused paths that would read its values decline.

    Args:
        shape: of the tensor.
        owner: holds tensors of its dtype and on its device.
        values: gives the tensor itself where somebody asks for more than that; None: that is an error.
        strides: of the tensor; None: as it lies in memory by itself.
        parts: gives the parameters that it is made of, which are frozen and trained where it is.

    Where the owner holds the values in memory, as they are or as a part of them, they are written to; what is computed
    and everything that shares its memory is only read: all else is an error, as it would be lost.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        owner: nn.Module,
        values: Callable[[], Tensor] | None = None,
        strides: tuple[int, ...] | None = None,
        parts: Callable[[], Iterable[Any]] | None = None,
    ) -> None:
        """See the class."""
        self.__dict__.update(_shape=torch.Size(shape), _owner=owner, _values=values, _strides=strides, _parts=parts)

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
        """Itself, without its history."""
        values = self.__dict__["_values"]
        plain = None if values is None else lambda: values().detach()
        return Described(self.shape, self.__dict__["_owner"], plain, self.__dict__["_strides"])

    def detach(self) -> Described:
        """Itself, without its history."""
        return self.data

    @property
    def is_leaf(self) -> bool:
        """Whether an optimizer can move it."""
        held = self._held()
        return held is not None and held.is_leaf

    @property
    def retains_grad(self) -> bool:
        """False: what is held is a leaf."""
        return False

    @property
    def grad(self) -> Tensor | None:
        """Of what is held; None where it is computed, as torch has it for what is no leaf."""
        if all(t.grad is None for t in self.__dict__["_owner"].parameters()):  # without a look at values
            return None
        held = self._held()
        return None if held is None else held.grad

    def requires_grad_(self, requires_grad: bool = True) -> Described:
        """Train or freeze what it is made of."""
        self.requires_grad = requires_grad
        return self

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
        return Described(self.shape[::-1], self.__dict__["_owner"], turned, strides[::-1], self.__dict__["_parts"])

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

    def __getitem__(self, index: Any) -> Any:
        whole = self._dense("__getitem__")
        return self.seen("__getitem__", index) if is_range(index) and self._held() is None else whole[index]

    def __iter__(self) -> Any:
        return (self[number] for number in range(len(self)))

    def __getattr__(self, name: str) -> Any:
        """What holds for all tensors of the kind; nothing that needs values."""
        if name in ASKED:
            return getattr(self._like(()), name)
        values = self.__dict__["_values"]
        if values is None or name.startswith("_"):  # torch itself asks for private marks
            raise AttributeError(GONE.format(name))
        if name not in HELD | ALIASES and not writes(name):
            return getattr(values(), name)
        held = self._held()
        if held is not None:
            return getattr(held, name)
        if name not in ALIASES:
            raise AttributeError(MADE.format(name))
        return self.seen(name) if name == "mT" else partial(self.seen, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of the tensor that is held; freeze or train what it is made of."""
        held, parts = self._held(), self.__dict__["_parts"]
        if held is not None and any(held is t for t in self.__dict__["_owner"].parameters()):
            setattr(held, name, value)
        elif name == "requires_grad" and parts is not None:
            for part in parts():
                part.requires_grad = value
        elif name in SET:
            raise AttributeError((GONE if self.__dict__["_values"] is None else MADE).format(name))

    def seen(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """What torch's method `name` gives that shares the memory of values that are computed: to be read alone."""

        def view(whole: Tensor) -> Any:
            attribute = getattr(whole.contiguous() if in_a_row else whole, name)
            return attribute(*args, **kwargs) if callable(attribute) else attribute

        values, owner, in_a_row = self.__dict__["_values"], self.__dict__["_owner"], self.is_contiguous()
        form = view(torch.empty(self.shape, device="meta"))
        if isinstance(form, Tensor):
            return Described(form.shape, owner, lambda: view(values()), form.stride())

        def part_of(number: int) -> Tensor:
            part: Tensor = view(values())[number]
            return part

        numbered = enumerate(form)
        return tuple(Described(part.shape, owner, partial(part_of, k), part.stride()) for k, part in numbered)

    def _held(self) -> Tensor | None:
        """The values where the owner holds them in memory; None where they are computed, or there are none."""
        values, owner = self.__dict__["_values"], self.__dict__["_owner"]
        if values is None:
            return None
        found: Tensor = values()
        places = {t.untyped_storage().data_ptr() for t in chain(owner.parameters(), owner.buffers())}
        return found if found.untyped_storage().data_ptr() in places else None

    def _like(self, shape: tuple[int, ...]) -> Tensor:
        """A tensor of the kind, without memory of its own for every value."""
        owner = self.__dict__["_owner"]
        parts = self.__dict__["_parts"]
        held = [
            t for t in chain(parts() if parts else (), owner.parameters(), owner.buffers()) if t.is_floating_point()
        ]
        like = held[0] if held else torch.empty(())
        blank = torch.empty((), dtype=like.dtype, device=like.device).expand(shape)
        return blank.requires_grad_() if like.requires_grad and not shape else blank

    def _dense(self, name: str) -> Tensor:
        values = self.__dict__["_values"]
        if values is None:
            raise TypeError(GONE.format(name))
        dense: Tensor = values()
        if writes(name) and self._held() is None:
            raise TypeError(MADE.format(name))
        return dense

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run functions that take the kind of a tensor from it, or its values where there are some."""
        del types
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        into = written(name, args, kwargs)
        first = args[0] if args else None
        if name in ALIASES and type(first) is cls and first._dense(name) is not None and first._held() is None:
            return first.seen(name, *args[1:], **kwargs)

        def plain(item: Any) -> Any:
            if type(item) in {list, tuple}:
                return type(item)(map(plain, item))
            if type(item) is not cls:
                return item
            if name in KINDS | LIKE:
                return item._like(tuple(item.shape) if name in LIKE else ())
            return item._dense(f"{name.strip('_')}_" if any(item is one for one in into) else name.strip("_"))

        return func(*map(plain, args), **{key: plain(item) for key, item in kwargs.items()})


def _strides_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _operator(name: str) -> Callable[..., Any]:
    def operator(self: Any, *args: Any) -> Any:
        return getattr(self._dense(name), name)(*args)

    return operator


for _name in set(OPERATORS) - {"getitem", "iter"}:  # Python looks for them on the type
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
        if name not in TENSORS or value is None:
            return value
        return Described(value, self, parts=lambda: self._made_of(bias=name == "bias"))

    def _made_of(self, *, bias: bool) -> list[nn.Parameter]:
        """The parameters in the place of the layer's weight, or of its bias."""
        return [p for name, p in self.named_parameters() if name.endswith("bias") == bias]


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

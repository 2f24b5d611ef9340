"""What code sees of a weight that became a layer: it is turned, split, cut and multiplied by as a tensor is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from taut.nn.answering import MADE, Described
from taut.nn.product_forms import Contraction, contraction_of
from taut.nn.tensor_names import ALIASES, ASKED, HELD, KINDS, LIKE, OPERATORS, SET, is_range, writes, written
from taut.nn.weight_axes import CHOSEN, VIEWS, Axes, NoView, length
from taut.nn.weight_parts import CUTS, Ranged
from taut.nn.weight_values import seen_of

GONE = "The weight was made a layer by taut, and has no values of its own, which"


class Multiplied:
    """What a weight that became a layer and its views have in common: they are multiplied by, and turned around."""

    def seen(self) -> View:
        """What there is to see."""
        raise NotImplementedError

    def _like(self) -> Tensor:
        like: Tensor = self.seen().product.like()
        return like

    @property
    def shape(self) -> torch.Size:
        """Of the weight."""
        return torch.Size([length(axis) for axis in self.seen().axes])

    @property
    def ndim(self) -> int:
        """How many axes it has."""
        return len(self.seen().axes)

    @property
    def dtype(self) -> torch.dtype:
        """Of the layer's values."""
        return self._like().dtype

    @property
    def device(self) -> torch.device:
        """Of the layer's values."""
        return self._like().device

    @property
    def requires_grad(self) -> bool:
        """Whether the layer is trained."""
        return self._like().requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        """Train or freeze the layer, where all of the weight is."""
        if not isinstance(self, nn.Module):
            raise AttributeError(MADE.format("requires_grad"))
        self.requires_grad_(value)

    def size(self, dim: int | None = None) -> torch.Size | int:
        """The shape, or the length of one axis."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """How many axes it has."""
        return self.ndim

    def numel(self) -> int:
        """How many values it would have."""
        return self.shape.numel()

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def T(self) -> Any:  # noqa: N802 - torch's name
        """With its axes turned around."""
        return self.seen().turned("T")

    @property
    def mT(self) -> Any:  # noqa: N802 - torch's name
        """With its last two axes turned around."""
        return self.seen().turned("mT")

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Itself, in the dtype and on the device that it has; it is not moved by this: move the whole model."""
        return self.seen().cast("to", *args, **kwargs)

    def type_as(self, other: Any) -> Any:
        """Itself, in the dtype that it has."""
        return self.seen().cast("to", other.dtype)

    def float(self) -> Any:
        """Itself, in single precision."""
        return self.seen().cast("to", torch.float32)

    def double(self) -> Any:
        """Itself, in double precision."""
        return self.seen().cast("to", torch.float64)

    def half(self) -> Any:
        """Itself, in half precision."""
        return self.seen().cast("to", torch.float16)

    def bfloat16(self) -> Any:
        """Itself, in bfloat16."""
        return self.seen().cast("to", torch.bfloat16)

    def type(self, dtype: Any = None) -> Any:
        """Itself, in the dtype that it has."""
        return self.seen().cast("to", dtype)

    def __getitem__(self, index: Any) -> Any:
        return self.seen().part(index)

    def __iter__(self) -> Any:
        return iter(self.seen().unbind())

    def __matmul__(self, other: Any) -> Any:
        return answered(torch.matmul, (self, other), {})

    def __rmatmul__(self, other: Any) -> Any:
        return answered(torch.matmul, (other, self), {})

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run products by the layer, and turn the weight around; nothing that needs its values."""
        del types
        return answered(func, args, kwargs or {})


def _operator(name: str) -> Callable[..., Any]:
    def operator(self: Multiplied, *args: Any) -> Any:
        return self.seen().other(name, args)

    return operator


for _name in set(OPERATORS) - {"matmul", "rmatmul", "getitem", "iter", "bool"}:  # Python looks for them on the type
    setattr(Multiplied, f"__{_name}__", _operator(f"__{_name}__"))


def _refused(name: str) -> Callable[..., None]:
    def refuse(*_: Any) -> None:
        raise AttributeError(MADE.format(name))

    return refuse


for _name in SET - {"requires_grad"}:  # what is read of them is asked for like all else
    setattr(Multiplied, _name, property(None, _refused(_name)))


class View(Ranged, Multiplied):
    """A weight that became a layer, seen with its axes in another order, split, merged or in part.

    Args:
        product: the layer in the weight's place.
        axes: what of the weight is where (`taut.nn.weight_axes`).
        starts: the first index that is seen, along every axis of the weight.
        values: the view itself, while uses are noted; None: there are none.
        chosen: which parts of the first axis are seen, where these are chosen by a tensor.

    Attributes:
        kind: the dtype that it was cast to, with fewer bits than the weight's; None: it was not.
        inputs: of a whole weight of two axes, which of them products sum over where a layer can run them as it is.
    """

    inputs: int | None = None
    kind: torch.dtype | None = None

    def __init__(
        self,
        product: Any,
        axes: Axes,
        starts: tuple[int, ...],
        values: Tensor | None = None,
        chosen: Tensor | None = None,
    ) -> None:
        """See the class."""
        self.product, self.axes, self.starts, self.values, self.chosen = product, axes, starts, values, chosen

    def seen(self) -> View:
        """Itself."""
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Of the layer's values, or what they were cast to."""
        like: torch.dtype = self.product.like().dtype
        return self.kind or like

    def other_view(self, axes: Axes, starts: tuple[int, ...], values: Tensor | None, chosen: Tensor | None) -> View:
        """Another view of the same weight in the same dtype."""
        view = View(self.product, axes, starts, values, chosen)
        view.kind = self.kind
        return view

    def turned(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """The view that torch's function or attribute `name` gives."""
        try:
            axes = VIEWS[name](self.axes, *args, **kwargs)
        except (NoView, IndexError, ValueError, TypeError):
            return self.other(name, args, kwargs)
        view = self.other_view(axes, self.starts, self._really(name, args, kwargs), self.chosen)
        if self.inputs is not None and name in {"T", "t", "mT"}:
            view.inputs = 1 - self.inputs
        return view

    def _really(self, name: str, args: Any = (), kwargs: Any = None) -> Tensor | None:
        if self.values is None:
            return None
        attribute = getattr(self.values, name)
        view: Tensor = attribute(*args, **(kwargs or {})) if callable(attribute) else attribute
        return view

    def other(self, name: str, args: Any = (), kwargs: Any = None) -> Any:
        """What needs values: the weight's own, and a note; or what the layer multiplies by.

        Raises:
            TypeError: it writes into them.
        """
        whole = self.whole(name)
        if self.values is None and (name in ALIASES or (name == "__getitem__" and is_range(*args))):
            return self.to_read().seen(name, *args, **(kwargs or {}))
        attribute = getattr(whole, name)
        return attribute(*args, **(kwargs or {})) if callable(attribute) else attribute

    def to_read(self) -> Described:
        """The values, computed where they are asked for."""
        return Described(tuple(self.shape), self.product, lambda: self.whole("__getitem__"))

    def present(self, name: str) -> Tensor | None:
        """The values that are seen, for torch's function or method `name`.

        None where it writes into them, and there are none of its own; or the layers have only a part of them.
        """
        self.product.note(name)
        if self.values is not None:
            return self.values
        apart = self._is_of_one()
        weight = None if writes(name) else self.product.dense(self.starts[0] if apart else None)
        if weight is None:
            return None
        starts = (0, *self.starts[1:]) if apart else self.starts
        seen = seen_of(weight, self.axes, starts, self.chosen)
        return seen if self.kind is None else seen.to(self.kind)

    def _is_of_one(self) -> bool:
        """Whether it shows one matrix alone of a stack that is one layer."""
        return self.product.stacked and not any(atom[0] in {0, CHOSEN} for axis in self.axes for atom in axis)

    def whole(self, name: str) -> Tensor:
        """As `present`.

        Raises:
            TypeError: there are none.
        """
        values = self.present(name)
        if values is None:
            raise TypeError(f"{GONE} torch's '{name}' would need.")
        return values

    def cast(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Itself where a cast changes nothing, or takes bits away, as code does under autocast."""
        blank = torch.empty((), dtype=self.dtype, device=self.device)
        cast = getattr(blank, name)(*args, **kwargs)
        if (cast.dtype, cast.device) == (blank.dtype, blank.device):
            return self
        floats = cast.is_floating_point() and blank.is_floating_point() and cast.device == blank.device
        if not floats or torch.finfo(cast.dtype).bits >= torch.finfo(blank.dtype).bits:
            return self.other(name, args, kwargs)
        view = View(self.product, self.axes, self.starts, self._really(name, args, kwargs), self.chosen)
        view.kind = cast.dtype
        return view

    def __getattr__(self, name: str) -> Any:
        """As of a tensor."""
        return asked(self, name)


STRAIGHT = {"linear": 1, "matmul": 0, "__matmul__": 0}
"""torch's names for products that a layer does as they are, with a weight on the right -> the axis that is summed."""


def asked(weight: Multiplied, name: str) -> Any:
    """An attribute of a weight that became a layer, by the name that a tensor has for it.

    Raises:
        AttributeError: there is none, or it would need values that are held somewhere.
    """
    view = weight.seen()
    if name in VIEWS:
        return lambda *args, **kwargs: view.turned(name, *args, **kwargs)
    if name in CUTS:
        return getattr(view, name)
    if name == "is_leaf" and view.values is None:
        return False
    if name in ALIASES and view.values is None:
        return lambda *args, **kwargs: view.other(name, args, kwargs)
    if name in ASKED:
        return getattr(_of_its_kind(view), name)
    known = not name.startswith("_") and hasattr(torch.Tensor if view.values is None else view.values, name)
    if known and (view.values is not None or name not in HELD):
        values = view.present(name)
        if values is not None:
            return getattr(values, name)
    raise AttributeError(f"{GONE} '{name}' would need.")


def _of_its_kind(view: View) -> Tensor:
    """A tensor of the shape, dtype and device of a view, without values of its own."""
    return torch.empty((), dtype=view.dtype, device=view.device).expand(tuple(view.shape))


def _known(item: Any) -> bool:
    return isinstance(item, Multiplied)


def _as_it_is(summed: int, x: Any, weight: Any, bias: Any = None) -> Tensor | None:
    """A product that a layer does as it is, with its bias; None where it is another one."""
    if not isinstance(weight, Multiplied) or isinstance(bias, Multiplied) or isinstance(x, Multiplied):
        return None
    view = weight.seen()
    if view.inputs != summed or view.kind is not None:
        return None
    output: Tensor = view.product(x)
    return output if bias is None else output + bias.to(output.dtype)


def answered(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What torch's function gives for a weight that became a layer.

    Raises:
        TypeError: it needs the weight's values.
    """
    name = getattr(func, "__name__", "")
    first = args[0] if args else None
    if name in STRAIGHT and not kwargs and (output := _as_it_is(STRAIGHT[name], *args)) is not None:
        return output
    if isinstance(first, Multiplied) and name in VIEWS:
        return first.seen().turned(name, *args[1:], **kwargs)
    if isinstance(first, Multiplied) and name in CUTS:
        return getattr(first.seen(), name)(*args[1:], **kwargs)
    form = contraction_of(name, _known, args, kwargs)
    if form is not None:
        output = _product_of(form)
        if output is not None:
            return form.finish(output)
    return _by_values(name, func, args, kwargs)


def _product_of(form: Contraction) -> Tensor | None:
    """What the layer gives; by a weight that was cast in its own dtype, rounded afterwards, if autocast does not."""
    view, x = form.weight.seen(), form.x
    product, kind = view.product, view.kind
    output: Tensor | None
    if kind is None or torch.is_autocast_enabled(x.device.type):
        output = product.multiplied(form)
        return output
    if x.dtype != kind:
        return None
    output = product.multiplied(replace(form, x=x.to(product.like().dtype)))
    return None if output is None else output.to(kind)


def _by_values(name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What a function gives that takes the kind of a tensor from the weight, or its values, where there are some."""

    def plain(item: Any) -> Any:
        if type(item) in {list, tuple}:
            return type(item)(map(plain, item))
        if not isinstance(item, Multiplied):
            return item
        view = item.seen()
        if name in KINDS | LIKE:
            return _of_its_kind(view)
        return view.whole(f"{name.strip('_')}_" if any(item is one for one in into) else name.strip("_"))

    into = written(name, args, kwargs)
    return func(*map(plain, args), **{key: plain(item) for key, item in kwargs.items()})

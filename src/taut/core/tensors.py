"""Tensors in nests of lists, tuples, dicts and objects."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from taut.core.nested import attributes_of, is_row


def plain(value: Any) -> Any:
    """The same nest with every Mapping, such as a tokenizer's output, as a dict, and arrays of numbers as tensors.

    That is what torch's utilities see into.
    """
    if isinstance(value, np.ndarray):
        return as_tensor(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if type(value) in {list, tuple}:
        return type(value)(plain(item) for item in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(plain, value))
    return value


def as_tensor(array: np.ndarray[Any, Any]) -> Any:
    """An array of numbers as a tensor on the same memory, where it may be written to; any other as it is."""
    if array.dtype.kind not in "biufc" or array.dtype.itemsize * 8 > WIDEST[array.dtype.kind]:
        return array
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    fit = native.flags.writeable and all(stride >= 0 for stride in native.strides)
    return torch.from_numpy(native if fit else native.copy())


WIDEST = {"b": 8, "i": 64, "u": 64, "f": 64, "c": 128}
"""Bits of the widest numbers of each kind that a tensor holds."""


def tensors(value: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples, dicts and registered containers, in order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def placed(value: Any) -> list[tuple[str, Tensor]]:
    """All tensors with the way to each, such as `['ids']` or `[0]`, in order."""
    leaves = pytree.tree_flatten_with_path(value)[0]
    return [(pytree.keystr(path), leaf) for path, leaf in leaves if isinstance(leaf, Tensor)]


def opened(value: Any, depth: int = 4) -> Any:
    """The same nest with every Mapping and every object that torch's utilities do not see into as a dict.

    Caches of keys and values are left out: they are no answer, but what saves the next run work. So are losses, which
    are of the whole batch.
    """
    if is_cache(value):
        return None
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        value = dict(zip(value._fields, value, strict=True))
    if isinstance(value, Mapping):
        return {key: opened(item, depth) for key, item in value.items() if not _is_beside(key, item)}
    if type(value) in {list, tuple}:
        return type(value)(opened(item, depth) for item in value)
    foreign = depth and not callable(value) and pytree.tree_structure(value).is_leaf()
    if foreign and not isinstance(value, (Tensor, nn.Module, type, *NUMBERS)) and all_tensors(value):
        return opened(attributes_of(value), depth - 1)
    return value


def _is_beside(key: Any, item: Any) -> bool:
    """Whether an entry of an output is a cache or a loss."""
    return is_cache(item) or (isinstance(item, Tensor) and not item.ndim and str(key).endswith("loss"))


def is_cache(value: Any) -> bool:
    """Whether an output is a cache of keys and values, by the names of its class."""
    return not isinstance(value, Tensor) and any(kind.__name__.endswith("Cache") for kind in type(value).__mro__)


NUMBERS = bool, int, float, complex, np.ndarray, np.generic
"""What an output holds in the place of tensors."""


def all_tensors(value: Any) -> list[Tensor]:
    """`tensors`, and those in attributes of objects that torch's containers do not know, such as dataclasses."""
    return [leaf for leaf in _leaves(value) if isinstance(leaf, Tensor)]


def all_values(value: Any) -> list[Tensor]:
    """`all_tensors`, and arrays and plain numbers as tensors of the widest type of their kind."""
    values = (leaf if isinstance(leaf, Tensor) else _as_tensor(leaf) for leaf in _leaves(value))
    return [value for value in values if value is not None]


def _leaves(value: Any, depth: int = 4) -> Iterator[Any]:
    """Tensors and numbers in a nest, in order, those in attributes of its objects included."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, (Tensor, *NUMBERS)):
            yield leaf
        elif depth and isinstance(leaf, Mapping):
            yield from _leaves(list(leaf.values()), depth - 1)
        elif depth and not isinstance(leaf, type | nn.Module):
            yield from _leaves(attributes_of(leaf), depth - 1)


def _as_tensor(number: Any) -> Tensor | None:
    array = np.asarray(number)
    kinds = {"b": np.bool_, "i": np.int64, "u": np.int64, "f": np.float64, "c": np.complex128}
    kind = kinds.get(array.dtype.kind)  # texts and integers beyond 64 bits have none
    return None if kind is None else torch.from_numpy(array.astype(kind))


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same nest with `function` applied to every tensor."""
    return pytree.tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, value)


def detached(value: Any) -> Any:
    """The same nest without autograd history; inference tensors become normal ones."""
    return map_tensors(lambda t: t.detach().clone() if t.is_inference() else t.detach(), value)


def on_device(value: Any, device: torch.device) -> Any:
    """The same nest on `device`."""
    return map_tensors(lambda t: t.to(device), value)


def structure_of(value: Any) -> Any:
    """What two inputs of one model have in common: containers, and the rank and number class of every tensor."""
    if isinstance(value, Tensor):
        return ("tensor", value.ndim, value.is_floating_point())
    if isinstance(value, Mapping):
        return ("mapping", tuple((key, structure_of(value[key])) for key in sorted(value, key=str)))
    if is_row(value):
        return ("numbers", type(value[0]).__name__)
    if isinstance(value, list | tuple):
        return ("sequence", tuple(structure_of(item) for item in value))
    return type(value).__name__


SHOWN = 3
"""Numbers of a row that a message tells one by one."""


def describe(value: Any) -> str:
    """The structure of an input in words for an error message: `(float32[8, 3, 32, 32], int64[8])`.

    More than three of a kind are told once: `[16 x int[12]]`.
    """
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {describe(item)}" for key, item in value.items()) + "}"
    if is_row(value) and len(value) > SHOWN:
        return f"{type(value[0]).__name__}[{len(value)}]"
    if isinstance(value, list | tuple):
        words = [describe(item) for item in value]
        alike = len(words) > SHOWN and len(set(words)) == 1
        inner = f"{len(words)} x {words[0]}" if alike else ", ".join(words)
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    return type(value).__name__


def address(t: Tensor) -> int:
    """Where the values are; something of its own for tensors without plain memory."""
    try:
        return t.data_ptr() or id(t)
    except RuntimeError:
        return id(t)

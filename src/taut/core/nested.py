"""Nests of tensors: copies of inputs, and what lies where in them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size, type)
"""Leaves of an input that nobody can change."""


def fresh(value: Any, device: torch.device | None = None) -> Any:
    """A copy of a nest that a model may write to; what stands in it twice does so in the copy.

    Args:
        value: inputs.
        device: where the copied tensors are to be; None: where they are.
    """
    copies: dict[int, Any] = {}

    def copied(leaf: Any) -> Any:
        if isinstance(leaf, PLAIN) or callable(leaf):
            return leaf
        if id(leaf) not in copies:
            copies[id(leaf)] = _copy(leaf, device)
        return copies[id(leaf)]

    return pytree.tree_map(copied, value)


def digest(t: Tensor) -> int:
    """A number that tensors of other values have almost never in common."""
    held = t.detach().cpu().contiguous().flatten()
    return hash(held.view(torch.uint8).numpy().tobytes()) if held.numel() else 0


def lists_of(value: Any) -> list[list[Any]]:
    """The outermost lists of a nest, in order."""
    held: list[list[Any]] = []
    map_lists(lambda items: held.append(items) or items, value)  # type: ignore[func-returns-value]
    return held


def is_row(value: Any) -> bool:
    """Whether a list holds plain numbers alone, such as the lengths of sequences."""
    return type(value) is list and bool(value) and all(type(item) in (int, float) for item in value)


def rows_of(value: Any) -> list[list[Any]]:
    """The lists of plain numbers in a nest, in order."""
    rows: list[list[Any]] = []
    map_numbers(lambda row: rows.append(row) or row, value)  # type: ignore[func-returns-value]
    return rows


def map_numbers(function: Callable[[list[Any]], Any], value: Any) -> Any:
    """The same nest with `function` applied to its lists of plain numbers."""
    if is_row(value):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_numbers(function, item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map_numbers(function, item) for item in value)
    return value


def map_lists(function: Callable[[list[Any]], Any], value: Any) -> Any:
    """The same nest with `function` applied to its outermost lists."""
    if isinstance(value, list):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_lists(function, item) for key, item in value.items()}
    if type(value) is tuple:
        return tuple(map_lists(function, item) for item in value)
    return value


def attributes_of(value: Any) -> dict[str, Any]:
    """What an object holds, in its dictionary or in slots."""
    slots = [name for kind in type(value).__mro__ for name in vars(kind).get("__slots__", ())]
    return {name: getattr(value, name) for name in slots if hasattr(value, name)} | dict(getattr(value, "__dict__", {}))


def _copy(leaf: Any, device: torch.device | None) -> Any:
    if isinstance(leaf, Tensor):
        moved = leaf if device is None else leaf.to(device)
        return moved.clone() if moved is leaf else moved
    try:
        return copy.deepcopy(leaf)
    except Exception:  # an object of the user's that cannot be copied goes as it is
        return leaf

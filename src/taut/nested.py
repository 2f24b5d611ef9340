"""Copies of nested inputs."""

from __future__ import annotations

import copy
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


def _copy(leaf: Any, device: torch.device | None) -> Any:
    if isinstance(leaf, Tensor):
        moved = leaf if device is None else leaf.to(device)
        return moved.clone() if moved is leaf else moved
    try:
        return copy.deepcopy(leaf)
    except Exception:  # an object of the user's that cannot be copied goes as it is
        return leaf

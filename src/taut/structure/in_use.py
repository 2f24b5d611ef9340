"""Layers against their plain forms on what a network gives them: sizes, magnitudes and settings of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from taut.core.copying import deep_copy
from taut.core.example import Example
from taut.core.modes import evaluating
from taut.core.tensors import map_tensors
from taut.errors import ModelError
from taut.structure.coverage import seeded
from taut.structure.surgery import forget_hooks, shallow

Compare = Callable[[str, Any, Any, Any], bool]
"""Whether a layer computes the same as its plain form: its name, a copy in float64, arguments and keywords."""

Few = Callable[[Any, Any, Any], tuple[Any, Any]]
"""A call cut to what is enough to tell: the layer, its arguments and keywords."""


def unlike_in_use(
    model: nn.Module, example: Example, names: Iterable[str], paths: Sequence[Any], same: Compare, few: Few
) -> set[str]:
    """The layers that compute something else than their plain form on what they are given.

    Args:
        model: the network.
        example: how it is called.
        names: the layers.
        paths: inputs of the network.
        same: compares a layer with its plain form.
        few: makes a call small.
    """
    names = list(names)
    unlike: set[str] = set()
    seen: set[Any] = set()

    def check(name: str) -> Any:
        def compare(module: Any, args: Any, kwargs: Any) -> None:
            signature = name, repr(map_tensors(_shape_of, (args, kwargs)))
            if name in unlike or signature in seen:
                return
            seen.add(signature)
            wide: Any = deep_copy(module).double()
            forget_hooks(wide)
            args, kwargs = map_tensors(_wide, few(module, args, kwargs))
            if not same(name, wide, args, kwargs):
                unlike.add(name)

        return compare

    for inputs in paths if names else ():
        copied = shallow(model)
        for name in names:
            copied.get_submodule(name).register_forward_pre_hook(check(name), with_kwargs=True)
        with evaluating(copied), seeded(), suppress(ModelError):
            example.run(copied, inputs)
    return unlike


def _shape_of(t: Tensor) -> Tensor:
    """A tensor's shape and dtype alone."""
    return torch.empty(t.shape, dtype=t.dtype, device="meta")


def _wide(t: Tensor) -> Tensor:
    return t.detach().double() if t.is_floating_point() else t.detach()

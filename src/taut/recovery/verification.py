"""Proof that a network does not use what is negative in front of a ReLU: changed there, it gives the same output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from taut.core.data import chunks
from taut.core.modes import evaluating, generator
from taut.core.tensors import all_tensors
from taut.errors import ModelError
from taut.recovery.successors import Following, Follows
from taut.structure.patches import CONVOLUTIONS
from taut.structure.surgery import shallow
from taut.types import Network

FEW = 8
"""Samples that are run again."""


def unseen(model: nn.Module, net: Network, batch: Any, follows: Mapping[str, Follows]) -> list[str]:
    """The layers whose outputs, where z = scale y + shift + other is negative, make no difference to the output.

    z is made more negative wherever it is; not a bit of the network's output may change. This sees what no look at
    the operations does: code in script or C++, and whatever hooks do.

    Args:
        model: the original.
        net: of it.
        batch: inputs.
        follows: what follows each layer.
    """
    if not follows:
        return []
    few = next(iter(chunks(net.example, [(batch, None)], FEW)))[0]
    sums_of = [name for name, f in follows.items() if f.total is not None]
    try:
        before, sums = _observed(model, net, few, sums_of)
        if _same(before, _changed(model, net, few, follows, sums)):
            return list(follows)
        return [name for name in follows if _same(before, _changed(model, net, few, {name: follows[name]}, sums))]
    except ModelError:
        return []  # a model that does not run on few samples proves nothing


def _observed(model: nn.Module, net: Network, batch: Any, names: list[str]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs, and the sums behind some layers."""
    copied = shallow(model)
    watch = Following(lambda _, t: t.clone())
    for name, module in copied.named_modules():
        module.register_forward_hook(_watched(name, watch, layer=name in names))
    with evaluating(copied), watch:
        output = net.example.run(copied, batch)
    return [t.clone() for t in all_tensors(output)], {
        n: t.total for n, t in watch.trails.items() if t.total is not None
    }


def _watched(name: str, watch: Following, *, layer: bool) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if layer:
            watch.layer(name, output)
        elif args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            watch.norm(name, args[0], output)

    return hook


def _changed(
    model: nn.Module, net: Network, batch: Any, follows: Mapping[str, Follows], sums: Mapping[str, Tensor]
) -> list[Tensor]:
    """Outputs with other negative values."""
    copied = shallow(model)
    for name, what in follows.items():
        copied.get_submodule(name).register_forward_hook(_lowered(what, sums.get(name)), prepend=True)
    with evaluating(copied):
        return all_tensors(net.example.run(copied, batch))


def _lowered(what: Follows, total: Tensor | None) -> Any:
    def hook(module: nn.Module, _: Any, output: Tensor) -> Tensor:
        shape = (1, -1, *(1,) * (output.ndim - 2)) if isinstance(module, CONVOLUTIONS) else (-1,)
        scale, shift = (t.reshape(shape) for t in (what.scale, what.shift))
        z = scale * output + shift if total is None else total
        away = torch.rand(output.shape, generator=generator(0)).to(output) + output.abs()
        lower = (output - scale.sign() * away).to(output)
        return torch.where((z < 0) & (scale != 0), lower, output)

    return hook


def _same(before: list[Tensor], after: list[Tensor]) -> bool:
    return len(before) == len(after) and all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(before, after, strict=True)
    )

"""Which layers share their channels: the object types of a joint factorization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taut.core.example import Example
from taut.core.modes import evaluating, generator
from taut.errors import ModelError
from taut.structure.flow import MIXING, OUTPUT, Flow, flow_of
from taut.structure.patches import weight_of
from taut.structure.surgery import shallow

TRIES = 2
"""Markings of the channels: a single one may look the same from behind."""


def couple(model: nn.Module, example: Example, names: Sequence[str], flow: Flow | None = None) -> list[int]:
    """The type of the inputs and of the outputs of every named layer: equal numbers are the same channels.

    The outputs of a layer are of one type with the inputs of all that read them through operations that treat channels
    alike, and with the outputs of the layers that these read besides (a residual sum). Where channels are mixed or
    concatenated, in grouped convolutions, and where a run with marked channels shows that they arrive in another
    order (a shuffle, a transposition), a side is a type of its own.

    Args:
        model: the network.
        example: how it is called.
        names: layers with weights.
        flow: who reads whom, where that is known already.

    Returns:
        in, out of the first layer, in, out of the second, ...
    """
    flow = flow_of(model, example) if flow is None else flow
    found = _linked(model, names, flow)
    moved = {name for seed in range(TRIES) for name in _moved(model, example, names, found, seed)}
    fresh = max(found, default=0) + 1
    for place, name in enumerate(names):
        if name in moved:
            found[2 * place] = fresh + place
    numbers: dict[int, int] = {}
    return [numbers.setdefault(number, len(numbers)) for number in found]


def _linked(model: nn.Module, names: Sequence[str], flow: Flow) -> list[int]:
    """Types as the run's operations tell them, by widths alone."""
    sizes = {name: len(weight_of(model.get_submodule(name))) for name in names}
    parents: dict[tuple[str, int], tuple[str, int]] = {}

    def root(side: tuple[str, int]) -> tuple[str, int]:
        while side in parents:
            side = parents[side]
        return side

    for name in names:
        for source in _read(model, flow, name, sizes):
            first, second = root((name, 0)), root((source, 1))
            if first != second:
                parents[first] = second
    kinds: dict[tuple[str, int], int] = {}
    return [kinds.setdefault(root((name, side)), len(kinds)) for name in names for side in (0, 1)]


def _moved(model: nn.Module, example: Example, names: Sequence[str], links: Sequence[int], seed: int) -> set[str]:
    """The layers whose inputs are not, channel by channel, what their type's layers give: shuffled, or transposed.

    Every layer gives noise, and NaN in a random half of the channels of its type; each must find NaN in just these.
    """
    noise = generator(seed)
    halves: dict[int, Tensor] = {}
    for place, name in enumerate(names):
        size = len(weight_of(model.get_submodule(name)))
        halves.setdefault(links[2 * place + 1], torch.randperm(size, generator=noise) < max(1, size // 2))
    wanted = {name: halves[links[2 * place]] for place, name in enumerate(names) if links[2 * place] in halves}
    copied = shallow(model)
    found: dict[str, list[Tensor]] = {name: [] for name in wanted}
    for place, name in enumerate(names):
        half, seen = halves[links[2 * place + 1]], found.get(name, [])
        copied.get_submodule(name).register_forward_hook(_marking(half, seen, noise))
    try:
        with evaluating(copied), torch.no_grad():
            example.run(copied)
    except ModelError:  # code that cannot stand NaN: nothing is known
        return set(wanted)
    return {name for name, half in wanted.items() if not all(_marked(rows, half) for rows in found[name])}


def _marking(half: Tensor, seen: list[Tensor], noise: torch.Generator) -> Any:
    """A hook that notes which inputs are NaN, and gives noise with NaN in half of the channels."""

    def mark(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append(args[0].movedim(_axis(module, args[0]), 0).flatten(1).isnan().cpu())
        axis = _axis(module, output)
        drawn = torch.randn(output.shape, generator=noise).to(output).movedim(axis, -1)
        marked: Tensor = drawn.masked_fill(half.to(output.device), torch.nan).movedim(-1, axis)
        return marked

    return mark


def _marked(rows: Tensor, half: Tensor) -> bool:
    """Whether the inputs (c, ...) that are NaN belong to the marked channels, and to each of these.

    Behind a flatten every channel has several inputs in a row; those of a padding are not marked.
    """
    return torch.equal(rows.any(1).reshape(len(half), -1).any(1), half)


def _axis(module: nn.Module, x: Tensor) -> int:
    """Where the channels of an input or output are."""
    return x.ndim - 1 - len(getattr(module, "kernel_size", ()))


def _read(model: nn.Module, flow: Flow, name: str, sizes: Mapping[str, int]) -> set[str]:
    """The layers whose outputs are channel by channel the inputs of this one."""
    sources = flow.sources.get(name, set())
    if not sources or name in flow.mixed or OUTPUT in sources or not sources <= set(sizes):
        return set()
    module = model.get_submodule(name)
    if any(getattr(model.get_submodule(each), "groups", 1) != 1 for each in (name, *sources)):
        return set()
    widths = {sizes[source] for source in sources}
    fits = len(widths) == 1 and isinstance(module, MIXING) and weight_of(module).shape[1] % next(iter(widths)) == 0
    return sources if fits else set()

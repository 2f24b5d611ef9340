"""Which layers share their channels: the object types of a joint factorization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from taut.calls import Example
from taut.structure.flow import MIXING, OUTPUT, Flow, flow_of
from taut.structure.patches import weight_of


def couple(model: nn.Module, example: Example, names: Sequence[str], flow: Flow | None = None) -> list[int]:
    """The type of the inputs and of the outputs of every named layer: equal numbers are the same channels.

    The outputs of a layer are of one type with the inputs of all that read them through operations that treat channels
    alike, and with the outputs of the layers that these read besides (a residual sum). Where channels are mixed or
    concatenated, in grouped convolutions, and in layers that share a weight's place in the run, a side is a type of
    its own.

    Args:
        model: the network.
        example: how it is called.
        names: layers with weights.
        flow: who reads whom, where that is known already.

    Returns:
        in, out of the first layer, in, out of the second, ...
    """
    flow = flow_of(model, example) if flow is None else flow
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
    numbers: dict[tuple[str, int], int] = {}
    return [numbers.setdefault(root((name, side)), len(numbers)) for name in names for side in (0, 1)]


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

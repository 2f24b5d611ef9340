"""Which layers share their channels: the object types of a joint factorization."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from taut.core.example import Example
from taut.structure.channels.runs import End, run_labelled
from taut.structure.patches import groups_of


def find_links(model: nn.Module, example: Example, names: Sequence[str]) -> list[int]:
    """The type of the inputs and of the outputs of every named layer: equal numbers are the same channels.

    Two sides are of one type where the model brings the same channels to them, all of them and in one order: through
    operations that leave every channel in its place, over residual sums, and behind a flatten, where every channel has
    several inputs in a row. Channels that come in another order (a shuffle, a transposition), or beside others (a
    concatenation), make another type, which all that read them in this way share. A side whose channels are not told
    apart is a type of its own: those of grouped convolutions, inputs of the model, and what is mixed in operations.

    Args:
        model: the network.
        example: how it is called.
        names: layers with weights.

    Returns:
        in, out of the first layer, in, out of the second, ...

    Raises:
        ModelError: the model cannot be run.
    """
    classes = run_labelled(model, example, tying=False).classes()
    types: dict[tuple[str, End], tuple[int, ...]] = {}
    repeats: dict[tuple[str, End], int] = {}
    ends: tuple[End, End] = ("in", "out")
    sides = [(name, end) for name in names for end in ends]
    for side in sides:
        if side in classes and groups_of(model.get_submodule(side[0])) == 1:
            channels, times = _in_rows(classes[side])
            if times == 1 or (times and side[1] == "in"):
                types[side], repeats[side] = channels, times
    given = {channels for (_, end), channels in types.items() if end == "out"}
    numbers: dict[object, int] = {}
    links = []
    for side in sides:
        key: object = side
        if side in types:  # the size of a type that no layer gives is that of its inputs: the same for all that read it
            key = types[side], 1 if types[side] in given else repeats[side]
        links.append(numbers.setdefault(key, len(numbers)))
    return links


def _in_rows(classes: Tensor) -> tuple[tuple[int, ...], int]:
    """The channels of a side, and how many indices in a row each has; 0 where they differ, or one comes twice."""
    channels, counts = torch.unique_consecutive(classes, return_counts=True)
    alike = bool((counts == counts[:1]).all()) and len(channels.unique()) == len(channels)
    return tuple(channels.tolist()), int(counts[0]) if alike and len(counts) else 0

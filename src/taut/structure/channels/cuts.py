"""From channels that go to what is left of every layer, and whether the network really does without them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from taut.structure.channels.groups import ChannelGroup
from taut.structure.narrowing import Cut
from taut.structure.patches import groups_of, weight_of
from taut.structure.rules import INPUTS, OUTPUTS, module_rule


def cuts_of(model: nn.Module, groups: Sequence[ChannelGroup], gone: Sequence[Tensor]) -> dict[str, Cut]:
    """What is left of every layer that loses something.

    Args:
        model: the network.
        groups: of its channels.
        gone: the channels that go, of every group.
    """
    lost: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    widths: dict[tuple[str, str], int] = {}
    for group, index in zip(groups, gone, strict=True):
        if len(index):
            for member in group.members:
                lost[member.layer][member.end].append(member.index[index].flatten())
                widths[member.layer, member.end] = member.width
    found = {}
    for name, ends in lost.items():
        kept = {end: _left(widths[name, end], torch.cat(parts)) for end, parts in ends.items()}
        found[name] = _cut(model.get_submodule(name), kept)
    return found


def numbers_of(groups: Sequence[ChannelGroup], gone: Sequence[Tensor], model: nn.Module) -> dict[str, list[int]]:
    """What modules hold as whole numbers that become smaller with channels, by `Number.key`: before, and after.

    Args:
        groups: of the model's channels.
        gone: the channels that go, of every group.
        model: the network.
    """
    found: dict[str, list[int]] = {}
    for group, index in zip(groups, gone, strict=True):
        for number in group.numbers:
            value = vars(model.get_submodule(number.module))[number.attribute]
            found[number.key] = [value, value - number.step * len(index)]
    return found


def _left(width: int, gone: Tensor) -> Tensor:
    stay = torch.ones(width, dtype=torch.bool)
    stay[gone] = False
    return stay.nonzero().flatten()


def _cut(module: nn.Module, kept: Mapping[str, Tensor]) -> Cut:
    outputs, inputs = sides_of(module)
    rows = kept.get("through", kept.get("out"))
    columns = kept.get("in")
    if columns is not None and groups_of(module) > 1:
        columns = torch.bincount(columns % inputs).nonzero().flatten()  # of each group the same
    return Cut(
        torch.arange(outputs) if rows is None else rows,
        torch.arange(inputs) if columns is None else columns,
    )


def sides_of(module: Any) -> tuple[int, int]:
    """How many outputs a layer has, and how many inputs each of them reads; equal for values per channel."""
    rule = module_rule(module)
    if rule is not None:
        return rule.sizes(module)
    if isinstance(module, _ConvTransposeNd):
        return module.out_channels, (1 if module.groups > 1 else module.in_channels)
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, module.num_embeddings
    for key in ("num_features", "num_channels", "num_parameters"):
        if hasattr(module, key):
            return getattr(module, key), getattr(module, key)
    if hasattr(module, "normalized_shape"):
        return module.normalized_shape[-1], module.normalized_shape[-1]
    return weight_of(module).shape[0], weight_of(module).shape[1]


def silence(model: nn.Module, groups: Sequence[ChannelGroup], gone: Sequence[Tensor]) -> list[Any]:
    """Hooks with which `model` computes as if the channels that go were not there: zeros where they are read.

    Rows that give them become zero in place, for what is read by no layer (queries times keys).
    """
    handles = []
    for group, index in zip(groups, gone, strict=True):
        for member in group.members if len(index) else ():
            module: Any = model.get_submodule(member.layer)
            places = member.index[index].flatten()
            rule = module_rule(module)
            if rule is not None and member.end != "through":
                rule.silence(module, INPUTS if member.end == "in" else OUTPUTS, places)
            elif member.end == "in":
                handles.append(module.register_forward_pre_hook(_zeroing(places, module)))
            elif member.end == "out":
                axis = int(isinstance(module, _ConvTransposeNd | nn.Embedding))
                module.weight.data.index_fill_(axis, places.to(module.weight.device), 0)
                if getattr(module, "bias", None) is not None:
                    module.bias.data.index_fill_(0, places.to(module.bias.device), 0)
    return handles


def _zeroing(places: Tensor, module: nn.Module) -> Any:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        axis = args[0].ndim - len(getattr(module, "kernel_size", ())) - 1
        return args[0].index_fill(axis, places.to(args[0].device), 0), *args[1:]

    return hook

"""Weights that an embedding and output layers hold together: which they are, and what stands in the way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping

from torch import nn

Ties = Mapping[str, tuple[str, ...]]
"""Layer -> all that hold its weight, in the order of the model's modules."""


def tied_layers(model: nn.Module, called: Collection[str]) -> Ties:
    """The embeddings and linear layers that hold one weight, and nobody else does.

    Args:
        model: the network.
        called: modules that the example calls: of those that hold a weight one is enough, the others follow it.
    """
    owners: dict[int, list[tuple[str, bool]]] = defaultdict(list)
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                fits = key == "weight" and isinstance(module, nn.Embedding | nn.Linear) and bool(name)
                owners[id(parameter)].append((name, fits))
    groups = (tuple(dict.fromkeys(name for name, _ in held)) for held in owners.values() if all(x for _, x in held))
    return {name: names for names in groups if len(names) > 1 and set(names) & set(called) for name in names}


def for_all(reasons: Mapping[str, str], ties: Ties) -> dict[str, str]:
    """What stands in the way of one layer stands in that of all that hold its weight."""
    found = dict(reasons)
    for names in dict.fromkeys(ties.values()):
        blamed = next((name for name in names if name in reasons), None)
        if blamed is not None:
            found |= dict.fromkeys(names, f"of '{blamed}', which holds its weight: {reasons[blamed]}")
            found[blamed] = reasons[blamed]
    return found

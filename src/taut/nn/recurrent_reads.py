"""What code reads of a recurrent layer besides calling it: torch's names for its weights, answered by its layers."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from taut.nn.answering import Described
from taut.nn.weight_values import matrix_of_layer

NAME = re.compile(r"(weight|bias)_(ih|hh)_l(\d+)(_reverse)?")
"""torch's names: the kind, for inputs or for hidden states, the layer, the direction."""


def described(layer: Any, name: str) -> Described | None:
    """A weight or bias of a `taut.nn.Recurrent` by torch's name, with its values where these are asked for.

    Args:
        layer: the recurrent layer.
        name: such as "weight_ih_l0_reverse".

    Returns:
        None where it has none of that name.
    """
    match = NAME.fullmatch(name)
    if match is None:
        return None
    kind, side, number, way = match[1], match[2], int(match[3]), int(match[4] is not None)
    if number >= layer.num_layers or way >= layer.ways or (kind == "bias" and not layer.bias):
        return None
    state = layer.states[number * layer.ways + way]
    chain = layer.inputs[number] if side == "ih" else state
    rows = matrix_shape(state)[0]
    shape = (rows,) if kind == "bias" else (rows, matrix_shape(chain)[1])

    def values() -> Tensor:
        if kind == "weight":
            whole = matrix_of_layer(chain)
        else:
            own = [m.bias for m in chain.modules() if getattr(m, "bias", None) is not None]
            whole = (
                own[-1] if own else torch.zeros(rows * (layer.ways if side == "ih" else 1)).to(layer.states[0].weight)
            )
        return whole.chunk(layer.ways)[way] if side == "ih" else whole

    return Described(shape, layer, values)


def matrix_shape(chain: Any) -> tuple[int, int]:
    """Outputs and inputs of a layer, or of several in a row."""
    weights = [m.weight for m in chain.modules() if isinstance(getattr(m, "weight", None), Tensor)]
    return int(weights[-1].shape[0]), int(weights[0].shape[1])

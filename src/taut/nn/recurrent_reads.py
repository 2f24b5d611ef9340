"""What code reads of a recurrent layer besides calling it: torch's names for its weights, answered by its layers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from taut.nn.answering import Described
from taut.nn.weight_values import matrix_of_layer

NAME = re.compile(r"(weight|bias)_(ih|hh)_l(\d+)(_reverse)?")
"""torch's names: the kind, for inputs or for hidden states, the layer, the direction."""


HELD_ELSEWHERE = (
    "'{}' of this layer is computed from other parameters, or it is a part of one: it cannot be set. Set the weights "
    "inside of its 'inputs' and 'states', or write into the values where they are not in factors."
)


@dataclass(frozen=True)
class Place:
    """Where the weight or bias of one of torch's names is.

    Attributes:
        kind: "weight" or "bias".
        layer: what computes with it, among others perhaps.
        part: which of `parts` equal ranges of the layer's rows are it.
        rows: of the part.
    """

    kind: str
    layer: Any
    part: int
    parts: int
    rows: int

    @property
    def is_whole(self) -> bool:
        """Whether the layer holds it, and nothing else, as a parameter."""
        return self.parts == 1 and type(self.layer).forward is nn.Linear.forward and self.kind in self.layer._parameters


def place_of(layer: Any, name: str) -> Place | None:
    """Where a `taut.nn.Recurrent` has a weight by torch's name, such as "weight_ih_l0_reverse"; None: nowhere."""
    match = NAME.fullmatch(name)
    if match is None:
        return None
    kind, side, number, way = match[1], match[2], int(match[3]), int(match[4] is not None)
    if number >= layer.num_layers or way >= layer.ways or (kind == "bias" and not layer.bias):
        return None
    state = layer.states[number * layer.ways + way]
    rows = matrix_shape(state)[0]
    return Place(kind, state, 0, 1, rows) if side == "hh" else Place(kind, layer.inputs[number], way, layer.ways, rows)


def described(layer: Any, name: str) -> Any:
    """A weight or bias of a `taut.nn.Recurrent` by torch's name: the parameter, or its values where they are asked for.

    Args:
        layer: the recurrent layer.
        name: such as "weight_ih_l0_reverse".

    Returns:
        None where it has none of that name.
    """
    place = place_of(layer, name)
    if place is None:
        return None
    inside = place.layer
    if place.is_whole and inside._parameters[place.kind] is not None:
        return inside._parameters[place.kind]
    shape = (place.rows,) if place.kind == "bias" else (place.rows, matrix_shape(inside)[1])

    def values() -> Tensor:
        if place.kind == "weight":
            whole = matrix_of_layer(inside)
        else:
            own = [m.bias for m in inside.modules() if getattr(m, "bias", None) is not None]
            whole = own[-1] if own else torch.zeros(place.rows * place.parts).to(layer.states[0].weight)
        return whole.chunk(place.parts)[place.part]

    def parts() -> list[Any]:
        return [p for key, p in inside.named_parameters() if key.endswith("bias") == (place.kind == "bias")]

    return Described(shape, layer, values, parts=parts if place.parts == 1 else None)


def set_weight(layer: Any, name: str, value: Any) -> bool:
    """Set the parameter that torch's name stands for; whether there is one of that name.

    Raises:
        AttributeError: no layer inside holds just that as a parameter.
    """
    place = place_of(layer, name) if NAME.fullmatch(name) else None
    if place is None:
        return False
    if not place.is_whole:
        raise AttributeError(HELD_ELSEWHERE.format(name))
    setattr(place.layer, place.kind, value)
    return True


def weight_names(number: int, ways: int, *, bias: bool) -> Iterator[str]:
    """Names that torch gives the weights of a layer, in the order in which its kernel takes them."""
    for way in range(ways):
        end = f"l{number}{'_reverse' if way else ''}"
        yield from (f"weight_ih_{end}", f"weight_hh_{end}")
        if bias:
            yield from (f"bias_ih_{end}", f"bias_hh_{end}")


def matrix_shape(chain: Any) -> tuple[int, int]:
    """Outputs and inputs of a layer, or of several in a row."""
    weights = [m.weight for m in chain.modules() if isinstance(getattr(m, "weight", None), Tensor)]
    return int(weights[-1].shape[0]), int(weights[0].shape[1])

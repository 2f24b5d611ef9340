"""Layers as a graph of relations between object types: what the joint factorizations share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from taut.decompose.trifactor import Relation
from taut.errors import CallError
from taut.structure.patches import grouped_weight

RANK, SHARE, LEAST = 50, 4, 10
"""Ranks unless given: 50, but no more than a quarter of the type's size, and no fewer than 10."""


@dataclass(frozen=True)
class Graph:
    """The relations of a step's layers, and the way back to their kernels.

    Attributes:
        relations: one per layer and group that is more than a single number, matrices (m, n_in, n_out).
        owners: (layer, group) of each relation. sizes: objects of every type.
    """

    relations: tuple[Relation, ...]
    owners: tuple[tuple[int, int], ...]
    sizes: Mapping[str, int]

    @classmethod
    def of(cls, modules: Mapping[str, nn.Module], links: Sequence[int] | None) -> Graph:
        """From the layers' weights.

        A convolution gives one relation per kernel offset; a Linear behind a flatten one per position; a grouped
        convolution keeps its groups apart, each with types of its own.

        Args:
            modules: the layers, in the step's order.
            links: type of the inputs and of the outputs of every layer, one after the other (`couple`); None: no two
                layers share a type.

        Raises:
            CallError: the links do not fit the layers.
        """
        sides = list(range(2 * len(modules))) if links is None else list(links)
        weights = [grouped_weight(module) for module in modules.values()]
        if len(sides) != 2 * len(weights):
            raise CallError(f"The 'links' must hold two numbers for each of {len(weights)} layers. Got {links}.")
        plain = [(W.shape[1], W.shape[2]) if len(W) == 1 else None for W in weights]
        sizes = {f"type {number}": size for number, size in type_sizes(plain, sides).items()}
        relations, owners = [], []
        for place, W in enumerate(weights):
            for group, kernel in enumerate(W):
                if len(W) > 1 and kernel[..., 0].numel() == 1:
                    continue  # depthwise: every matrix is a number
                rows, columns = _names(place, group, len(W), sides)
                split = kernel.reshape(kernel.shape[0], sizes.get(rows, kernel.shape[1]), -1)
                relations.append(Relation(rows, columns, split.permute(2, 1, 0).contiguous()))
                owners.append((place, group))
        return cls(tuple(relations), tuple(owners), sizes | _found(relations))

    def kernel(self, matrices: Tensor, like: Tensor) -> Tensor:
        """Matrices (m, n_in, n_out) as the kernel (o, c, s) that they came from."""
        return matrices.permute(2, 1, 0).reshape(like.shape)

    def ranks(self, wish: int | None) -> dict[str, int]:
        """The same rank for all types, capped by their size.

        Raises:
            CallError: it is not positive.
        """
        if wish is not None and wish < 1:
            raise CallError(f"The 'rank' must be at least 1. Got {wish} instead.")
        touched = {name for r in self.relations for name in (r.rows, r.columns)}
        usual = {n: min(self.sizes[n], max(LEAST, min(RANK, self.sizes[n] // SHARE))) for n in touched}
        return usual if wish is None else {n: min(self.sizes[n], wish) for n in touched}


def _names(place: int, group: int, groups: int, sides: Sequence[int]) -> tuple[str, str]:
    if groups > 1:
        return f"in {place}.{group}", f"out {place}.{group}"
    return f"type {sides[2 * place]}", f"type {sides[2 * place + 1]}"


def type_sizes(shapes: Sequence[tuple[int, int] | None], sides: Sequence[int]) -> dict[int, int]:
    """Objects of the types of layers without groups: outputs of the layers that give them, else inputs.

    Args:
        shapes: outputs and inputs of every layer; None for one with groups, whose types are its own.
        sides: type of the inputs and of the outputs of every layer, one after the other.

    Raises:
        CallError: two sizes for one type.
    """
    plain = [(shape, sides[2 * i], sides[2 * i + 1]) for i, shape in enumerate(shapes) if shape is not None]
    sizes: dict[int, int] = {}
    for (outputs, _), _, out in plain:
        if sizes.setdefault(out, outputs) != outputs:
            raise CallError(f"The 'links' join outputs of {sizes[out]} and of {outputs} channels.")
    for (_, inputs), inside, _ in plain:
        size = sizes.setdefault(inside, inputs)
        if inputs % size:
            raise CallError(f"The 'links' join {inputs} inputs with {size} channels.")
    return sizes


def _found(relations: Sequence[Relation]) -> dict[str, int]:
    return {name: size for r in relations for name, size in zip((r.rows, r.columns), r.matrices.shape[1:], strict=True)}

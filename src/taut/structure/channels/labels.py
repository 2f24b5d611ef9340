"""Labels: for every element of a running network's tensors the channel that it belongs to.

A label is an integer tensor of the shape of the tensor that it describes, most of its axes expanded and so free of
charge. Operations that move elements move the labels by the very same call; operations on several tensors unite the
channels that meet; operations that mix channels, or have a size of their own, pin them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from taut.core.tensors import tensors
from taut.structure.channels.classes import Atoms


class Labels:
    """Labels of the tensors that are alive while a network runs.

    Attributes:
        atoms: of all channels.
    """

    def __init__(self, atoms: Atoms) -> None:
        """No tensor is labelled yet."""
        self.atoms = atoms
        self._held: Any = WeakTensorKeyDictionary()

    def of(self, value: Any) -> Tensor | None:
        """The label of a tensor, with the classes as they are now; None for what has no channels that could go."""
        if not isinstance(value, Tensor):
            return None
        held = self._held.get(value)
        return None if held is None else self.atoms.roots(held) if held.numel() < 4096 else _mapped(self.atoms, held)

    def put(self, value: Tensor, label: Tensor | None) -> None:
        """Label a tensor, or take its label away."""
        if label is not None:
            self._held[value] = label.expand(value.shape)
        elif value in self._held:
            del self._held[value]

    def pin(self, values: Any, reason: str) -> None:
        """All channels that occur in some tensors have to stay."""
        for value in tensors(values):
            label = self.of(value)
            if label is not None:
                self.atoms.pin(compact(label), reason)


def compact(label: Tensor) -> Tensor:
    """The same values without the axes along which the label is expanded."""
    for axis in range(label.ndim):
        if label.stride(axis) == 0 and label.shape[axis] > 1:
            label = label.narrow(axis, 0, 1)
    return label


def _mapped(atoms: Atoms, label: Tensor) -> Tensor:
    return atoms.roots(compact(label)).expand(label.shape)


def varying(label: Tensor) -> list[int]:
    """The axes along which the channel changes."""
    small = compact(label)
    return [
        axis for axis in range(small.ndim) if small.shape[axis] > 1 and bool((small != small.narrow(axis, 0, 1)).any())
    ]


def along(label: Tensor, axis: int, atoms: Atoms) -> Tensor:
    """The channel of every index of an axis; where several meet at one index, they become one class."""
    rows = compact(label).movedim(axis, 0)
    rows = rows.expand(label.shape[axis], *rows.shape[1:]).flatten(1)
    first = rows[:, :1]
    if bool((rows != first).any()):
        atoms.unite(rows, first.expand_as(rows))
    return atoms.roots(first[:, 0])

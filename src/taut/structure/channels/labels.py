"""Labels: for every element of a running network's tensors the channel that it belongs to.

A label is an integer tensor of the shape of the tensor that it describes, most of its axes expanded and so free of
charge. Operations that move elements move the labels by the very same call; operations on several tensors unite the
channels that meet; operations that mix channels, or have a size of their own, pin them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from taut.core.tensors import tensors
from taut.structure.channels.classes import Atoms

if TYPE_CHECKING:
    from taut.structure.channels.heads import Splits


class Labels:
    """Labels of the tensors that are alive while a network runs.

    Attributes:
        atoms: of all channels.
        tying: whether channels that can only go together become one class; without, a class are channels that are the
            same, one by one, and what gives and reads them knows them by their places.
        numbers: whether the network is handed plain numbers, so that those of an operation may be others next time.
        ruled: classes that went through something with a rule of the user's, and the name of that.
        splits: what is noted of views that split channels; None: nothing.
    """

    def __init__(self, atoms: Atoms, own: Iterable[Tensor] = (), *, tying: bool = True, numbers: bool = False) -> None:
        """No tensor is labelled yet; `own` are the parameters and buffers of the network."""
        self.atoms, self.tying, self.numbers = atoms, tying, numbers
        self.ruled: list[tuple[Tensor, str]] = []
        self.splits: Splits | None = None
        self._own = {id(t) for t in own}
        self._held: Any = WeakTensorKeyDictionary()
        self._crossed: Any = WeakTensorKeyDictionary()
        self._layered: Any = WeakTensorKeyDictionary()
        self._mixed: Any = WeakTensorKeyDictionary()

    def of(self, value: Any) -> Tensor | None:
        """The label of a tensor, with the classes as they are now; None for what has no channels that could go."""
        if not isinstance(value, Tensor):
            return None
        held = self._held.get(value)
        return None if held is None else self.atoms.roots(held) if held.numel() < 4096 else _mapped(self.atoms, held)

    def held(self, value: Tensor) -> bool:
        """Whether a tensor has a label."""
        return value in self._held

    def put(self, value: Tensor, label: Tensor | None) -> None:
        """Label a tensor, or take its label away."""
        if label is not None:
            self._held[value] = label.expand(value.shape)
        elif value in self._held:
            del self._held[value]

    def tie(self, a: Tensor, b: Tensor) -> None:
        """The channels of a and b, element by element, can only go together."""
        if self.tying:
            self.atoms.unite(a, b)

    def layered(self, value: Tensor) -> None:
        """Note that the first axis of a tensor holds layers, each with its own channels: it never becomes shorter."""
        self._layered[value] = True

    def holds_layers(self, value: Any) -> bool:
        """Whether `layered` was said of a tensor."""
        return isinstance(value, Tensor) and value in self._layered

    def origin(self, value: Tensor) -> bool | None:
        """Whether a tensor was computed from the network's own tensors alone (False), or from others, too (True).

        The number of positions that were summed up is such another, too.

        None: from others alone. An input, a constant of the code and a comparison say nothing of another run; what a
        layer gives is the network's, whatever it reads.
        """
        return False if id(value) in self._own else self._crossed.get(value)

    def come(self, value: Tensor, *, crossed: bool | None) -> None:
        """Note the origin of a tensor."""
        if crossed is not None:
            self._crossed[value] = crossed
        elif value in self._crossed:
            del self._crossed[value]

    def mix(self, value: Tensor, atoms: Tensor, reason: str) -> None:
        """A tensor mixes these channels: they stay as soon as anything uses it."""
        self.put(value, None)
        self._mixed[value] = atoms, reason

    def use(self, values: Any) -> None:
        """Something uses these tensors."""
        for value in tensors(values):
            if value in self._mixed:
                self.atoms.pin(*self._mixed[value])

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


def along(label: Tensor, axis: int, labels: Labels) -> Tensor:
    """The channel of every index of an axis; where several meet at one index, they go together, or it is a new one."""
    rows = compact(label).movedim(axis, 0)
    rows = rows.expand(label.shape[axis], *rows.shape[1:]).reshape(label.shape[axis], -1)
    first = rows[:, :1]
    if bool((rows != first).any()):
        if not labels.tying:
            return labels.atoms.fresh(len(rows))
        labels.atoms.unite(rows, first.expand_as(rows))
    return labels.atoms.roots(first[:, 0])

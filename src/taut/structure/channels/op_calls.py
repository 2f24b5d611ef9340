"""An operation of a running network as it was executed, and what every rule does with the labels of its tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taut.core.tensors import tensors
from taut.structure.channels.labels import Labels, compact, varying

MIXES = "the operation '{op}' mixes these channels or has a size of its own"
FIXED = "they meet a tensor of fixed width in '{op}' (an input, a constant, a parameter of other code)"
PLACES = "code takes some of them by their place ('{op}')"
BROADCAST = "a single channel is spread over others in '{op}'"


@dataclass(frozen=True)
class Call:
    """One executed operation.

    Attributes:
        labels: of what went in; those of what came out are added.
        func: the operation, of torch's dispatcher.
        args: what it was called with.
        kwargs: and by name.
        made: the tensors that it gave.
    """

    labels: Labels
    func: Any
    args: Any
    kwargs: Any
    made: list[Tensor]

    @property
    def name(self) -> str:
        """Of the operation, without its overload."""
        name: str = self.func.overloadpacket.__name__
        return name

    @property
    def before(self) -> Tensor | None:
        """The label of the first argument."""
        return self.labels.of(self.args[0])

    def argument(self, name: str, place: int, default: Any = None) -> Any:
        """An argument by its name or its place."""
        if name in self.kwargs:
            return self.kwargs[name]
        return self.args[place] if len(self.args) > place else default

    def again(self, label: Tensor) -> list[Tensor]:
        """What the same call makes of a label in the place of its first tensor."""
        return tensors(self.func(label, *self.args[1:], **self.kwargs))

    def give(self, labels: Iterable[Tensor]) -> None:
        """Label what was made, tensor by tensor."""
        for t, label in zip(self.made, labels, strict=True):
            self.labels.put(t, label)

    def give_all(self, label: Tensor | None) -> None:
        """Label all that was made alike; None takes their labels away."""
        for t in self.made:
            self.labels.put(t, None if label is None else label.expand(t.shape))

    def pin(self, label: Tensor, reason: str) -> None:
        """The channels of a label have to stay."""
        self.labels.atoms.pin(compact(label), reason.format(op=self.name))

    def give_up(self, reason: str = MIXES) -> None:
        """What went in stays, and nothing is known of what came out."""
        self.labels.pin((self.args, self.kwargs), reason.format(op=self.name))
        self.give_all(None)

    def lengthened(self, label: Tensor) -> set[int]:
        """The axes on which the first result is longer or shorter than the label."""
        return {axis for axis in range(label.ndim) if label.shape[axis] != self.made[0].shape[axis]}

    def meet(self, a: Tensor, b: Tensor) -> Tensor:
        """Unite two labels that broadcast; a single channel that meets many others does not take part, and stays."""
        rank = max(a.ndim, b.ndim)
        a, b = (t.reshape(*[1] * (rank - t.ndim), *t.shape) for t in (a, b))
        for mine, other in ((a, b), (b, a)):
            if any(mine.shape[axis] == 1 < other.shape[axis] for axis in varying(other)):
                self.pin(mine, BROADCAST)
                return other
        shape = torch.broadcast_shapes(a.shape, b.shape)  # type: ignore[no-untyped-call]
        small = torch.broadcast_tensors(compact(a), compact(b))  # type: ignore[no-untyped-call]
        self.labels.atoms.unite(*small)
        return self.labels.atoms.roots(small[0]).expand(shape)

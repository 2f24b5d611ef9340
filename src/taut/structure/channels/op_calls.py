"""An operation of a running network as it was executed, and what every rule does with the labels of its tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taut.structure.channels.labels import Labels, compact, varying

MIXES = "the operation '{op}' mixes these channels or has a size of its own"
FIXED = "they meet a tensor of fixed width in '{op}' (an input, a constant, a parameter of other code)"
PLACES = "code takes some of them by their place ('{op}')"
BROADCAST = "a single channel is spread over others in '{op}'"


COUNTING = frozenset(
    "sum nansum prod norm linalg_vector_norm logsumexp cumsum cumprod mm bmm addmm baddbmm mv addmv dot".split()  # noqa: SIM905
)
"""Operations whose result depends on how many positions there are, even where all hold the same: a mean does not."""


def operands(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among an operation's arguments or results, which lie no deeper than in a list."""
    flat: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            flat.append(value)
        elif isinstance(value, list | tuple):
            flat += [item for item in value if isinstance(item, Tensor)]
    return flat


@dataclass(frozen=True)
class Call:
    """One executed operation.

    Attributes:
        labels: of what went in; those of what came out are added.
        func: the operation, of torch's dispatcher.
        args: what it was called with.
        kwargs: and by name.
        inputs: the tensors among these.
        made: the tensors that it gave.
    """

    labels: Labels
    func: Any
    args: Any
    kwargs: Any
    inputs: list[Tensor]
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
        return operands([self.func(label, *self.args[1:], **self.kwargs)])

    def give(self, labels: Iterable[Tensor | None]) -> None:
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
        self.labels.pin(self.inputs, reason.format(op=self.name))
        self.give_all(None)

    def trace_origin(self) -> None:
        """Note where what was made comes from: see `Labels.origin`."""
        known = [crossed for t in self.inputs if (crossed := self.labels.origin(t)) is not None]
        if torch.Tag.nondeterministic_seeded in self.func.tags or self.name.endswith("_like"):
            known = []  # as large as what is known, no more
        crossed = any(known) or len(known) < len(self.inputs) or self._varies() if known else None
        for t in self.made:
            self.labels.come(t, crossed=crossed if t.is_floating_point() or t.is_complex() else None)

    def _varies(self) -> bool:
        """Whether the same channels give something else at another size, or with another number from outside."""
        numbers = self.labels.numbers and torch.Tag.pointwise in self.func.tags
        summed = self.name in COUNTING and any(self.labels.held(t) for t in self.inputs)  # of the network itself: fixed
        return summed or (numbers and any(isinstance(a, int | float) for a in self.args))

    def lengthened(self, label: Tensor) -> set[int]:
        """The axes on which the first result is longer or shorter than the label."""
        return {axis for axis in range(label.ndim) if label.shape[axis] != self.made[0].shape[axis]}

    def meet(self, a: Tensor, b: Tensor) -> Tensor:
        """Unite two labels that broadcast; a single channel that meets many others does not take part, and stays."""
        rank = max(a.ndim, b.ndim)
        a, b = (t.reshape(*[1] * (rank - t.ndim), *t.shape) for t in (a, b))
        axes = varying(a), varying(b)
        for mine, other, others in ((a, b, axes[1]), (b, a, axes[0])):
            if any(mine.shape[axis] == 1 < other.shape[axis] for axis in others):
                self.pin(mine, BROADCAST)
                return other
        shape = [n if m == 1 else m for m, n in zip(a.shape, b.shape, strict=True)]
        if not self.labels.tying and axes[0] != axes[1]:  # on other axes lie others: they are not the same ones
            return (a if len(axes[0]) >= len(axes[1]) else b).expand(shape)
        small = torch.broadcast_tensors(compact(a), compact(b))  # type: ignore[no-untyped-call]
        self.labels.atoms.unite(*small)
        return self.labels.atoms.roots(small[0]).expand(shape)

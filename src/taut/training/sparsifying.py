"""Sparse training: a penalty that drives whole channels towards zero, before they are taken out."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from taut.core.example import Example
from taut.errors import CallError
from taut.methods.channels.heads import with_heads
from taut.structure.channels.groups import Member
from taut.types import Plan, Stage

LEAST = 1e-12
"""Added to squared norms, whose root has no slope at zero."""


class GroupLasso:
    """The sum over coupled channels of sqrt(p) ||w||, w the p weights that go with a channel in all layers around it.

    Sources: Yuan and Lin 2006 (group lasso); Wen et al. 2016 (structured sparsity); over coupled channels: Fang et al.
    2023.

    Attributes:
        model: whose channels these are. strength: what the sum is multiplied by.
    """

    def __init__(
        self, model: nn.Module, example: Example, strength: float, kept: Collection[str] = frozenset()
    ) -> None:
        """Find out by running which channels go together.

        Args:
            model: trained in place.
            example: how it is called.
            strength: see above.
            kept: layers that the user wants left alone: what goes with channels of theirs is not driven, either.

        Raises:
            ModelError: the model cannot be run.
            CallError: no channels can go.
        """
        self.model, self.strength = model, strength
        coupling = with_heads(model, example)
        self._groups = [group for group in coupling.groups if {m.layer for m in group.members}.isdisjoint(kept)]
        if not self._groups:
            why = next((f", '{name}' for one: {reason}" for name, reason in coupling.stays.items()), "")
            raise CallError(
                f"'sparsify' drives whole channels towards zero, and none of this network can go{why}. Leave it out; "
                "packed attention and recurrent layers are reached once their plain form is there (a step "
                "'as_attention' or 'as_recurrent' in an earlier stage)."
            )

    def __call__(self) -> Tensor:
        """The penalty at the present weights."""
        return self.strength * sum((norms.sum() for norms in self.norms()), torch.zeros(()))

    def norms(self) -> Iterator[Tensor]:
        """Of every group sqrt(p) ||w||, (n,)."""
        for group in self._groups:
            squares, count = torch.zeros(()), 0
            for member in group.members:
                held = self._squares(member)
                if held is not None:
                    per_index, weights = held
                    index = (member.index % len(per_index)).to(per_index.device)
                    squares = squares.to(per_index.device) + per_index[index].sum(1)
                    count += weights * member.index.shape[1]
            if count:
                yield (squares + LEAST).sqrt() * count**0.5

    def _squares(self, member: Member) -> tuple[Tensor, int] | None:
        """Of every index on a side the sum of squared weights, and how many these are; None where there are none."""
        module = self.model.get_submodule(member.layer)
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            return None
        turned = isinstance(module, _ConvTransposeNd | nn.Embedding)
        axis = (member.end == "in") != turned if weight.ndim > 1 else 0
        rows = weight.float().movedim(int(axis), 0).flatten(1) if weight.ndim > 1 else weight.float()[:, None]
        return rows.square().sum(1), rows.shape[1]


def penalty_of(stage: Stage, model: nn.Module, example: Example, plan: Plan | None) -> GroupLasso | None:
    """What a stage adds to its loss; None where it adds nothing.

    Args:
        stage: of a schedule.
        model: trained in place.
        example: how it is called.
        plan: says what the user wants left alone.
    """
    if not stage.sparsify or not stage.epochs:
        return None
    return GroupLasso(model, example, stage.sparsify, frozenset() if plan is None else plan.left_alone)

"""Sparse training: a penalty that drives whole channels towards zero, before they are taken out."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from taut.core.example import Example
from taut.structure.channels.groups import Member, coupled

LEAST = 1e-12
"""Added to squared norms, whose root has no slope at zero."""


class GroupLasso:
    """The sum over coupled channels of sqrt(p) ||w||, w the p weights that go with a channel in all layers around it.

    Sources: Yuan and Lin 2006 (group lasso); Wen et al. 2016 (structured sparsity); over coupled channels: Fang et al.
    2023.

    Attributes:
        model: whose channels these are. strength: what the sum is multiplied by.
    """

    def __init__(self, model: nn.Module, example: Example, strength: float) -> None:
        """Find out by running which channels go together.

        Args:
            model: trained in place.
            example: how it is called.
            strength: see above.

        Raises:
            ModelError: the model cannot be run.
        """
        self.model, self.strength = model, strength
        self._groups = coupled(model, example).groups

    def __call__(self) -> Tensor:
        """The penalty at the present weights; 0 where no channels can go."""
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

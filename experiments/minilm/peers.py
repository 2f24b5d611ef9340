"""What taut is held against: low rank of every Linear layer by the singular values of its weight, plain or whitened.

Whitened means  W L = U S V^T,  L L^T the second moment of the layer's inputs at real positions: the best low rank for
the layer's own output. A layer keeps as many ranks as all do by share ("uniform"), or those that hold more of their
layer's energy per parameter than one threshold for all layers ("global"); it stays dense where factors save nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from typing import NamedTuple

import torch
from encoder import Batch
from torch import Tensor, nn

RIDGE = 1e-4
"""Share of the mean input variance."""

HALVINGS = 60
LEAST = -15
"""Power of ten of the lowest threshold: below it all layers are dense."""


class Decomposed(NamedTuple):
    """W = (U S) V, and the singular values."""

    left: Tensor
    right: Tensor
    values: Tensor

    def rank_of(self, share: float) -> int:
        """Ranks that keep a share of the layer's parameters."""
        outputs, inputs = len(self.left), self.right.shape[1]
        return max(1, int(share * outputs * inputs / (outputs + inputs)))

    def rank_above(self, level: float) -> int:
        """Ranks that hold more than `level` of the layer's energy per parameter."""
        gain = self.values.square() / self.values.square().sum() / self.params(1)
        return max(1, int((gain > level).sum()))

    def params(self, rank: int) -> int:
        """Of the layer with so many ranks, or dense where that is less."""
        outputs, inputs = len(self.left), self.right.shape[1]
        return min(rank * (outputs + inputs), outputs * inputs)


def linears(net: nn.Module) -> dict[str, nn.Linear]:
    """All Linear layers by name."""
    return {name: layer for name, layer in net.named_modules() if isinstance(layer, nn.Linear)}


def linear_params(net: nn.Module) -> int:
    """Weights of all Linear layers."""
    return sum(layer.weight.numel() for layer in linears(net).values())


@torch.no_grad()
def moments(net: nn.Module, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Second moment of every Linear layer's inputs at real positions."""
    sums: dict[str, Tensor] = {}
    real = torch.empty(0)

    def note(name: str) -> object:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0][real].double()
            sums[name] = sums.get(name, 0) + rows.T @ rows

        return hook

    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in linears(net).items()]  # type: ignore[arg-type]
    for batch in batches:
        real = batch["attention_mask"].bool()
        net(**batch)
    for handle in handles:
        handle.remove()
    return sums


def decomposed(weight: Tensor, moment: Tensor | None) -> Decomposed:
    """Singular values of a weight, in the metric of its inputs where a moment is given."""
    W = weight.detach().double()
    if moment is None:
        U, S, V = torch.linalg.svd(W, full_matrices=False)
        return Decomposed(U * S, V, S)
    lift = RIDGE * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    L = torch.linalg.cholesky(moment + lift)
    U, S, V = torch.linalg.svd(W @ L, full_matrices=False)
    return Decomposed(U * S, torch.linalg.solve_triangular(L, V, upper=False, left=False), S)


def ranks_within(parts: dict[str, Decomposed], limit: int, spread: str) -> dict[str, int]:
    """The most ranks with at most `limit` parameters; spread "uniform" or "global"."""

    def at(level: float) -> dict[str, int]:
        if spread == "uniform":
            return {name: part.rank_of(1 - level) for name, part in parts.items()}
        return {name: part.rank_above(10 ** (LEAST * (1 - level))) for name, part in parts.items()}

    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        fits = sum(parts[name].params(rank) for name, rank in at(middle).items()) <= limit
        low, high = (low, middle) if fits else (middle, high)
    return at(high)


def factorized(net: nn.Module, limit: int, spread: str, batches: Iterable[Batch] | None) -> nn.Module:
    """A copy of the net of which all Linear layers have at most `limit` weights; whitened where batches are given."""
    known = {} if batches is None else moments(net, batches)
    parts = {name: decomposed(layer.weight, known.get(name)) for name, layer in linears(net).items()}
    small = deepcopy(net)
    for name, rank in ranks_within(parts, limit, spread).items():
        part, layer = parts[name], linears(net)[name]
        if part.params(rank) == layer.weight.numel():
            continue
        first, second = nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features)
        first.weight.data.copy_(part.right[:rank])
        second.weight.data.copy_(part.left[:, :rank])
        second.bias.data.copy_(layer.bias.data)
        parent, _, leaf = name.rpartition(".")
        setattr(small.get_submodule(parent), leaf, nn.Sequential(first, second))
    return small.eval()

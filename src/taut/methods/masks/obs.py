"""Optimal brain surgeon: weights pruned by what their loss costs, and the others moved to make up for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from taut.criteria.curvature import compensated, surgeon
from taut.decompose.linalg import ridge
from taut.decompose.weighting import WIDE
from taut.errors import CallError
from taut.methods.masks.masking import Masking, Ranked
from taut.structure.patches import grouped_weight, groups_of, weight_of
from taut.structure.statistics import LayerStatistics

BLOCKS = 128, 1152
"""Inputs whose weights are ordered together, at least and at most; more are ordered in equal blocks."""

WORK = 2e11
"""Operations of ordering a layer, o k b^2, up to which blocks of b grow: some seconds on two cores."""


@dataclass(frozen=True)
class OBS(Masking):
    """Prune by w^2 / (2 [H^-1]_qq), output by output, and move the weights that stay by least squares.

    H is the second moment A of the layer's inputs times the curvature of the output. The weights of an output go in the
    order in which each next one costs least, the others having made up for those before; damages are in the unit of the
    loss, so that outputs and layers compare. What stays solves A_KK w_K = A_K: w exactly. Without calibration data it
    is magnitude pruning.

    Sources: Hassibi and Stork 1993; layer by layer with A: Dong et al. 2017, Frantar and Alistarh 2022.

    Attributes:
        ridge: share of the mean eigenvalue added to A: the more, the less weights move.
    """

    ridge: float = 1e-2
    name: ClassVar[str] = "obs"
    uses_statistics: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing.

        Raises:
            CallError: a value of the wrong type or outside its range.
        """
        super().__post_init__()
        good = isinstance(self.ridge, int | float) and not isinstance(self.ridge, bool) and 0 < self.ridge <= 1
        self._must("ridge", good, "above 0 and at most 1")

    def factor(self, modules: Mapping[str, nn.Module], stats: Mapping[str, Any]) -> Ranked:
        """The order of removal of every output, which serves every sparsity, and the moments to move the others by."""
        moments = {name: self._moment(module, stats.get(name)) for name, module in modules.items()}
        return Ranked([self._score(m, moments[n], stats.get(n)) for n, m in modules.items()], moments)

    def _moment(self, module: nn.Module, stats: LayerStatistics | None) -> Moment | None:
        weighting = (stats or LayerStatistics()).weighting
        if not weighting.known:
            return None
        held = weighting.full if weighting.full is not None else weighting.channel
        return Moment(held, weighting.sketch, weighting.beside, self.ridge, groups_of(module))

    def _score(self, module: nn.Module, moment: Moment | None, stats: LayerStatistics | None) -> Tensor:
        W = weight_of(module).detach()
        known = stats or LayerStatistics()
        if moment is None:
            found, energy = W.double().square(), 1.0
        else:
            rows = moment.rows(W)
            found = moment.back(moment.ordered(rows), W)
            energy = known.weighting.energy(grouped_weight(module)) if known.outputs is None else 1.0
        if known.outputs is not None:
            slopes = known.outputs.diagonal().reshape(-1, *[1] * (W.ndim - 1)).to(found)
            found = found * slopes / (2 * known.positions)
        elif moment is not None:
            found = found * ((known.scale or 1.0) / max(energy, 1e-300))
        return torch.where(W == 0, -torch.inf, found).float()

    def pruned(self, name: str, module: nn.Module, keep: Tensor, factors: Ranked) -> Tensor:
        """The weight with zeros, and the others moved."""
        W, moment = weight_of(module).detach(), factors.moments[name]
        if moment is None or bool(keep.all()):
            return super().pruned(name, module, keep, factors)
        keep = keep.to(W.device) & (W != 0)  # of a net with more zeros than asked for none comes back
        solved = moment.solved(moment.rows(W), moment.rows(keep))
        return W.clone().copy_(moment.back(solved, W))


@dataclass(frozen=True)
class Moment:
    """A layer's second moment of inputs as blocks on a diagonal, and the weights as rows that meet it.

    Attributes:
        held: (g, k, k), of whole patches or of channels; None where there is a sketch.
        sketch: (g, m, k), rows that have it. beside: (g,), what it has more in all directions, or None.
        ridge: share of the mean eigenvalue added. groups: of the layer.
    """

    held: Tensor | None
    sketch: Tensor | None
    beside: Tensor | None
    ridge: float
    groups: int

    @property
    def size(self) -> int:
        """Columns of a row."""
        known = self.held if self.held is not None else self.sketch
        return 0 if known is None else known.shape[-1]

    def rows(self, W: Tensor) -> Tensor:
        """(g, rows, k): outputs with their fan-in, or, where the moment is of channels, every tap a row of its own."""
        taps = W.reshape(self.groups, W.shape[0] // self.groups, W.shape[1], -1)
        whole = self.size == taps.shape[2] * taps.shape[3]
        return taps.flatten(2) if whole else taps.transpose(2, 3).flatten(1, 2)

    def back(self, rows: Tensor, W: Tensor) -> Tensor:
        """Shaped as the weight again."""
        if self.size == W[0].numel():
            return rows.reshape(W.shape)
        return rows.reshape(self.groups, W.shape[0] // self.groups, -1, W.shape[1]).transpose(2, 3).reshape(W.shape)

    def block(self, group: int, at: int, end: int) -> Tensor:
        """A block of the diagonal, with its ridge."""
        if self.sketch is not None:
            part = self.sketch[group, :, at:end].double()
            A = part.mT @ part
            if self.beside is not None:
                A.diagonal().add_(float(self.beside[group]))
            return ridge(A, self.ridge)
        if self.held is None:
            raise CallError("A second moment holds neither a matrix nor a sketch.")
        return ridge(self.held[group, at:end, at:end], self.ridge)

    def ordered(self, rows: Tensor) -> Tensor:
        """Damages of removal, (g, rows, k); a large fan-in in equal blocks that are ordered on their own."""
        return self._each(rows, self._block(rows), lambda part, _, A: surgeon(part, A), rows)

    def solved(self, rows: Tensor, keep: Tensor) -> Tensor:
        """What stays, moved; across blocks too, where the whole matrix is known and not too large to solve."""
        most = self.size if self.sketch is None and self.size <= WIDE else self._block(rows)
        return self._each(rows, most, compensated, keep)

    def _block(self, rows: Tensor) -> int:
        least, most = BLOCKS
        return max(least, min(most, int((WORK / max(rows.numel(), 1)) ** 0.5)))

    def _each(self, rows: Tensor, most: int, work: Callable[..., Tensor], beside: Tensor) -> Tensor:
        size = -(-self.size // -(-self.size // most))
        found = torch.empty_like(rows, dtype=torch.float64)
        for group in range(self.groups):
            for at in range(0, self.size, size):
                end = min(at + size, self.size)
                A = self.block(group, at, end).to(rows.device)
                found[group, :, at:end] = work(rows[group, :, at:end], beside[group, :, at:end], A)
        return found

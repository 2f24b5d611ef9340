"""What a transposed convolution with another weight gives otherwise, tried on inputs that calibration kept."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from torch import Tensor, nn

from taut.decompose.outputs import weighed
from taut.structure.asides import AsideStatistics, transposed_outputs
from taut.structure.statistics import LayerStatistics


@dataclass(frozen=True)
class Trial:
    """A transposed convolution on the inputs that calibration kept of it.

    Attributes:
        layer: with the weight that it has.
        known: what was observed of it.
    """

    layer: Any
    known: AsideStatistics

    @classmethod
    def of(cls, layer: nn.Module, known: LayerStatistics) -> Trial | None:
        """None where nothing was kept."""
        kept = isinstance(known, AsideStatistics) and known.products is not None and bool(known.kept)
        return cls(layer, cast(AsideStatistics, known)) if kept else None

    @cached_property
    def _scale(self) -> float:
        """The energy of the outputs over that of the inputs that were kept."""
        return self.known.share(self.layer)

    def error(self, change: Tensor) -> float:
        """tr(B E[e eᵀ]) of e = change * x, brought to the scale of all inputs."""
        return self._energy(change) * self._scale

    def _energy(self, weight: Tensor) -> float:
        rows = (transposed_outputs(self.layer, weight, x) for x in self.known.kept)
        return sum(weighed(y.T @ y, self.known.outputs) for y in rows)

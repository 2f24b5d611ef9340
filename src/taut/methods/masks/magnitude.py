"""Magnitude pruning, and what it is compared with: weights scored one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from taut.core.modes import generator
from taut.criteria import score
from taut.errors import CallError
from taut.methods.factorization import input_rms
from taut.methods.masks.masking import Masking
from taut.structure.patches import grouped_weight, weight_of
from taut.structure.statistics import LayerStatistics

KINDS = ("magnitude", "wanda", "obd", "random")


@dataclass(frozen=True)
class Magnitude(Masking):
    """Set the weights of lowest |W| to zero; or of lowest |W| rms(x), or h W^2 / 2; or any.

    Sources: Han et al. 2015 (magnitude), Sun et al. 2023 (wanda), LeCun et al. 1990 (obd, optimal brain damage).

    Attributes:
        score: "magnitude"; "wanda", times the root mean square of the input that the weight meets, and "obd", with the
            second derivative h = E[x^2] E[g^2] (inputs and output gradients as if independent), which need calibration
            data; or "random", what every other score has to beat.
        seed: of the random score.
    """

    score: str = "magnitude"
    seed: int = 0
    name: ClassVar[str] = "magnitude"

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing.

        Raises:
            CallError: a value of the wrong type or outside its range.
        """
        super().__post_init__()
        self._must("score", self.score in KINDS, f"one of {', '.join(KINDS)}")

    @property
    def uses_statistics(self) -> bool:
        """For "wanda" and "obd"."""
        return self.score in {"wanda", "obd"}

    def scores(self, modules: Mapping[str, nn.Module], stats: Mapping[str, Any]) -> list[Tensor]:
        """Of every weight, layer by layer.

        Raises:
            CallError: the score needs calibration data that is not there.
        """
        noise = generator(self.seed)
        found = []
        for name, module in modules.items():
            W = weight_of(module)
            beside = W
            known = stats.get(name, LayerStatistics())
            if self.score == "wanda":
                beside = self._rms(name, module, known)
            elif self.score == "obd":
                beside = _second_derivative(self._rms(name, module, known), module, known)
            elif self.score == "random":
                beside = torch.rand(W.shape, generator=noise)
            found.append(score(self.score, W, beside.to(W.device)))
        return found

    def _rms(self, name: str, module: nn.Module, stats: LayerStatistics) -> Tensor:
        found = input_rms(module, stats)
        if found is None:
            raise CallError(
                f"The score '{self.score}' of layer '{name}' needs calibration data: give it to taut.observe."
            )
        return found


def _second_derivative(rms: Tensor, module: nn.Module, stats: LayerStatistics) -> Tensor:
    """E[x^2] E[g^2] summed over positions, shaped as the weight; where no gradient is known, relative to the output."""
    W = weight_of(module)
    if stats.outputs is None:
        energy = stats.weighting.energy(grouped_weight(module))
        return rms.square() * (2 * stats.positions * (stats.scale or 1.0) / max(energy, 1e-300))
    slopes = stats.outputs.diagonal().reshape(-1, *[1] * (W.ndim - 1))
    return rms.square() * slopes.to(rms)

"""Magnitude pruning, and what it is compared with: weights scored one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from taut.calls import generator
from taut.criteria import score
from taut.decompose.weighting import Weighting
from taut.errors import CallError
from taut.methods.masking import Masking
from taut.structure.patches import groups_of, weight_of
from taut.structure.statistics import LayerStatistics

KINDS = ("magnitude", "wanda", "random")


@dataclass(frozen=True)
class Magnitude(Masking):
    """Set the weights of lowest |W| to zero; or of lowest |W| rms(x); or any.

    Sources: Han et al. 2015 (magnitude), Sun et al. 2023 (wanda).

    Attributes:
        score: "magnitude"; "wanda", times the root mean square of the input that the weight meets, which needs
            calibration data; or "random", what every other score has to beat.
        seed: of the random score.
    """

    score: str = "magnitude"
    seed: int = 0
    name: ClassVar[str] = "magnitude"

    @property
    def needs(self) -> frozenset[str]:
        """The inputs' size for "wanda"; else nothing."""
        return frozenset({"inputs"} if self.score == "wanda" else ())

    def scores(self, modules: Mapping[str, nn.Module], stats: Mapping[str, Any]) -> list[Tensor]:
        """Of every weight, layer by layer.

        Raises:
            CallError: the score is unknown, or needs calibration data that is not there.
        """
        if self.score not in KINDS:
            raise CallError(f"The 'score' of magnitude must be one of {', '.join(KINDS)}. Got '{self.score}' instead.")
        noise = generator(self.seed)
        found = []
        for name, module in modules.items():
            W = weight_of(module)
            beside = W
            if self.score == "wanda":
                beside = input_rms(name, module, stats.get(name, LayerStatistics()))
            elif self.score == "random":
                beside = torch.rand(W.shape, generator=noise)
            found.append(score(self.score, W, beside.to(W.device)))
        return found


def input_rms(name: str, module: nn.Module, stats: LayerStatistics) -> Tensor:
    """Root mean square of the input that each weight meets, shaped to broadcast over the weight (o, c, *kernel).

    Raises:
        CallError: there was no calibration data.
    """
    diagonal: Weighting = stats.weighting.diagonal()
    W = weight_of(module)
    groups = groups_of(module)
    if diagonal.full is not None:
        squares = diagonal.full.diagonal(dim1=-2, dim2=-1).reshape(groups, 1, *W.shape[1:])
    elif diagonal.channel is not None:
        held = diagonal.channel.diagonal(dim1=-2, dim2=-1)
        squares = held.reshape(groups, 1, W.shape[1], *[1] * (W.ndim - 2)).expand(groups, 1, *W.shape[1:])
    elif diagonal.sketch is not None:
        squares = diagonal.sketch.square().sum(1).reshape(groups, 1, *W.shape[1:])
    else:
        raise CallError(f"The score 'wanda' of layer '{name}' needs calibration data: give it to taut.observe.")
    rms = (squares / max(stats.positions, 1e-30)).sqrt()
    return rms.expand(groups, len(W) // groups, *W.shape[1:]).reshape(W.shape)

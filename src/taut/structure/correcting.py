"""Damages of a layer whose inputs are held by their channels alone, put right by held-out patches.

That form takes the kernel's offsets for uncorrelated, and predicts a third to all of what is really lost: beside layers
that are held exactly such a one would look cheap. A few of its candidates are built and tried on the patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from taut.decompose.outputs import OutputMoment
from taut.structure.chains import chain_outputs
from taut.types import Group, Method

POINTS = 6
"""Candidates that are built, evenly over the logarithm of the predicted damage."""


def tried(
    group: Group, method: Method, factors: Any, module: nn.Module, held: tuple[Tensor, OutputMoment | None]
) -> list[tuple[float, float]]:
    """Predicted damages of some candidates, and tr(B E[d d^T]) of d, by how much they miss the outputs for patches.

    Args:
        group: of the one layer.
        method: of the family.
        factors: its decomposition.
        module: the layer.
        held: patches (g, n, k) with E[x x^T] = rows^T rows, and the output moment.
    """
    patches, B = held
    wanted = chain_outputs(module, module, patches)
    found = []
    for predicted, candidate in _spread([(c.damage(factors) or 0.0, c) for c in method.candidates(group, factors)]):
        (built,) = candidate.rewrite({group.layer.name: module}, factors).modules.values()
        miss = chain_outputs(module, built, patches) - wanted
        error = miss.double().square().sum() if B is None else B.along(miss.mT).sum()
        found.append((predicted, float(error)))
    return found


def _spread(rated: Sequence[tuple[float, Method]]) -> list[tuple[float, Method]]:
    positive = sorted((pair for pair in rated if pair[0] > 0), key=lambda pair: pair[0])
    if len(positive) <= POINTS:
        return positive
    logs = np.log([damage for damage, _ in positive])
    wanted = np.linspace(logs[0], logs[-1], POINTS)
    return [positive[i] for i in sorted({int(np.abs(logs - w).argmin()) for w in wanted})]

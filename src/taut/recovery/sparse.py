"""The refit of a pruned layer: the best weights among those that are zero where its own are."""

from __future__ import annotations

import torch
from torch import nn

from taut.criteria.curvature import compensated
from taut.decompose.linalg import ridge
from taut.recovery.solving import Moments
from taut.structure.patches import gram, grouped_weight, weight_of

RIDGE = 1e-2
"""Share of the mean input variance that keeps a weight near its dense solution."""


def keep_zeros(dense: nn.Module, pruned: nn.Module, moments: Moments) -> None:
    """Project a dense solution onto the zeros of `pruned`, in place, in the metric of the layer's present inputs.

    Args:
        dense: the layer with the weights of the unrestricted refit.
        pruned: the same layer with zeros in its weights.
        moments: of its present inputs.
    """
    rows = moments.rows
    held = moments.gram if moments.gram is not None else gram(rows) / rows.shape[1]
    A = ridge(held, RIDGE)
    W, keep = grouped_weight(dense).flatten(2), grouped_weight(pruned).flatten(2) != 0
    solved = torch.stack([compensated(*part) for part in zip(W, keep, A, strict=True)])
    weight = weight_of(dense)
    with torch.no_grad():
        weight.copy_(solved.reshape(weight.shape))

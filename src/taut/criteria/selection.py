"""Which weights stay: the lowest scores go, exactly as many as asked for, over layers of any size.

The limit is found from histograms of the scores' bits, 16 at a time, layer after layer: no sorting, and no copy of all
scores in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from taut.errors import CallError

HALF = 16
BINS = 1 << HALF


def smallest(scores: Sequence[Tensor], sparsity: float, *, scope: str = "global") -> list[Tensor]:
    """True where a weight stays: round(sparsity n) of n go, those of lowest score, among equals the first.

    Args:
        scores: one tensor per layer, no NaN.
        sparsity: share that goes, in [0, 1).
        scope: "global", or "layer": the same share of every layer.

    Raises:
        CallError: the sparsity or the scope is none.
    """
    if not isinstance(sparsity, Real) or isinstance(sparsity, bool) or not 0 <= sparsity < 1:
        raise CallError(f"The 'sparsity' must be in [0, 1). Got {sparsity!r} instead.")
    if scope not in {"global", "layer"}:
        raise CallError(f"The 'scope' must be global or layer. Got {scope!r} instead.")
    if scope == "layer":
        return [kept for one in scores for kept in _smallest([one], round(sparsity * one.numel()))]
    return _smallest(list(scores), round(sparsity * sum(one.numel() for one in scores)))


def within_runs(scores: Sequence[Tensor], stay: int, run: int) -> list[Tensor]:
    """True where a weight stays: in every run of consecutive inputs, counted from the first, those of highest score.

    Kernels for such weights multiply by those that stay alone (NVIDIA's 2:4). Of a convolution a run lies along the
    input channels at one tap. What is left over at the end of a row is a shorter run, of which as many stay.

    Args:
        scores: one tensor (outputs, inputs, *kernel) per layer, no NaN; among equals the later ones stay.
        stay: how many of a run stay.
        run: its length, above `stay`.
    """
    return [_within_runs(one.movedim(1, -1), stay, run).movedim(-1, 1) for one in scores]


def _within_runs(rows: Tensor, stay: int, run: int) -> Tensor:
    inputs = rows.shape[-1]
    padded = torch.nn.functional.pad(rows.float(), (0, -inputs % run), value=-torch.inf)
    runs = padded.reshape(*padded.shape[:-1], -1, run).nan_to_num(neginf=torch.finfo(torch.float32).min)
    real = torch.arange(padded.shape[-1], device=rows.device).reshape(-1, run) < inputs
    order = torch.where(real, runs, -torch.inf).argsort(dim=-1, stable=True)
    kept = torch.zeros_like(runs, dtype=torch.bool).scatter_(-1, order[..., run - stay :], value=True)
    return kept.flatten(-2)[..., :inputs]


def above(scores: Sequence[Tensor], threshold: float) -> list[Tensor]:
    """True where the score reaches a fixed threshold: how many that are depends on the weights."""
    return [one >= threshold for one in scores]


def mean_percentile(scores: Sequence[Tensor], share: float) -> float:
    """Mean over layers of the `share` quantile of each: a threshold that favours no layer by its size.

    Weights that are pruned already count as the lowest; where they alone reach the share, the lowest other one stands.
    """
    values = []
    for one in scores:
        left = one[torch.isfinite(one)].double()
        if len(left):
            gone = one.numel() - len(left)
            values.append(float(left.kthvalue(max(1, round(share * one.numel()) - gone)).values))
    return sum(values) / max(1, len(values))


def _smallest(scores: list[Tensor], wanted: int) -> list[Tensor]:
    if wanted <= 0:
        return [torch.ones_like(one, dtype=torch.bool) for one in scores]
    high, below = _bin([_ordered(one) >> HALF for one in scores], wanted)
    low, under = _bin([_inside(one, high) for one in scores], wanted - below)
    limit, ties = high * BINS + low, wanted - below - under
    kept = []
    for one in scores:
        order = _ordered(one)
        keep = order > limit
        equal = (order == limit).flatten().nonzero()[:, 0]
        keep.view(-1)[equal[ties:]] = True
        ties = max(0, ties - len(equal))
        kept.append(keep)
    return kept


def _bin(values: list[Tensor], wanted: int) -> tuple[int, int]:
    """The bin, of values 0 ... 65535, in which the `wanted`-th smallest falls, and how many lie in lower bins."""
    counts = sum(torch.bincount(v.flatten().cpu(), minlength=BINS) for v in values if v.numel())
    total = torch.as_tensor(counts).cumsum(0)
    place = int(torch.searchsorted(total, wanted))
    return place, int(total[place - 1]) if place else 0


def _inside(scores: Tensor, high: int) -> Tensor:
    """The low bits of the scores whose high bits are `high`."""
    order = _ordered(scores)
    return order[order >> HALF == high] & (BINS - 1)


def _ordered(scores: Tensor) -> Tensor:
    """Whole numbers 0 ... 2^32 - 1 in the order of the scores as float32, zero and minus zero alike."""
    bits = (scores.float() + 0.0).contiguous().view(torch.int32).long()
    return torch.where(bits < 0, -1 - bits, bits + (1 << 31))

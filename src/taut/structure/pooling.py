"""What calibration says of experts, among which a router chooses: those of few rows learn from the others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from taut.decompose.outputs import OutputMoment
from taut.decompose.pooling import expected, few_of_all, mean_of, mixed, share_of_mean
from taut.decompose.weighting import Weighting
from taut.nn import Product
from taut.structure.statistics import LayerStatistics


def pooled_statistics(
    model: nn.Module, layers: Mapping[str, LayerStatistics], samples: int
) -> dict[str, LayerStatistics]:
    """The statistics of all layers, where those of a stack of matrices know of each other.

    Of a matrix that few rows reached the moments are mixed with the mean of all; one that no row reached has that mean,
    and counts as much as the others do on average: no budget may take it for something that is never used.

    Args:
        model: with the layers in it.
        layers: what was observed.
        samples: of the calibration.
    """
    found = dict(layers)
    for names in _stacks(model, layers):
        known = [layers[name] for name in names]
        rows = [_rows(one, samples) for one in known]
        if any(rows) and len(set(rows)) > 1:  # else all got the same rows: no router
            found.update(zip(names, _of_stack(known, rows, samples), strict=True))
    return found


def pooled_groups(
    known: LayerStatistics, rows: Sequence[float], moved: Sequence[float], samples: int
) -> LayerStatistics:
    """The same of one layer that has a group for every matrix of a stack.

    Args:
        known: what was observed of it.
        rows: how many rows of each group are not zero.
        moved: how many of its outputs have a gradient that is not zero.
        samples: of the calibration.
    """
    A = known.weighting.full
    if A is None or not any(rows):
        return known
    means = [M * (samples / n) if n else None for M, n in zip(A, rows, strict=True)]
    mean, shares, weighting = mean_of(means, rows), [0.0] * len(rows), known.weighting
    if len(set(rows)) > 1:
        shares = [share_of_mean(M, n, mean) for M, n in zip(means, rows, strict=True)]
        parts = zip(means, shares, expected(rows), strict=True)
        full = torch.stack([mixed(M, mean, share) * (count / samples) for M, share, count in parts])
        weighting = Weighting(full=full.to(A))
    if known.outputs is None or not any(moved):
        return replace(known, weighting=weighting)
    return replace(known, weighting=weighting, outputs=_of_groups(known, known.outputs, rows, moved, shares, samples))


def _of_groups(
    known: LayerStatistics,
    outputs: OutputMoment,
    rows: Sequence[float],
    moved: Sequence[float],
    shares: Sequence[float],
    samples: int,
) -> OutputMoment:
    """The moments of the gradients of every group.

    Damage multiplies the means of inputs and of gradients over all positions. Rows that a router sends elsewhere are
    zeros in both, and must count in one alone: so gradients are those of the positions, of which the inputs are a part.
    """
    each = [replace(known, outputs=_group(outputs, k), positions=n / samples) for k, n in enumerate(moved)]
    over_all = sum(moved) / sum(rows)
    sent = [min(1.0, m / n if n else over_all) * known.positions for m, n in zip(moved, rows, strict=True)]
    found = [_times(B, count) for B, count in zip(_gradients(each, moved, shares), sent, strict=True) if B is not None]
    if outputs.full is not None:
        return OutputMoment(torch.cat([B.full for B in found if B.full is not None]))
    few = [B.rows[0] for B in found if B.rows is not None]
    return OutputMoment(rows=nn.utils.rnn.pad_sequence(few, batch_first=True))


def _of_stack(known: Sequence[LayerStatistics], rows: Sequence[float], samples: int) -> Sequence[LayerStatistics]:
    """The statistics of the matrices of one stack; as they are where their moments are not held as matrices.

    Args:
        known: what was observed of each.
        rows: how many of them each got.
        samples: of the calibration.
    """
    if any(one.weighting.full is None for one in known if one.weighting.known):
        return known
    means = [None if one.weighting.full is None else one.weighting.full[0] / one.positions for one in known]
    mean, now = mean_of(means, rows), [count / samples for count in expected(rows)]
    shares = [share_of_mean(M, n, mean) for M, n in zip(means, rows, strict=True)]
    gradients = _gradients(known, rows, shares)
    return [
        replace(
            one,
            weighting=Weighting(full=(mixed(M, mean, share) * count)[None].float()),
            outputs=None if B is None else _times(B, count),
            positions=count,
        )
        for one, M, B, share, count in zip(known, means, gradients, shares, now, strict=True)
    ]


def _gradients(
    known: Sequence[LayerStatistics], rows: Sequence[float], shares: Sequence[float]
) -> Sequence[OutputMoment | None]:
    """The moments of the gradients per row, pooled likewise; as they are where one that rows reached has none.

    Args:
        known: what was observed of each matrix.
        rows: how many each got.
        shares: of the mean.
    """
    each = [
        None if B is None or not n else _times(B, 1 / one.positions)
        for one, n in zip(known, rows, strict=True)
        for B in (one.outputs,)
    ]
    if any(B is None for B, n in zip(each, rows, strict=True) if n):
        return each
    full = [None if B is None else B.full for B in each]
    if any(B is not None for B in full):
        means = [None if B is None else B[0] for B in full]
        mean = mean_of(means, rows)
        return [OutputMoment(mixed(M, mean, share)[None].float()) for M, share in zip(means, shares, strict=True)]
    held = [B.rows[0] for B in each if B is not None and B.rows is not None]
    parts = [held[0][:0] if B is None or B.rows is None else B.rows[0] for B in each]
    few = few_of_all(parts, [n / sum(rows) for n in rows])
    mixtures = [torch.cat([r * (1 - part) ** 0.5, few * part**0.5]) for r, part in zip(parts, shares, strict=True)]
    return [OutputMoment(rows=r[None]) for r in mixtures]


def _group(moment: OutputMoment, k: int) -> OutputMoment:
    """Of one group."""
    if moment.full is not None:
        return OutputMoment(moment.full[k : k + 1])
    return OutputMoment(rows=None if moment.rows is None else moment.rows[k : k + 1])


def _times(moment: OutputMoment, factor: float) -> OutputMoment:
    """Of that many times as many rows."""
    if moment.full is not None:
        return OutputMoment(moment.full * factor)
    return OutputMoment(rows=None if moment.rows is None else moment.rows * factor**0.5)


def _stacks(model: nn.Module, names: Iterable[str]) -> list[list[str]]:
    """Layers that are matrices of one stack, each alone in its layer."""
    stacks: dict[tuple[str, torch.Size], list[str]] = defaultdict(list)
    for name in names:
        above = name.rpartition(".")[0]
        parent = model.get_submodule(above)
        if isinstance(parent, Product) and len(parent.sizes) > 2 and not parent.stacked:
            weight = model.get_submodule(name).weight
            stacks[above, weight.shape].append(name)  # type: ignore[index]
    return [stack for stack in stacks.values() if len(stack) > 1]


def _rows(known: LayerStatistics, samples: int) -> float:
    """How many rows a matrix got; 0 where nothing is known of it."""
    return known.positions * samples if known.weighting.known else 0.0

"""Clusters of short pieces of weight rows, by k-means, in the metric of the inputs that the pieces meet."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from taut.decompose.linalg import cholesky, ridge
from taut.decompose.weighting import RIDGE, Weighting
from taut.errors import CallError

ITERATIONS = 25
"""Of Lloyd's algorithm per codebook: what comes later moves few pieces."""

STARTS = 1
"""k-means++ starts per codebook."""


def block_moments(weighting: Weighting, taps: int, columns: int, block: int) -> list[Tensor] | None:
    """Second moment of the inputs that each block of columns meets, mean over groups, with its ridge.

    Args:
        weighting: of the layer's inputs.
        taps: kernel offsets s; column j is channel j // s at offset j % s.
        columns: fan-in c s.
        block: columns per block; the last may have fewer.

    Returns:
        (w, w) in float64 for every block, w <= block; None where nothing is known of the inputs.
    """
    if not weighting.known:
        return None
    bounds = [(start, min(columns, start + block)) for start in range(0, columns, block)]
    return [ridge(_moment(weighting, taps, torch.arange(*ends))[None], RIDGE)[0] for ends in bounds]


def _moment(weighting: Weighting, taps: int, at: Tensor) -> Tensor:
    if weighting.full is not None:
        where = at.to(weighting.full.device)
        return weighting.full[:, where[:, None], where].double().mean(0)
    if weighting.channel is not None:
        where = at.to(weighting.channel.device)
        channel, tap = where // taps, where % taps
        return weighting.channel[:, channel[:, None], channel].double().mean(0) * (tap[:, None] == tap)
    if weighting.sketch is None:
        raise ValueError("this weighting holds no second moment")
    rows = weighting.sketch[..., at.to(weighting.sketch.device)].double()
    found = (rows.mT @ rows).mean(0)
    if weighting.beside is not None:
        found.diagonal().add_(float(weighting.beside.mean()))
    return found


def quantized(W: Tensor, block: int, k: int, moments: list[Tensor] | None, seed: int) -> tuple[Tensor, Tensor]:
    """Product quantization: every block of columns has a codebook of its own.

    Source: Jegou, Douze and Schmid 2011; of networks Gong et al. 2014; in the metric of the inputs Stock et al. 2020.

    Args:
        W: (rows, columns).
        block: columns per code.
        k: entries of each codebook.
        moments: of `block_moments`, or None for the Euclidean distance.
        seed: of k-means++.

    Returns:
        The codebook (k, columns) and the codes (rows, blocks).
    """
    books, codes = [], []
    for place, piece in enumerate(torch.split(W.double(), block, 1)):
        label = labels(piece, k, None if moments is None else moments[place], seed)
        books.append(centres(piece, torch.ones_like(piece), label, k))
        codes.append(label)
    return torch.cat(books, 1), torch.stack(codes, 1)


def quantized_together(W: Tensor, block: int, k: int, moments: list[Tensor] | None, seed: int) -> tuple[Tensor, Tensor]:
    """Vector quantization: all blocks share one codebook, found in the mean metric of the blocks.

    Args:
        W: (rows, columns), columns >= block.
        block: columns per code.
        k: entries of the codebook.
        moments: of `block_moments`, or None for the Euclidean distance.
        seed: of k-means++.

    Returns:
        The codebook (k, block) and the codes (rows, blocks).
    """
    rows, columns = W.shape
    missing = W.new_zeros(rows, -columns % block)
    pieces, known = (torch.cat([t, missing], 1).double().reshape(-1, block) for t in (W, torch.ones_like(W)))
    metric = None if moments is None else torch.stack([A for A in moments if len(A) == block]).mean(0)
    label = labels(pieces, k, metric, seed)
    return centres(pieces, known, label, k), label.reshape(rows, -1)


def labels(pieces: Tensor, k: int, metric: Tensor | None, seed: int) -> Tensor:
    """Clusters (n,) of the pieces (n, d) by k-means in d(a, b) = (a - b) A (a - b)^T; exact where few are distinct.

    Raises:
        CallError: scikit-learn is not installed.
    """
    if k == 1:
        return torch.zeros(len(pieces), dtype=torch.int64, device=pieces.device)
    same: Tensor
    distinct, same = torch.unique(pieces, dim=0, return_inverse=True)
    if len(distinct) <= k:
        return same
    seen = pieces if metric is None else pieces @ cholesky(metric.to(pieces.device)[None])[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # clusters that coincide are no concern here
        fitted = _kmeans()(k, n_init=STARTS, max_iter=ITERATIONS, random_state=seed).fit(seen.cpu().numpy())
    found: Tensor = torch.from_numpy(fitted.labels_)
    return found.to(pieces.device, torch.int64)


def centres(pieces: Tensor, known: Tensor, label: Tensor, k: int) -> Tensor:
    """Mean (k, d) of the pieces of every cluster: the best one in any metric.

    Args:
        pieces: (n, d).
        known: (n, d), 1 where a piece has a value and 0 where it is too short.
        label: (n,), clusters below k.
        k: clusters; where nothing is known of an entry it is the mean of all.
    """
    sums = pieces.new_zeros(k, pieces.shape[1]).index_add_(0, label, pieces * known)
    sizes = torch.zeros_like(sums).index_add_(0, label, known)
    mean = (pieces * known).sum(0) / known.sum(0)
    return torch.where(sizes > 0, sums / sizes.clamp_min(1), mean)


def _kmeans() -> Any:
    try:
        from sklearn.cluster import KMeans  # noqa: PLC0415 - an optional extra
    except ImportError:
        raise CallError("Codebooks need scikit-learn: pip install 'taut[quantize]'.") from None
    return KMeans


LEVELS = 127
"""Largest whole number of eight bits with a sign, so that the range is symmetric."""

SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Shares of the largest weight of a row that are tried as the largest one that is kept; what is above is clipped."""


def rounded(W: Tensor, weighting: Weighting, *, search: bool) -> tuple[Tensor, Tensor]:
    """Whole numbers Q of -127 ... 127 and scales s with W ~ s Q, row by row; zeros stay zeros.

    Args:
        W: (g, o, c, s).
        weighting: metric in which the error is measured.
        search: of several clippings with the best scale each, s = <w, q> / <q, q>, the one of least error; else
            s = max |w| / 127, nothing clipped.

    Returns:
        Q (g, o, c, s) in int8 and s (g, o) in float64.
    """
    wide = W.double()
    largest = wide.abs().flatten(2).amax(-1)
    plain = torch.where(largest > 0, largest / LEVELS, 1.0)
    if not search:
        return _levels(wide, plain), plain
    seen = _metric(weighting)
    wanted = seen(wide)
    energy = wanted.square().sum(-1)
    best, values, scales = torch.full_like(plain, torch.inf), _levels(wide, plain), plain
    for shrink in SHRINKS:
        tried = _levels(wide, shrink * plain)
        found = seen(tried.double())
        norm = found.square().sum(-1)
        scale = torch.where(norm > 0, (wanted * found).sum(-1) / norm, plain)
        error = energy - scale.square() * norm
        better = (error < best) & (scale > 0)
        best, scales = torch.where(better, error, best), torch.where(better, scale, scales)
        values = torch.where(better[..., None, None], tried, values)
    return values, scales


def _levels(W: Tensor, scale: Tensor) -> Tensor:
    return (W / scale[..., None, None]).round().clamp(-LEVELS, LEVELS).to(torch.int8)


def _metric(weighting: Weighting) -> Callable[[Tensor], Tensor]:
    """Weights (g, o, c, s) as rows (g, o, m) whose inner products are those of the metric."""
    if weighting.full is None:
        return weighting.whitened
    L = cholesky(weighting.regular())
    return lambda W: W.flatten(2).double() @ L

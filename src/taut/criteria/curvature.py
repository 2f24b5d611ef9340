"""Second-order criteria: what the loss gains if a weight goes, and how the others make up for it.

Around a trained net the loss rises by dw^T H dw / 2. For one output of a layer, H is the second moment A of its inputs
times the curvature of that output, so that every output is a problem of its own:

    optimal brain damage    H_qq w_q^2 / 2            nothing else moves         (LeCun et al. 1990)
    optimal brain surgeon   w_q^2 / (2 [H^-1]_qq)     the others move by -H^-1 e_q w_q / [H^-1]_qq
                                                                     (Hassibi and Stork 1993; layer by layer:
                                                                      Dong et al. 2017, Frantar and Alistarh 2022)

Removing several weights at once with the exact move of the others is the same as solving for those that stay, whatever
the order; so one order of removal, with its damages, serves every sparsity.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BYTES = 1 << 28
"""Memory that the inverse Hessians of some outputs may take together."""

EXACT = 1_000_000
"""Entries of all inverse Hessians up to which weights go one by one: each weight reads them all. Of more, a share goes
at once, with the exact move of the others."""

SHARE = 0.05

COMPACT = 0.7
"""Share of what an inverse holds that is left when the rest is taken out of it."""


def surgeon(W: Tensor, A: Tensor) -> Tensor:
    """In which order the weights of each output go, and what that costs: the damage of every weight's own removal.

    Args:
        W: (o, k) weights.
        A: (k, k) positive definite second moment of the inputs.

    Returns:
        (o, k) in float64: the squared error w^2 / [A^-1]_qq that removing this weight adds, given those removed before
        it, and at least that of those; in each output rising in the order of removal.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(A.double()))
    parts = [_removed(rows.double(), inverse) for rows in _chunks(W)]
    return torch.cat(parts)


def _removed(W: Tensor, inverse: Tensor) -> Tensor:
    """`surgeon` for a chunk of outputs."""
    o, k = W.shape
    w, P = W.clone(), inverse.repeat(o, 1, 1)
    place = torch.arange(k, device=W.device).repeat(o, 1)  # of the weights that w and P still hold
    here = torch.ones_like(place, dtype=torch.bool)
    order, cost = [], []
    n = k
    while n:
        if n <= COMPACT * w.shape[1]:
            w, P, place, here = _compacted(w, P, place, here, n)
        single = torch.where(here, w.square() / P.diagonal(dim1=1, dim2=2), torch.inf)
        count = 1 if o * n**2 <= EXACT else max(1, round(SHARE * n))
        go = single.topk(count, 1, largest=False).indices
        across = P.gather(1, go[:, :, None].expand(-1, -1, P.shape[1]))  # (o, count, n)
        inside = across.gather(2, go[:, None].expand(-1, count, -1))
        pull = torch.cholesky_solve(across, torch.linalg.cholesky_ex(inside)[0])
        gone, alone = w.gather(1, go), single.gather(1, go)
        moved = torch.einsum("ocn,oc->on", pull, gone)
        joint = (gone * torch.cholesky_solve(gone[:, :, None], torch.linalg.cholesky_ex(inside)[0])[:, :, 0]).sum(1)
        cost.append(alone * (joint / alone.sum(1).clamp_min(1e-300))[:, None])
        order.append(place.gather(1, go))
        w.sub_(moved)
        P.baddbmm_(across.mT, pull, alpha=-1)
        here.scatter_(1, go, False)
        n -= count
    rising = torch.cat(cost, 1).cummax(1).values  # a weight never goes before those that went first
    rising *= 1 + 1e-12 * torch.arange(k, dtype=W.dtype, device=W.device)  # the order is told even so
    return torch.empty_like(W).scatter_(1, torch.cat(order, 1), rising)


def _compacted(w: Tensor, P: Tensor, place: Tensor, here: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same without the weights that are gone."""
    stay = here.nonzero()[:, 1].reshape(-1, n)
    every = torch.arange(len(w), device=w.device)[:, None, None]
    P = P[every, stay[:, :, None], stay[:, None]]
    return w.gather(1, stay), P, place.gather(1, stay), torch.ones_like(stay, dtype=torch.bool)


def compensated(W: Tensor, keep: Tensor, A: Tensor) -> Tensor:
    """The weights that are left, moved so that tr(dW A dW^T) is least: A_KK w_K = A_K: w for every output.

    Args:
        W: (o, k) weights.
        keep: (o, k), True where a weight stays.
        A: (k, k) positive definite second moment of the inputs.

    Returns:
        (o, k) in float64, zero where nothing stays.
    """
    A = A.double()
    found = W.to(torch.float64, copy=True)
    wanted = found @ A
    counts = keep.sum(1)
    open_rows = ((counts > 0) & (counts < W.shape[1])).nonzero()[:, 0]  # a row without zeros is its own solution
    for alike in _alike(counts[open_rows]):
        rows = open_rows[alike]
        most = int(counts[rows].max())
        place = keep[rows].to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]  # kept ones first
        real = keep[rows].gather(1, place)
        system = A[place[:, :, None], place[:, None]] * (real[:, :, None] & real[:, None])
        system.diagonal(dim1=1, dim2=2)[~real] = 1.0
        right = wanted[rows].gather(1, place) * real
        L, info = torch.linalg.cholesky_ex(system)
        solved = torch.cholesky_solve(right[:, :, None], L)[:, :, 0]
        old = W.double()[rows].gather(1, place) * real
        solved = torch.where((info == 0)[:, None] & solved.isfinite(), solved, old)
        found[rows] = torch.zeros_like(found[rows]).scatter_(1, place, solved)
    return torch.where(keep, found, 0.0)


def _chunks(W: Tensor) -> Iterator[Tensor]:
    room = max(1, BYTES // (8 * W.shape[1] ** 2))
    yield from (W[at : at + room] for at in range(0, len(W), room))


def _alike(counts: Tensor) -> Iterator[Tensor]:
    """Outputs in groups that keep about as many weights each, so that little is solved in vain."""
    order = counts.argsort(descending=True)
    while len(order):
        most = int(counts[order[0]])
        room = max(1, BYTES // (8 * most**2))
        yield order[:room]
        order = order[room:]

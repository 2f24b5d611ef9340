"""Monochromatic filters: every output filter reads ONE mixture of the inputs, a "colour" that it shares with others.

W[f, c, s] ~ colour[a(f), c] taps[f, s], with the outputs in clusters a of equal size. A colour and a line through the
origin are the same thing, so the clusters are those of lines: the error of filter f at colour c is |W_f|^2 - |c^T
W_f|^2 for a unit vector c, the best colour of a cluster is the top eigenvector of sum_f W_f W_f^T, and the taps are
fitted again to the shared colour. Source: Denton et al. 2014, section 3.3, which clusters the filters' own colours and
keeps their own taps (`paper`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from taut.decompose.bicluster import second_moments
from taut.decompose.clustering import assign, balanced
from taut.decompose.linalg import cholesky
from taut.decompose.weighting import Weighting

SWEEPS = 30
RESTARTS = 4


@dataclass(frozen=True)
class Colours:
    """A monochromatic approximation.

    Attributes:
        labels: (F,), the colour of every output. colours: (K, C). taps: (F, S).
    """

    labels: Tensor
    colours: Tensor
    taps: Tensor

    def compose(self) -> Tensor:
        """The kernel (F, C, S)."""
        return self.colours[self.labels][:, :, None] * self.taps[:, None, :]


def monochromatic(W: Tensor, k: int, weighting: Weighting, weights: Tensor | None = None) -> Colours:
    """The best k colours found, each for F / k outputs.

    Args:
        W: (F, C, S).
        k: colours, a divisor of F.
        weighting: metric of the inputs (one group).
        weights: (F,), how much every output matters, or None.
    """
    wide = W.double() if weights is None else W.double() * weights.double().sqrt()[:, None, None]
    moments = second_moments(weighting, W.shape[1])
    L = None if moments is None else cholesky(moments[None])[0]
    white = wide if L is None else torch.einsum("dc,fds->fcs", L, wide)
    M = white @ white.mT  # (F, C, C)
    own = torch.linalg.eigh(M)[1][..., -1]
    found = [_lines(M, own, k, torch.Generator().manual_seed(start)) for start in range(RESTARTS)]
    _, labels, colours = min(found, key=lambda triple: triple[0])
    if L is not None:
        colours = torch.linalg.solve_triangular(L.mT, colours.mT, upper=True).mT
    if weighting.full is not None:
        labels, colours, taps = _refine(wide, labels, colours, weighting.regular()[0])
    else:
        metric = torch.eye(W.shape[1], dtype=torch.float64) if moments is None else moments
        mixed = colours @ metric.to(colours)
        scale = (mixed * colours).sum(1)
        taps = torch.einsum("fc,fcs->fs", (mixed / scale[:, None])[labels], wide)
    if weights is not None:
        taps = taps / weights.double().sqrt().clamp_min(1e-150)[:, None]
    return Colours(labels, colours, taps)


def paper(W: Tensor, k: int) -> Colours:
    """The source's way: Euclidean clusters of the filters' own sign-fixed colours; their own taps are kept."""
    U, s, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    own, taps = U[..., 0], s[:, :1] * Vh[:, 0]
    sign = own.gather(1, own.abs().argmax(1, keepdim=True)).sign()
    own, taps = own * sign, taps * sign
    labels = balanced(own, k, "euclidean", restarts=10)
    colours = torch.stack([own[labels == a].mean(0) for a in range(k)])
    return Colours(labels, colours / colours.norm(dim=1, keepdim=True).clamp_min(1e-300), taps)


def _lines(M: Tensor, own: Tensor, k: int, generator: torch.Generator) -> tuple[float, Tensor, Tensor]:
    """Error, labels and unit colours of one start."""
    energy = M.diagonal(dim1=1, dim2=2).sum(1)
    colours = own[_far_apart(M, own, energy, k, generator)]
    best, labels = float("inf"), torch.zeros(len(M), dtype=torch.long)
    kept = labels, colours
    for _ in range(SWEEPS):
        distances = energy[:, None] - torch.einsum("kc,fcd,kd->fk", colours, M, colours)
        labels = assign(distances)
        error = float(distances.gather(1, labels[:, None]).sum())
        if error >= best * (1 - 1e-9):
            break
        best, kept = error, (labels, colours)
        sums = M.new_zeros(k, *M.shape[1:]).index_add_(0, labels, M)
        colours = torch.linalg.eigh(sums)[1][..., -1]
    return best, *kept


def _far_apart(M: Tensor, own: Tensor, energy: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Filters whose colours start the clusters: each drawn in proportion to what those before leave of it."""
    left, picks = energy.clone(), []
    for _ in range(k):
        share = left.clamp_min(0)
        share = share if float(share.sum()) > 0 else torch.ones_like(share)
        picks.append(int(torch.multinomial(share.cpu(), 1, generator=generator)))
        colour = own[picks[-1]]
        left = torch.minimum(left, energy - torch.einsum("c,fcd,d->f", colour, M, colour))
    return torch.tensor(picks)


def _refine(W: Tensor, labels: Tensor, colours: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Colours, taps and clusters improved in turn in the whole metric A (C S, C S) of the unfolded inputs."""
    F, C, S = W.shape
    A4 = A.reshape(C, S, C, S)
    AW = (W.flatten(1) @ A).reshape(F, C, S)
    energy = (AW * W).sum((1, 2))
    best, kept = float("inf"), (labels, colours, W.new_zeros(F, S))
    for _ in range(SWEEPS):
        normal = torch.einsum("kc,csdt,kd->kst", colours, A4, colours)
        response = torch.einsum("kc,fcs->kfs", colours, AW)
        solved = torch.cholesky_solve(response.mT, cholesky(normal)).mT  # taps of every filter at every colour
        distances = energy[:, None] - (solved * response).sum(-1).T
        labels = assign(distances)
        error = float(distances.gather(1, labels[:, None]).sum())
        if error >= best * (1 - 1e-7):
            break
        taps = solved[labels, torch.arange(F)]
        best, kept = error, (labels, colours, taps)
        colours = _best_colours(AW, A4, taps, labels, len(colours))
    return kept


def _best_colours(AW: Tensor, A4: Tensor, taps: Tensor, labels: Tensor, k: int) -> Tensor:
    squares = taps.new_zeros(k, *2 * taps.shape[1:]).index_add_(0, labels, taps[:, :, None] * taps[:, None, :])
    response = AW.new_zeros(k, AW.shape[1]).index_add_(0, labels, torch.einsum("fcs,fs->fc", AW, taps))
    normal = torch.einsum("csdt,kst->kcd", A4, squares)
    found: Tensor = torch.cholesky_solve(response[..., None], cholesky(normal))[..., 0]
    return found.div(found.norm(dim=1, keepdim=True).clamp_min(1e-300))

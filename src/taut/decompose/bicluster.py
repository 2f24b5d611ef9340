"""Biclustering of a kernel: inputs in G clusters, outputs in H clusters of equal size, every block fitted on its own.

A block W_gh (F / H, C / G, S) of similar filters is easier to fit at low rank than the whole kernel. Two forms: two
SVDs (a Tucker-2 of the block) and sums of K rank-1 terms. Source: Denton et al. 2014, sections 3.2.2 and 3.4.

Blocks are stacked output cluster first: place h G + g.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from taut.decompose.clustering import balanced
from taut.decompose.cp import cp, greedy
from taut.decompose.linalg import cholesky, gram, left_basis, ridge, root
from taut.decompose.projection import input_basis
from taut.decompose.svd import directions
from taut.decompose.tucker import tucker2
from taut.decompose.weighting import RIDGE, Weighting


@dataclass(frozen=True)
class Biclusters:
    """Which channels stand together.

    Attributes:
        inputs: (C,) and outputs: (F,), the channels cluster by cluster. G, H: how many clusters.
    """

    inputs: Tensor
    outputs: Tensor
    G: int
    H: int

    def blocks(self, W: Tensor) -> Tensor:
        """The blocks (H G, F / H, C / G, S) of W (F, C, S)."""
        turned = W[self.outputs][:, self.inputs]
        split = turned.reshape(self.H, -1, self.G, turned.shape[1] // self.G, W.shape[2])
        return split.transpose(1, 2).flatten(0, 1)

    def whole(self, blocks: Tensor) -> Tensor:
        """The kernel (F, C, S) of its blocks, channels in their original order."""
        split = blocks.reshape(self.H, self.G, *blocks.shape[1:]).transpose(1, 2)
        turned = split.reshape(len(self.outputs), len(self.inputs), -1)
        return turned[self.outputs.argsort()][:, self.inputs.argsort()]

    def metric(self, weighting: Weighting, B: Tensor | None) -> tuple[Weighting, Tensor | None]:
        """The metrics of the blocks: what inputs of different clusters have in common is left to the last solve."""
        C, F = len(self.inputs), len(self.outputs)
        full = channel = None
        if weighting.full is not None:
            S = weighting.full.shape[-1] // C
            A = weighting.full[0].reshape(C, S, C, S)[self.inputs][:, :, self.inputs]
            A = A.reshape(self.G, C // self.G, S, self.G, C // self.G, S)
            parts = torch.stack([A[g, :, :, g] for g in range(self.G)])
            full = parts.reshape(self.G, C // self.G * S, -1).repeat(self.H, 1, 1)
        elif weighting.channel is not None:
            A = weighting.channel[0][self.inputs][:, self.inputs].reshape(self.G, C // self.G, self.G, C // self.G)
            channel = torch.stack([A[g, :, g] for g in range(self.G)]).repeat(self.H, 1, 1)
        if B is not None:
            split = B[0][self.outputs][:, self.outputs].reshape(self.H, F // self.H, self.H, F // self.H)
            B = torch.stack([split[h, :, h] for h in range(self.H)]).repeat_interleave(self.G, 0)
        return Weighting(full=full, channel=channel), B


def bicluster(
    W: Tensor, G: int, H: int, weighting: Weighting, B: Tensor | None = None, distance: str = "projection"
) -> Biclusters:
    """Clusters of similar input and of similar output filters.

    Args:
        W: (F, C, S).
        G: clusters of inputs, a divisor of C.
        H: clusters of outputs, a divisor of F.
        weighting: metric of the inputs (one group); inputs are compared with the root of their second moment.
        B: (1, F, F), metric of the outputs, or None.
        distance: "projection" or "euclidean".
    """
    wide = W.double()
    outputs = weighting.whitened(wide[None])[0] if H > 1 else wide.flatten(1)
    inputs = wide if B is None else torch.einsum("qo,ocs->qcs", root(B[0])[0], wide)
    size = second_moments(weighting, W.shape[1])
    if size is not None:
        inputs = inputs * size.diagonal().sqrt()[:, None]
    if B is not None:
        outputs = outputs * B[0].diagonal().sqrt()[:, None].to(outputs)
    return Biclusters(
        balanced(inputs.transpose(0, 1).flatten(1), G, distance).argsort(stable=True),
        balanced(outputs, H, distance).argsort(stable=True),
        G,
        H,
    )


def second_moments(weighting: Weighting, channels: int) -> Tensor | None:
    """The second moment (C, C) of the input channels, averaged over kernel offsets; None where nothing is known."""
    if weighting.channel is not None:
        return ridge(weighting.channel, RIDGE)[0]
    if weighting.full is None:
        return None
    offsets = weighting.full.shape[-1] // channels
    A = weighting.full.reshape(-1, channels, offsets, channels, offsets)
    return ridge(torch.einsum("gcsds->gcd", A) / offsets, RIDGE)[0]


def two_svds(
    blocks: Tensor, r_in: int, r_out: int, weighting: Weighting, B: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Tucker-2 of every block; in the Frobenius norm refined by HOOI.

    Args:
        blocks: (n, o, c, s).
        r_in: K1, channels between the inputs and the kernel, at most min(c, o s).
        r_out: K2, channels between the kernel and the outputs, at most min(o, r_in s).
        weighting: metric of the blocks' inputs.
        B: (n, o, o), metric of their outputs, or None.

    Returns:
        V (n, c, r_in), core (n, r_out, r_in, s), U (n, o, r_out), in float64.
    """
    if not weighting.known and B is None:
        V, core, U = tucker2(blocks, r_in, r_out)
        return V.double(), core.double(), U.double()
    half = None if B is None else root(B)
    basis = input_basis(blocks.double(), weighting, blocks.shape[2], None if half is None else half[0])
    output = directions(basis.explained(r_in), half, r_out)
    core = torch.einsum("nqo,norp->nqrp", output.down[:, :r_out], basis.solve(r_in))
    return basis.V[..., :r_in].double(), core, output.up[..., :r_out]


def paper_svds(blocks: Tensor, r_in: int, r_out: int, *, outputs_first: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The source's form: an SVD of the input side, then one of its right factor V, WITHOUT the singular values.

    Args, Returns:
        As `two_svds`; `outputs_first` is the order of an implementation by others, in which r_out is bounded by
        min(o, c s) and r_in by min(c, r_out s).
    """
    if not outputs_first:
        return _paper(blocks, r_in, r_out)
    U, core, V = _paper(blocks.transpose(1, 2), r_out, r_in)
    return V, core.transpose(1, 2), U


def _paper(blocks: Tensor, first: int, second: int) -> tuple[Tensor, Tensor, Tensor]:
    """W = U S V^T with the rows of U along the inputs; then V^T, regarded as (K1 s) x o, again by its SVD."""
    n, o, _, s = blocks.shape
    rows = blocks.double().permute(0, 2, 3, 1).flatten(2)  # (n, c, s o)
    left, energy = left_basis(rows)
    values = energy.sqrt()[:, :first]
    right = (left[..., :first].mT @ rows) / values.clamp_min(1e-300)[..., None]  # V^T
    inner = right.reshape(n, -1, s, o).flatten(1, 2)  # (n, K1 s, o)
    outer, _ = left_basis(inner.mT)
    U = outer[..., :second]
    core = (inner @ U).reshape(n, -1, s, U.shape[-1]).permute(0, 3, 1, 2)
    return left[..., :first] * values[:, None], core, U


def rank_one_terms(
    blocks: Tensor, rank: int, weighting: Weighting, B: Tensor | None = None, *, paper: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Every block as a sum of `rank` outer products of inputs, kernel offsets and outputs.

    The second moment of the unfolded inputs is approximated by a Kronecker product of channels and offsets, so that
    the terms stay terms; `paper` fits them one after the other, in the Frobenius norm.

    Returns:
        Factors (n, c, K), (n, s, K), (n, o, K) in float64.
    """
    T = blocks.double().permute(0, 2, 3, 1)  # (n, c, s, o)
    if paper:
        return greedy(T, rank)  # type: ignore[return-value] # three modes, three factors
    roots = [*_roots(weighting, *T.shape[1:3]), None if B is None else root(B)]
    for mode, pair in enumerate(roots, 1):
        if pair is not None:
            T = (pair[0] @ T.movedim(mode, 1).flatten(2)).reshape(T.movedim(mode, 1).shape).movedim(1, mode)
    factors = cp(T, rank, sweeps=60, tol=1e-5, restarts=2)  # a hundred blocks: the last digits take most of the time
    plain = [f if pair is None else pair[1] @ f for f, pair in zip(factors, roots, strict=True)]
    return plain[0], plain[1], plain[2]


def _roots(weighting: Weighting, c: int, s: int) -> list[tuple[Tensor, Tensor] | None]:
    """A^{1/2} and A^{-1/2} of channels and of offsets."""
    if weighting.channel is not None:
        return [root(ridge(weighting.channel, RIDGE)), None]
    if weighting.full is None:
        return [None, None]
    A = weighting.regular().reshape(-1, c, s, c, s)
    channels, offsets = torch.einsum("ncsds->ncd", A), torch.einsum("ncsct->nst", A)
    total = offsets.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    return [root(channels), root(offsets / total)]


def solve_last(clusters: Biclusters, W: Tensor, features: Tensor, weighting: Weighting) -> Tensor:
    """The best last layer on given features, over all input clusters at once and in the whole metric of the inputs.

    Args:
        clusters: of W (F, C, S).
        W: the kernel.
        features: (H G, q, C / G, S), what the layers before the last compute in every block.
        weighting: of the whole layer.

    Returns:
        (H G, F / H, q) in float64.
    """
    H, G, q = clusters.H, clusters.G, features.shape[1]
    place = torch.zeros(H, G, q, len(clusters.inputs), W.shape[2], dtype=torch.float64, device=W.device)
    size = len(clusters.inputs) // G
    for g in range(G):
        place[:, g, :, clusters.inputs[g * size : (g + 1) * size]] = features.reshape(H, G, *features.shape[1:])[:, g]
    wanted = W.double()[clusters.outputs].reshape(H, -1, *W.shape[1:])
    both = torch.cat([place.flatten(1, 2), wanted], 1)  # (H, G q + F / H, C, S)
    X = torch.cat([weighting.whitened(one[None]) for one in both])
    S = gram(X)
    normal, response = S[:, : G * q, : G * q], S[:, G * q :, : G * q]
    solved = torch.cholesky_solve(response.mT, cholesky(normal)).mT  # (H, F / H, G q)
    return solved.reshape(H, -1, G, q).transpose(1, 2).flatten(0, 1)

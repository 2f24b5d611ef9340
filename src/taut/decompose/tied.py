"""Low rank of one weight that several layers use, each in a metric of its own.

A use of W (V, d) loses tr(M dWᵀ R dW): R weighs its rows and M its columns. An embedding reads row v so many times, and
its outputs matter by the second moment of their gradients; a linear layer meets inputs of a second moment, and its
outputs matter likewise. With dW = W (I - P) the loss of all uses is that of sum_k C_k (x) M_k, C = Wᵀ R W, for which no
spectrum tells the best P. In its stead the nearest Kronecker product C (x) M of that sum is taken (Van Loan and
Pitsianis 1993), of which one eigendecomposition gives the best P of every rank; what each P really loses is told by
the sum itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from taut.decompose.linalg import metric_factor
from taut.decompose.svd import OutputBasis, directions

ROUNDS = 64
"""Steps of the power iteration on matrices as large as there are uses: these hold no negative numbers."""


@dataclass(frozen=True)
class Use:
    """What one layer loses where the weight changes: tr(M dWᵀ R dW).

    Attributes:
        rows: (d, d), C = Wᵀ R W. columns: (d, d), M.
    """

    rows: Tensor
    columns: Tensor


def shared_directions(uses: Sequence[Use]) -> OutputBasis:
    """Nested directions of the rows of a weight, up (1, d, d) and down (1, d, d): W ~ W downᵀ upᵀ, cut at any rank."""
    C, M = nearest(uses)
    return directions(C[None], metric_factor(M[None]))


def nearest(uses: Sequence[Use]) -> tuple[Tensor, Tensor]:
    """C and M whose Kronecker product is nearest to the sum of those of all uses."""
    C, M = (torch.stack([getattr(use, key) for use in uses]).double() for key in ("rows", "columns"))
    C, M = (t / t.flatten(1).norm(dim=1).amax().clamp_min(1e-300) for t in (C, M))
    products = [torch.einsum("kij,lij->kl", t, t) for t in (C, M)]
    shares = torch.ones(len(uses), dtype=torch.float64, device=C.device)
    for _ in range(ROUNDS):
        shares = products[1] @ (products[0] @ shares)
        shares = shares / shares.norm().clamp_min(1e-300)
    others = products[0] @ shares
    if not bool(others.any()):
        shares = others = torch.ones_like(shares)  # a weight of zeros
    return torch.einsum("k,kij->ij", shares, C), torch.einsum("k,kij->ij", others / others.sum(), M)


def lost(rows: Tensor, columns: Tensor) -> Tensor:
    """What a use loses where the first r directions are kept, for r = 0 ... d: (d + 1,).

    Args:
        rows: (d, d), down C downᵀ.
        columns: (d, d), upᵀ M up.
    """
    terms = (rows * columns).flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
    return torch.cat([terms, terms.new_zeros(1)]).clamp_min(0.0)

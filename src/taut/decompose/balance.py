"""Gauge of a factorization: the same product with factors of equal size, so that training does not destroy it.

In the whitened gauge a core of rms 5e-4 can stand beside a factor of 1,000; one Adam step then ruins the layer.
"""

from __future__ import annotations

import torch
from torch import Tensor


def equalize(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each of r components so that both factors carry the same norm.

    Args:
        first: (g, r, n), rows feed the components.
        second: (g, o, r), columns read them.

    Returns:
        The scaled factors; their product is unchanged. Zero components stay as they are.
    """
    a, b = first.norm(dim=-1), second.norm(dim=-2)
    scale = torch.where((a > 0) & (b > 0), (b / a.clamp_min(1e-300)).sqrt(), torch.ones_like(a))
    return first * scale[..., None], second / scale[:, None, :]


def orthogonalize(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Make the rows of `first` orthonormal, their triangular factor folded into `second`; then `equalize`.

    Args:
        first: (g, r, n) with r <= n.
        second: (g, o, r, p).
    """
    Q, R = torch.linalg.qr(first.mT)
    moved = torch.einsum("gsr,gorp->gosp", R, second)
    norms = moved.permute(0, 2, 1, 3).flatten(2).norm(dim=-1)
    scale = torch.where(norms > 0, norms.clamp_min(1e-300).sqrt(), torch.ones_like(norms))
    return Q.mT * scale[..., None], moved / scale[:, None, :, None]


def level(*factors: Tensor) -> tuple[Tensor, ...]:
    """Scale whole factors so that all have the same Frobenius norm; their product is unchanged."""
    norms = torch.stack([factor.norm() for factor in factors])
    if not bool((norms > 0).all()):
        return factors
    mean = norms.log().mean().exp()
    return tuple(factor * (mean / norm) for factor, norm in zip(factors, norms, strict=True))

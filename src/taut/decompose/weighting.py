"""What "close" means: the second moment of a layer's inputs as a metric on its weights.

||dW||^2 = tr(dW A dW^T) is the mean squared change of the layer's output, A = E[x x^T] (Denton et al. 2014, section
3.2.2, "data covariance distance"). Where the unfolded A is too large, a Kronecker form A_c (x) I of the channels, or a
sketch of the inputs themselves, takes its place, so that memory stays bounded by the layer.

Weights are (g, o, c, s): groups, outputs per group, inputs per group, kernel offsets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from taut.decompose.linalg import cholesky, gram, ridge

RIDGE = 1e-4
"""Share of the mean eigenvalue added to A: directions that calibration never saw keep some weight."""

PROBES = 256
"""Random probes of W that stand for the ridge beside a sketch."""


@dataclass(frozen=True)
class Weighting:
    """A second moment of inputs in one of three forms, or none (the Frobenius norm).

    Attributes:
        full: (g, c s, c s), of the unfolded input.
        channel: (g, c, c), of the input's channels; the offsets count as uncorrelated.
        sketch: (g, m, c s), rows with E[rows^T rows] = A.
    """

    full: Tensor | None = None
    channel: Tensor | None = None
    sketch: Tensor | None = None

    @property
    def known(self) -> bool:
        """Whether any second moment is held."""
        return not (self.full is None and self.channel is None and self.sketch is None)

    @property
    def groups(self) -> int:
        """Groups of the layer; 0 where nothing is held."""
        held = next((A for A in (self.full, self.channel, self.sketch) if A is not None), None)
        return 0 if held is None else len(held)

    def part(self, group: int) -> Weighting:
        """Of one group alone."""
        held = {"full": self.full, "channel": self.channel, "sketch": self.sketch}
        return Weighting(**{key: None if A is None else A[group : group + 1] for key, A in held.items()})

    def narrowed(self, outputs: Tensor, inputs: Tensor, sizes: tuple[int, int]) -> Weighting:
        """Of the groups and of the inputs in them that are left.

        Args:
            outputs: kept ones.
            inputs: kept ones, of each group.
            sizes: outputs, and inputs of each group, before.
        """
        per_group = sizes[0] // max(self.groups, 1)
        groups = torch.bincount(outputs // max(per_group, 1)).nonzero().flatten()

        def part(A: Tensor, *axes: int) -> Tensor:
            A = A[groups.to(A.device)]
            taps = A.shape[-1] // sizes[1]
            columns = (inputs[:, None] * taps + torch.arange(taps)).flatten().to(A.device)
            for axis in axes:
                A = A.index_select(axis, columns)
            return A

        return Weighting(
            full=None if self.full is None else part(self.full, 1, 2),
            channel=None if self.channel is None else part(self.channel, 1, 2),
            sketch=None if self.sketch is None else part(self.sketch, 2),
        )

    def regular(self) -> Tensor:
        """`full` in float64 with its ridge, (g, c s, c s)."""
        if self.full is None:
            raise ValueError("this weighting holds no full second moment")
        return ridge(self.full, RIDGE)

    def diagonal(self) -> Weighting:
        """Its diagonal alone: inputs of different size, regarded as uncorrelated. A sketch gives it as a sketch."""
        if self.sketch is not None:
            size = self.sketch.double().square().sum(1).sqrt()
            return Weighting(sketch=torch.diag_embed(size).to(self.sketch))
        parts = {
            key: torch.diag_embed(A.diagonal(dim1=-2, dim2=-1))
            for key, A in (("full", self.full), ("channel", self.channel))
            if A is not None
        }
        return Weighting(**parts)

    def whitened(self, W: Tensor) -> Tensor:
        """X (g, o, m) in float64 with X X^T = W A W^T (in expectation for a sketch)."""
        flat = W.flatten(2)
        if self.full is not None:
            return flat.double() @ cholesky(self.regular())
        if self.channel is not None:
            L = cholesky(ridge(self.channel, RIDGE))
            return torch.einsum("gocs,gcd->gods", W.double(), L).flatten(2)
        if self.sketch is not None:
            return self._sketched(flat)
        return flat.double()

    def gram(self, W: Tensor) -> Tensor:
        """W A W^T, (g, o, o), in float64."""
        if self.full is not None:
            flat = W.flatten(2).double()
            return flat @ self.regular() @ flat.mT
        X = self.whitened(W)
        return gram(X)

    def energy(self, W: Tensor) -> float:
        """tr(W A W^T): mean squared output of the layer."""
        return float(self.gram(W).diagonal(dim1=-2, dim2=-1).sum())

    def _sketched(self, flat: Tensor) -> Tensor:
        if self.sketch is None:
            raise ValueError("this weighting holds no sketch")
        rows = self.sketch.to(flat.dtype)
        k = flat.shape[-1]
        lift = RIDGE * float(rows.double().square().sum()) / (rows.shape[0] * k)
        noise = torch.randn(k, min(k, PROBES), generator=torch.Generator().manual_seed(0)).to(flat)
        noise *= (lift / noise.shape[1]) ** 0.5
        return torch.cat([flat @ rows.mT, flat @ noise], -1).double()

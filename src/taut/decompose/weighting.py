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
"""Random probes of W that stand for the ridge beside a sketch, where W has more outputs than inputs."""

WIDE = 2304
"""Inputs up to which products with a full moment are made in float64: of more they take minutes."""


@dataclass(frozen=True)
class Weighting:
    """A second moment of inputs in one of three forms, or none (the Frobenius norm).

    Attributes:
        full: (g, c s, c s), of the unfolded input.
        channel: (g, c, c), of the input's channels; the offsets count as uncorrelated.
        sketch: (g, m, c s), rows with E[rows^T rows] = A.
        beside: (g,), what A has more than the sketch in all directions; None: nothing.
    """

    full: Tensor | None = None
    channel: Tensor | None = None
    sketch: Tensor | None = None
    beside: Tensor | None = None

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
        held = {"full": self.full, "channel": self.channel, "sketch": self.sketch, "beside": self.beside}
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
            beside=None if self.beside is None else self.beside[groups.to(self.beside.device)],
        )

    def regular(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """`full` with its ridge, (g, c s, c s)."""
        if self.full is None:
            raise ValueError("this weighting holds no full second moment")
        lifted = self.full.to(dtype, copy=True)
        lifted.diagonal(dim1=-2, dim2=-1).add_(self.lift()[:, None])
        return lifted

    def handy(self, channels: int) -> Weighting:
        """The same, but of its channels alone where kernel offsets make the matrix too large for long searches."""
        if self.full is None or self.full.shape[-1] <= WIDE or self.full.shape[-1] == channels:
            return self
        offsets = self.full.shape[-1] // channels
        A = self.full.view(-1, channels, offsets, channels, offsets)
        return Weighting(channel=A.diagonal(dim1=2, dim2=4).mean(-1))

    def lift(self) -> Tensor:
        """What is added in all directions, (g,) in float64: the ridge, and what lies beside a sketch."""
        if self.sketch is not None:
            mean = self.sketch.double().square().sum((1, 2)) / self.sketch.shape[-1]
            beside = torch.zeros_like(mean) if self.beside is None else self.beside.double()
            return beside + RIDGE * (mean + beside)
        A = self.full if self.full is not None else self.channel
        if A is None:
            raise ValueError("this weighting holds no second moment")
        mean = A.diagonal(dim1=-2, dim2=-1).double().mean(-1)
        return torch.where(mean > 0, RIDGE * mean, 1.0)

    def diagonal(self) -> Weighting:
        """Its diagonal alone: inputs of different size, regarded as uncorrelated. A sketch gives it as a sketch."""
        if self.sketch is not None:
            squares = self.sketch.double().square().sum(1)
            squares = squares if self.beside is None else squares + self.beside.double()[:, None]
            return Weighting(sketch=torch.diag_embed(squares.sqrt()).to(self.sketch))
        parts = {
            key: torch.diag_embed(A.diagonal(dim1=-2, dim2=-1))
            for key, A in (("full", self.full), ("channel", self.channel))
            if A is not None
        }
        return Weighting(**parts)

    def squares(self) -> Tensor | None:
        """Of every column the diagonal of the moment, (g, c s), or (g, c) of channels; None where nothing is known."""
        if self.sketch is not None:
            squares = self.sketch.square().sum(1)
            return squares if self.beside is None else squares + self.beside[:, None]
        A = self.full if self.full is not None else self.channel
        return None if A is None else A.diagonal(dim1=-2, dim2=-1)

    def whitened(self, W: Tensor) -> Tensor:
        """X (g, o, m) in float64 with X X^T = W A W^T (in expectation for a sketch)."""
        flat = W.flatten(2)
        if self.full is not None:
            L = cholesky(self.regular())
            if flat.shape[-1] <= WIDE:
                return flat.double() @ L
            X, size = _sized(flat)
            return size * (X @ L.float()).double()
        if self.channel is not None:
            L = cholesky(ridge(self.channel, RIDGE))
            return torch.einsum("gocs,gcd->gods", W.double(), L).flatten(2)
        if self.sketch is not None:
            return self._sketched(flat, self.sketch)
        return flat.double()

    def gram(self, W: Tensor) -> Tensor:
        """W A W^T, (g, o, o), in float64."""
        flat = W.flatten(2)
        if self.full is not None:
            if flat.shape[-1] <= WIDE:
                return flat.double() @ self.regular() @ flat.double().mT
            X, size = _sized(flat)
            S = X @ self.full.float() @ X.mT
            return size**2 * (S.double() + self.lift()[:, None, None] * gram(X).double())
        if self.sketch is not None:
            X, size = _sized(flat)
            S = gram(X @ self.sketch.to(X).mT)
            return size**2 * (S.double() + self.lift()[:, None, None] * gram(X).double())
        return gram(self.whitened(W))

    def energy(self, W: Tensor) -> float:
        """tr(W A W^T): mean squared output of the layer."""
        flat = W.flatten(2)
        if self.channel is not None:
            turned = torch.einsum("gocs,gcd->gods", W.double(), ridge(self.channel, RIDGE))
            return float((turned * W).sum())
        if not self.known:
            return float(flat.double().square().sum())
        if self.full is not None:
            X, size = (flat.double(), 1.0) if flat.shape[-1] <= WIDE else _sized(flat)
            inside = size**2 * (X @ self.full.to(X) * X).double().sum((1, 2))
        else:
            inside = (flat @ self.sketch.to(flat).mT).double().square().sum((1, 2))  # type: ignore[union-attr]
        return float((inside + self.lift() * flat.double().square().sum((1, 2))).sum())

    def _sketched(self, flat: Tensor, sketch: Tensor) -> Tensor:
        rows = sketch.to(flat.dtype)
        k = flat.shape[-1]
        noise = torch.randn(k, min(k, PROBES), generator=torch.Generator().manual_seed(0)).to(flat)
        roots = (self.lift() / noise.shape[1]).sqrt()[:, None, None].to(flat)
        return torch.cat([flat @ rows.mT, roots * (flat @ noise)], -1).double()


def _sized(flat: Tensor) -> tuple[Tensor, float]:
    """A weight in float32 with entries up to 1, so that no square leaves its range, and what it was divided by."""
    size = float(flat.abs().amax()) or 1.0
    return (flat / size).float(), size

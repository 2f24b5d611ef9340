"""A basis of channels that several layers share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Basis(nn.Module):
    """A basis of channels that several layers share: n channels gathered into k, or spread from k.

    Layers hold the very same `weight`, so that it is counted, stored and trained once.

    Args:
        weight: (n, k).
        axes: spatial axes behind the channels; 0 behind or before a Linear.
        spread: from k to n, else from n to k.
        inner: features that every channel has in a row, as behind a flatten; for gathering.
        bias: (n,) or (k,), added to what is given.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        weight: nn.Parameter,
        axes: int,
        *,
        spread: bool = False,
        inner: int = 1,
        bias: nn.Parameter | None = None,
    ) -> None:
        """See the class."""
        super().__init__()
        self.axes, self.spread, self.inner = axes, spread, inner
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """X (..., channels, *axes), with or without a batch."""
        if self.inner > 1:
            channels = x.ndim - self.axes - 1
            rows = torch.unflatten(x, channels, (len(self.weight), self.inner)).movedim(channels, -1)
            gathered: Tensor = (rows @ self.weight).movedim(-1, channels).flatten(channels, channels + 1)
            return gathered
        matrix = self.weight if self.spread else self.weight.mT
        if not self.axes:
            return functional.linear(x, matrix, self.bias)
        convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[self.axes - 1]
        return convolve(x, matrix.reshape(*matrix.shape, *[1] * self.axes), self.bias)

    def to_plain(self) -> nn.Module:
        """The same as a Linear or a 1 x 1 convolution with a weight of its own; a block matrix behind a flatten."""
        matrix = self.weight.detach() if self.spread else self.weight.detach().mT
        if self.inner > 1:
            matrix = torch.kron(matrix.contiguous(), torch.eye(self.inner).to(matrix))
        outputs, inputs = matrix.shape
        bias = self.bias is not None
        kinds: tuple[Any, ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        size = (inputs, outputs, 1) if self.axes else (inputs, outputs)
        built: nn.Module = kinds[self.axes](*size, bias=bias, device="meta").to_empty(device=matrix.device)
        matrix = matrix.reshape(outputs, inputs, *[1] * self.axes)
        built.weight = nn.Parameter(matrix.clone(memory_format=torch.contiguous_format))
        if self.bias is not None:
            built.bias = nn.Parameter(self.bias.detach().clone())
        return built.train(self.training)

    def extra_repr(self) -> str:
        """Channels in and out."""
        inputs, outputs = self.weight.shape[:: -1 if self.spread else 1]
        inner = f" x {self.inner}" if self.inner > 1 else ""
        return (
            f"{'spread' if self.spread else 'gather'} {inputs}{inner} -> {outputs}{inner}, bias={self.bias is not None}"
        )

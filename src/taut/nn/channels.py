"""Channels in another order, and some of the channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Reorder(nn.Module):
    """The channels in another order: output channel i is input channel `order[i]`.

    Stands before or behind layers whose channels are clustered, until `taut.apply` has folded it into the neighbours;
    it stays where that is not exact, as at a residual connection.

    Args:
        order: (C,), a permutation.
        axes: spatial axes behind the channels.
    """

    order: Tensor

    def __init__(self, order: Tensor, axes: int) -> None:
        """See the class."""
        super().__init__()
        self.axes = axes
        self.register_buffer("order", order.to(torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        """X (..., C, *axes), with or without a batch."""
        return x.index_select(x.ndim - self.axes - 1, self.order)

    def undone(self, values: Tensor) -> Tensor:
        """Values (C, ...) per output channel, in the order of the input channels."""
        return torch.empty_like(values).index_copy_(0, self.order.long().to(values.device), values)

    def to_plain(self) -> nn.Module:
        """The same as a 1 x 1 convolution with a permutation matrix: plain, and far more work."""
        size = len(self.order)
        built = getattr(nn, f"Conv{self.axes}d")(size, size, 1, bias=False)
        with torch.no_grad():
            built.weight.copy_(torch.eye(size)[self.order.long()].reshape(built.weight.shape))
        plain: nn.Module = built.to(self.order.device)
        return plain

    def extra_repr(self) -> str:
        """Channels."""
        return f"{len(self.order)} channels"


class Pick(nn.Module):
    """Some of the channels: output channel i is input channel `index[i]`.

    Stands before a layer of which some inputs are read by nobody, where what gives them cannot be made narrower: the
    input of the network, a concatenation, a sum that others read too.

    Args:
        index: (k,), kept channels.
        axes: spatial axes behind the channels.
    """

    index: Tensor

    def __init__(self, index: Tensor, axes: int) -> None:
        """See the class."""
        super().__init__()
        self.axes = axes
        self.register_buffer("index", index.to(torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        """X (..., C, *axes), with or without a batch."""
        return x.index_select(x.ndim - self.axes - 1, self.index)

    def to_plain(self, channels: int) -> nn.Module:
        """The same as a 1 x 1 convolution, or a Linear, with a matrix of zeros and ones: plain, and far more work.

        Args:
            channels: of the input, C.
        """
        kept = len(self.index)
        conv = getattr(nn, f"Conv{self.axes}d", None)
        built = nn.Linear(channels, kept, bias=False) if conv is None else conv(channels, kept, 1, bias=False)
        with torch.no_grad():
            built.weight.copy_(torch.eye(channels)[self.index.long().cpu()].reshape(built.weight.shape))
        plain: nn.Module = built.to(self.index.device)
        return plain

    def extra_repr(self) -> str:
        """Channels."""
        return f"{len(self.index)} channels"

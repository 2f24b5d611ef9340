"""Low rank plus sparse as one module."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class LowRankSparse(nn.Module):
    """Two thin layers beside a few weights of the dense one: y = B (A x) + R x, with R stored by its places.

    R is made dense whenever it is multiplied: this saves bytes, not time.

    Args:
        first: of the dense layer's kernel, stride, padding and dilation, to r channels.
        second: a Linear or a 1 x 1 convolution to the outputs, with the bias.
        values: (nnz,), the weights of R that are not zero.
        places: (nnz,), where they stand in the flattened weight.
    """

    places: Tensor

    def __init__(self, first: nn.Module, second: nn.Module, values: nn.Parameter, places: Tensor) -> None:
        """See the class."""
        super().__init__()
        self.low = nn.Sequential(first, second)
        self.values = values
        self.register_buffer("places", places.to(torch.int32))

    def residual(self) -> Tensor:
        """R, shaped as the dense weight."""
        first, second = self._parts()
        shape = (len(second.weight), *first.weight.shape[1:])
        flat = self.values.new_zeros(math.prod(shape))
        return flat.scatter(0, self.places.long(), self.values).reshape(shape)

    def _parts(self) -> tuple[Any, Any]:
        return self.low[0], self.low[1]

    def forward(self, x: Tensor) -> Tensor:
        """As the dense layer's."""
        low: Tensor = self.low(x)
        return low + self._times(x, self.residual())

    def _times(self, x: Tensor, weight: Tensor) -> Tensor:
        first, _ = self._parts()
        if isinstance(first, nn.Linear):
            return functional.linear(x, weight)
        given: Tensor = first._conv_forward(x, weight, None)  # all padding modes as in the layer
        return given

    def to_plain(self) -> nn.Module:
        """One dense layer."""
        first, second = self._parts()
        dense: Any = copy.deepcopy(first)
        R = self.residual().detach()
        product = second.weight.detach().flatten(1) @ first.weight.detach().flatten(1)
        dense.weight = nn.Parameter(product.reshape(R.shape) + R)
        dense.bias = None if second.bias is None else nn.Parameter(second.bias.detach().clone())
        if isinstance(dense, nn.Linear):
            dense.out_features = len(R)
        else:
            dense.out_channels = len(R)
        plain: nn.Module = dense
        return plain

    def extra_repr(self) -> str:
        """Weights beside the thin layers."""
        return f"{len(self.values)} weights besides"

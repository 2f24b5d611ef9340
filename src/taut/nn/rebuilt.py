"""What the layers share that hold their weight in another form."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn
from torch.nn import functional


class Rebuilt(nn.Module, ABC):
    """A Linear or a convolution whose weight is made dense, at every call, from something that takes fewer bytes.

    It buys bytes, not milliseconds: what is multiplied is the dense weight.

    Args:
        layer: of the dense layer's sizes, stride, padding and so on. It gives its bias away and loses its weight.
    """

    bias: nn.Parameter | None

    def __init__(self, layer: nn.Module) -> None:
        """See the class."""
        super().__init__()
        shell: Any = layer
        self.shape: tuple[int, ...] = tuple(shell.weight.shape)
        self.register_parameter("bias", shell.bias)
        shell.weight = shell.bias = None
        self.layer = shell

    @abstractmethod
    def dense(self) -> Tensor:
        """The weight, shaped as the dense layer's."""

    def forward(self, x: Tensor) -> Tensor:
        """As the dense layer's."""
        if isinstance(self.layer, nn.Linear):
            return functional.linear(x, self.dense(), self.bias)
        given: Tensor = self.layer._conv_forward(x, self.dense(), self.bias)  # all padding modes as in the layer
        return given

    def to_plain(self) -> nn.Module:
        """The dense layer."""
        plain: Any = copy.deepcopy(self.layer)
        plain.weight = nn.Parameter(self.dense().detach().clone())
        plain.bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone())
        dense: nn.Module = plain.train(self.training)
        return dense

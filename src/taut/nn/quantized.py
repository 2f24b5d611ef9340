"""Weights of eight bits."""

from __future__ import annotations

from torch import Tensor, nn

from taut.nn.rebuilt import Rebuilt


class Int8Weight(Rebuilt):
    """A layer whose weight is a whole number of -127 ... 127 times a scale of its output channel: W[o] = s[o] Q[o].

    The scales train; the whole numbers are a parameter without gradient, so that they are counted.

    Args:
        layer: of the dense layer's sizes, stride, padding and so on.
        values: int8, shaped as the weight.
        scales: (outputs,).
    """

    def __init__(self, layer: nn.Module, values: Tensor, scales: nn.Parameter) -> None:
        """See the class."""
        super().__init__(layer)
        self.values = nn.Parameter(values, requires_grad=False)
        self.scales = scales

    def dense(self) -> Tensor:
        """The weight in the type of the scales."""
        return self.values.to(self.scales.dtype) * self.scales.reshape(-1, *[1] * (self.values.ndim - 1))

    def extra_repr(self) -> str:
        """Whether there is a bias."""
        return f"bias={self.bias is not None}"

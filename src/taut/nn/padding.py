"""Padding that depends on the size of the input."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional


def same_pads(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """Zeros in front of and behind an axis with which a convolution gives ceil(size / stride) outputs.

    TensorFlow's "SAME": an odd zero goes behind.

    Args:
        size: of the input.
        kernel: taps.
        stride: of the convolution.
        dilation: distance of the taps.
    """
    outputs = -(-size // stride)
    total = max((outputs - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


class SamePad(nn.Module):
    """Zeros around an input, as many as its size asks for: TensorFlow's "SAME" in front of a convolution with a stride.

    Args:
        kernel: taps along each axis of the convolution behind it.
        stride: of that.
        dilation: of that.
    """

    def __init__(self, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> None:
        """See the class."""
        super().__init__()
        self.kernel, self.stride, self.dilation = tuple(kernel), tuple(stride), tuple(dilation)

    def forward(self, x: Tensor) -> Tensor:
        """X (..., C, *axes), with or without a batch."""
        settings = zip(x.shape[-len(self.kernel) :], self.kernel, self.stride, self.dilation, strict=True)
        pads = [same_pads(*axis) for axis in settings]
        return functional.pad(x, [side for pair in reversed(pads) for side in pair])

    def extra_repr(self) -> str:
        """Settings."""
        return f"kernel={self.kernel}, stride={self.stride}, dilation={self.dilation}"

"""What layers without anything between them give for patches of the input."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from taut.nn import LowRankSparse, Rebuilt
from taut.structure.patches import CONVOLUTIONS, groups_of, weight_of
from taut.structure.surgery import shallow


def chain_outputs(original: nn.Module, chain: nn.Module, rows: Tensor) -> Tensor:
    """Outputs (g, n, o) of a chain for unfolded inputs.

    Args:
        original: says how a patch is shaped.
        chain: the linear layers or convolutions that replace it, or one layer.
        rows: (g, n, c s).
    """
    groups, count, weight = groups_of(original), rows.shape[1], weight_of(original)
    given = rows.transpose(0, 1).reshape(count, groups * weight.shape[1], *weight.shape[2:])
    whole = isinstance(chain, LowRankSparse | Rebuilt)
    for part in [chain] if whole or not list(chain.children()) else chain.children():
        plain = part.to_plain() if isinstance(part, LowRankSparse | Rebuilt) else part
        given = _bare(plain).to(rows.dtype)(given)
    return given.reshape(count, groups, -1).transpose(0, 1)


def _bare(module: nn.Module) -> nn.Module:
    """A convolution that sees one patch: its taps lie side by side, and nothing is padded."""
    copied: Any = shallow(module)
    if not isinstance(module, CONVOLUTIONS):
        return cast(nn.Module, copied)
    axes = len(copied.kernel_size)
    copied.padding, copied.dilation, copied.padding_mode = (0,) * axes, (1,) * axes, "zeros"
    return cast(nn.Module, copied)

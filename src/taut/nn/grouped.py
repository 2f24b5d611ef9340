"""A stack of matrices as one layer: a convolution of kernel 1 in groups, run as one batched matrix product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from taut.nn.watching import watched


class GroupedLinear(nn.Conv1d):
    """One matrix for every group of channels: (n, groups x inputs, positions) to (n, groups x outputs, positions).

    It computes what an `nn.Conv1d` of kernel 1 with as many groups does, and holds the same weight; kernels for grouped
    convolutions are slow where groups are wide, batched matrix products are not.

    Args:
        in_channels: inputs of all groups.
        out_channels: outputs of all groups.
        groups: how many matrices.
        bias: whether there is one.
        device: of the weight. dtype: likewise.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int = 1,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """See the class."""
        super().__init__(in_channels, out_channels, 1, groups=groups, bias=bias, device=device, dtype=dtype)

    def batched(self, x: Tensor) -> Tensor:
        """The same with the groups in front, (groups, positions, inputs) to (groups, positions, outputs)."""
        weight = self.weight.view(self.groups, -1, self.weight.shape[1])
        output = torch.bmm(x, weight.mT)
        return output if self.bias is None else output + self.bias.view(self.groups, 1, -1).to(output.dtype)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """One product for all groups."""
        if x.ndim == 2:
            return self._conv_forward(x[None], weight, bias)[0]
        count, length = len(x), x.shape[-1]
        inner = x.reshape(count, self.groups, weight.shape[1], length).permute(1, 2, 0, 3).flatten(2)
        outer = torch.bmm(weight.view(self.groups, -1, weight.shape[1]), inner)
        output = outer.reshape(self.groups, outer.shape[1], count, length).permute(2, 0, 1, 3).flatten(1, 2)
        return output if bias is None else output + bias[:, None].to(output.dtype)


def of_all(layer: Any, x: Tensor) -> Tensor:
    """What a layer with a group for every matrix gives for (matrices, ..., inputs): (matrices, ..., outputs).

    Straight where nobody looks on; by a call of the layer, as of a convolution, where it is watched or another one.
    """
    count, inputs = x.shape[0], x.shape[-1]
    rows = x.reshape(count, -1, inputs)
    chain = _unwatched(layer)
    if chain is None:
        rows = layer(rows.mT.reshape(1, count * inputs, -1)).unflatten(1, (count, -1))[0].mT.contiguous()
    for part in chain or ():
        rows = part.batched(rows)
    return rows.reshape(*x.shape[:-1], rows.shape[-1])


def _unwatched(layer: nn.Module) -> list[GroupedLinear] | None:
    """The stacks of matrices that a layer consists of, one behind the other; None where it is more than these."""
    parts = list(layer.children()) if type(layer) is nn.Sequential else [layer]
    hooked = any(map(watched, (layer, *parts))) or _has_any_global_hook()  # type: ignore[no-untyped-call]
    if hooked or not all(type(part) is GroupedLinear and "forward" not in vars(part) for part in parts):
        return None
    return parts  # type: ignore[return-value] # all of them are

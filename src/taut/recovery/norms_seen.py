"""Batch norms while the original runs: what each sees, and behind which layer it stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from taut.recovery.batch_norm import counted
from taut.recovery.successors import Following
from taut.structure.padding import Padding

CHECKED = 64
"""Rows on which a batch norm is held against its statistics."""

ALIKE = 0.02
"""Relative error up to which it does what they say; half precision rounds by less."""


class NormsSeen:
    """Batch norms while the original runs: what each saw, and behind which layer it stands.

    Attributes:
        moments: count, mean and variance by name; None for one that serves several inputs.
    """

    def __init__(self, watch: Following, padding: Padding) -> None:
        """Note nothing yet."""
        self.watch, self.padding = watch, padding
        self.moments: dict[str, tuple[int, Tensor, Tensor] | None] = {}
        self.last: tuple[str, Tensor] | None = None
        self._behind: dict[str, str] = {}

    def before(self, name: str, order: list[str]) -> Any:
        """A hook that notes what a batch norm sees, and which layer's output that is."""

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if not args:
                return
            with self.watch.looking_away():
                if name in self._behind:  # one set of statistics serves several inputs: leave it alone
                    self.moments[name] = None
                else:
                    order.append(name)
                    self.moments[name] = counted(args[0], self.padding.of_channels(name, args[0]))
                self._behind[name] = self.last[0] if self.last and args[0] is self.last[1] else ""

        return hook

    def behind(self, name: str, seen: Mapping[str, Any]) -> Any:
        """A hook that notes what a batch norm gave, if that is what its statistics say and nothing more."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not (args and isinstance(output, Tensor)):
                return
            self.watch.leave(name, output)
            layer = self._behind.get(name)
            if not layer or output.shape != args[0].shape:
                return
            with self.watch.looking_away():
                one = seen[layer]
                few = one.index[:: max(1, len(one.index) // CHECKED)]
                scale, shift = affine(module, one.rows)
                rows = self.watch.rows(layer, output, few)
                plain = scale * self.watch.rows(layer, args[0], few) + shift
            if float((rows - plain).norm()) <= ALIKE * float(plain.norm()):
                self.watch.norm(name, args[0], output)

        return hook

    def direct(self) -> dict[str, str]:
        """Layer -> the batch norm directly behind it whose statistics can be estimated anew."""
        return {layer: norm for norm, layer in self._behind.items() if layer and self.moments[norm] is not None}


def affine(norm: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift (g, 1, o) of a batch norm that uses its stored statistics; 1 and 0 without one."""
    groups, _, outputs = rows.shape
    if norm is None:
        return rows.new_ones(groups, 1, outputs), rows.new_zeros(groups, 1, outputs)
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    shift = shift if norm.bias is None else shift + norm.bias.detach().double()
    return scale.to(rows).reshape(groups, 1, outputs), shift.to(rows).reshape(groups, 1, outputs)

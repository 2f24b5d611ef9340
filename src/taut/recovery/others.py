"""The other summands of residual sums, as they are in the compressed model while it is recovered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from taut.recovery.following import Place
from taut.recovery.targets import Seen, Target, together
from taut.structure.patches import output_rows


class Others:
    """Tensors that modules of the compressed model took or gave, held until the last layer has asked for them.

    Attributes:
        handles: of the hooks that hold them.
    """

    def __init__(self, small: nn.Module, targets: Mapping[str, Target], current: Callable[[], int]) -> None:
        """`small` with the layers of `targets`; `current` says which batch runs."""
        self.current = current
        names = {name for name, _ in small.named_modules()}
        asked = [
            (number, t.follows.partner)
            for t in targets.values()
            if t.follows is not None and t.follows.partner and t.follows.partner[1] in names
            for number in t.seen
        ]
        self.left = Counter(asked)
        self.held: dict[tuple[int, Place], Tensor] = {}
        self.handles: list[Any] = []
        for side, name in dict.fromkeys(partner for _, partner in asked):
            module = small.get_submodule(name)
            if side == "in":
                self.handles.append(module.register_forward_pre_hook(self._take(name)))
            else:
                self.handles.append(module.register_forward_hook(self._give(name)))

    def _take(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args:
                self.hold(("in", name), args[0])

        return hook

    def _give(self, name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            self.hold(("out", name), output)

        return hook

    def hold(self, place: Place, tensor: Any) -> None:
        """Keep what a module took or gave while a layer is still to ask for it."""
        key = self.current(), place
        if isinstance(tensor, Tensor) and self.left[key]:
            self.held[key] = tensor

    def rows(self, layer: nn.Module, target: Target) -> Tensor | None:
        """The other summand of a layer's output at its chosen positions; None where it is not known by now."""
        partner = None if target.follows is None else target.follows.partner
        if partner is None:
            return None
        parts = [self._rows(layer, (number, partner), seen) for number, seen in target.seen.items()]
        known = [part for part in parts if part is not None]
        return together(known) if len(known) == len(parts) else None

    def _rows(self, layer: nn.Module, key: tuple[int, Place], seen: Seen) -> Tensor | None:
        """Of one batch."""
        if key not in self.held:
            return None
        self.left[key] -= 1
        other = self.held[key] if self.left[key] else self.held.pop(key)
        size = seen.output.shape
        if other.shape[0] != size[0] or other.shape[2:] != size[2:]:
            return None
        rows = output_rows(layer, other, seen.index).to(seen.rows)
        return rows if rows.shape == seen.rows.shape else None

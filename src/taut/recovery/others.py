"""The other summands of residual sums, as they are in the compressed model while it is recovered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from taut.recovery.following import Place
from taut.recovery.targets import Target
from taut.structure.patches import output_rows


class Others:
    """Tensors that modules of the compressed model took or gave, held until the last layer has asked for them.

    Attributes:
        handles: of the hooks that hold them.
    """

    def __init__(self, small: nn.Module, targets: Mapping[str, Target]) -> None:
        """`small` with the layers of `targets`."""
        places = [t.follows.partner for t in targets.values() if t.follows is not None and t.follows.partner]
        names = {name for name, _ in small.named_modules()}
        self.left = Counter(place for place in places if place[1] in names)
        self.held: dict[Place, Tensor] = {}
        self.handles: list[Any] = []
        for side, name in self.left:
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
        if isinstance(tensor, Tensor) and self.left[place]:
            self.held[place] = tensor

    def rows(self, layer: nn.Module, target: Target) -> Tensor | None:
        """The other summand of a layer's output at its chosen positions; None where it is not known by now."""
        place = None if target.follows is None else target.follows.partner
        if place is None or place not in self.held:
            return None
        self.left[place] -= 1
        other = self.held[place] if self.left[place] else self.held.pop(place)
        size = target.output.shape
        if other.shape[0] != size[0] or other.shape[2:] != size[2:]:
            return None
        found = output_rows(layer, other, target.index).to(target.rows)
        return found if found.shape == target.rows.shape else None

"""The other summands of residual sums, as they are in the compressed model while it is recovered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from taut.recovery.successors import Place
from taut.recovery.targets import Target
from taut.structure.patches import output_rows


class Others:
    """Tensors that modules of the compressed model took or gave in the present run.

    Attributes:
        held: those that some layer is still to ask for.
    """

    def __init__(self, small: nn.Module, targets: Mapping[str, Target]) -> None:
        """`small` with the layers of `targets`."""
        self.small = small
        names = {name for name, _ in small.named_modules()}
        partners = [t.follows.partner for t in targets.values() if t.follows is not None and t.follows.partner]
        self.asked = Counter(place for place in partners if place[1] in names)
        self.left: Counter[Place] = Counter()
        self.held: dict[Place, Tensor] = {}

    def watch(self) -> list[Any]:
        """Hooks that hold what is asked for, until they are removed."""
        self.left = self.asked.copy()
        handles: list[Any] = []
        for side, name in self.asked:
            module = self.small.get_submodule(name)
            if side == "in":
                handles.append(module.register_forward_pre_hook(self._take(name)))
            else:
                handles.append(module.register_forward_hook(self._give(name)))
        return handles

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

    def rows(self, layer: nn.Module, target: Target, number: int) -> Tensor | None:
        """The other summand of a layer's output at its chosen positions in a batch; None where it is not known yet."""
        place = None if target.follows is None else target.follows.partner
        if place is None or place not in self.held:
            return None
        self.left[place] -= 1
        other, seen = self.held[place] if self.left[place] else self.held.pop(place), target.seen[number]
        size = seen.output.shape
        if other.shape[0] != size[0] or other.shape[2:] != size[2:]:
            return None
        rows = output_rows(layer, other, seen.index).to(seen.rows)
        return rows if rows.shape == seen.rows.shape else None

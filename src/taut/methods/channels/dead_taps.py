"""Dead taps: kernel offsets that only ever meet zero padding are cut off; the output does not change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from taut.errors import CallError
from taut.methods.factorization import Factorization
from taut.methods.layer_factory import chain_cost, conv, output_places, random_layer
from taut.structure.tracing import describe_layer
from taut.types import Cost, Group, Layer, Rewrite

PADS: dict[int, type[nn.Module]] = {1: nn.ZeroPad1d, 2: nn.ZeroPad2d, 3: nn.ZeroPad3d}


@dataclass(frozen=True)
class DeadTaps(Factorization):
    """Cut the kernel to the taps that some output position places on something else than zero padding.

    Tap k of an axis with T inputs is dead iff no output t has 0 <= t stride + k dilation - pad < T, or only zeros that
    the model itself pads lie there. Exact at the example's input size, and only there.

    Attributes:
        ranges: first and end of the kept taps, axis after axis; None until resolved.
        metric: unused, there is nothing to approximate.
    """

    ranges: list[int] | None = None
    metric: str = "data"
    name: ClassVar[str] = "dead_taps"
    uses_statistics: ClassVar[bool] = False
    default: ClassVar[bool] = False
    exact: ClassVar[bool] = True
    rank_settings: ClassVar[tuple[str, ...]] = ()

    def refuses_layer(self, layer: Layer) -> str | None:
        """Zero-padded convolutions with a dead tap."""
        if not layer.kernel or layer.padding_mode != "zeros":
            return "dead_taps: needs a convolution with zero padding"
        if all(span == (0, k) for span, k in zip(layer.live, layer.kernel, strict=False)):
            return "dead_taps: every tap meets the input"
        return None

    def factor(self, modules: Mapping[str, nn.Module], stats: Mapping[str, Any]) -> None:
        """Nothing to decompose."""
        del modules, stats

    def candidates(self, group: Group, factors: object) -> Sequence[DeadTaps]:
        """The one cut that the trace found."""
        del factors
        if self.refuses(group):
            return []
        return self.worthwhile(group, [replace(self, ranges=[end for span in group.layer.live for end in span])])

    def damage(self, factors: object) -> float | None:
        """None is done."""
        del factors
        return 0.0

    def rewrite(self, modules: Mapping[str, nn.Module], factors: object) -> Rewrite:
        """The kernel's live box."""
        del factors
        ((name, module),) = modules.items()
        weight = module.weight
        layer = describe_layer(name, module, (), 1)
        if not isinstance(weight, Tensor):
            raise CallError(f"The layer '{name}' has no weight to cut.")
        box = (slice(None), slice(None), *(slice(a, b) for a, b in self._spans(layer)))
        built = self.skeleton(Group((layer,)))[name]
        target = built[-1] if isinstance(built, nn.Sequential) else built
        target.weight = nn.Parameter(weight.detach()[box].clone(), requires_grad=weight.requires_grad)
        if isinstance(module.bias, Tensor):
            target.bias = nn.Parameter(module.bias.detach().clone(), requires_grad=module.bias.requires_grad)
        return Rewrite({name: built}, self)

    def skeleton(self, group: Group) -> Mapping[str, nn.Module]:
        """A convolution; behind a zero padding (negative: cropping) where what is left is uneven."""
        layer = group.layer
        spans = self._spans(layer)
        pads = [
            (left - a * d, right - (k - b) * d)
            for (a, b), (left, right), d, k in zip(spans, layer.padding, layer.dilation, layer.kernel, strict=True)
        ]
        even = all(left == right >= 0 for left, right in pads)
        sizes = (layer.weight[1] * layer.groups, layer.weight[0])
        kernel = tuple(b - a for a, b in spans)
        cut = replace(layer, weight=(*layer.weight[:2], *kernel), padding=tuple(pads if even else [(0, 0)] * len(pads)))
        built = conv(sizes, cut, range(len(kernel)), groups=layer.groups, bias=layer.bias)
        if even:
            return {layer.name: built}
        flat = tuple(side for pair in reversed(pads) for side in pair)
        return {layer.name: nn.Sequential(PADS[len(kernel)](flat), built)}

    def cost(self, group: Group) -> Cost:
        """The live box at the output's positions."""
        layer = group.layer
        taps = math.prod(b - a for a, b in self._spans(layer))
        return chain_cost(layer, ((layer.weight[0] * layer.weight[1] * taps, output_places(layer)),))

    def _spans(self, layer: Layer) -> list[tuple[int, int]]:
        ends = self.ranges or []
        spans = list(zip(ends[::2], ends[1::2], strict=False))
        fits = len(ends) == 2 * len(layer.kernel)
        if not fits or any(not 0 <= a < b <= k for (a, b), k in zip(spans, layer.kernel, strict=True)):
            raise CallError(
                f"The 'ranges' of dead_taps on layer '{layer.name}' must be a first and an end within the kernel "
                f"{layer.kernel} for each axis. Got {self.ranges} instead."
            )
        return spans

    def exact_case(self, group: Group) -> tuple[DeadTaps, nn.Module] | None:
        """The traced cut on any weights."""
        found = self.candidates(group, None)
        return (found[0], random_layer(group.layer)) if found else None

"""What methods share that rewrite one layer of a kind of their own: a table, a transposed convolution."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from taut.errors import CallError
from taut.methods.factorization import integer
from taut.structure.patches import bias_of, weight_of
from taut.structure.statistics import LayerStatistics
from taut.structure.tracing import describe_layer
from taut.types import Group, Layer, Method, Rewrite, shrinks

METRICS = ("data", "fisher", "frobenius")


class OwnKind:
    """Base of the methods that take what others leave alone; subclasses are frozen dataclasses.

    They define `takes`, `factor`, `candidates`, `damage`, `rewrite`, `skeleton`, `cost` and `exact_case`.
    """

    name: ClassVar[str]
    uses_statistics: ClassVar[bool] = True
    default: ClassVar[bool] = True
    plain: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    masks: ClassVar[bool] = False
    rank_settings: ClassVar[tuple[str, ...]] = ("rank",)
    of_their_own: ClassVar[tuple[str, ...]]
    metric: str

    def takes(self, layer: Layer) -> str | None:
        """Why a layer of the kind has nothing to factorize, or None."""
        raise NotImplementedError

    def refuses(self, group: Group) -> str | None:
        """Why this method cannot rewrite the group, or None."""
        if len(group.layers) != 1:
            return f"{self.name} factorizes one layer at a time"
        layer = group.layer
        if layer.skip not in self.of_their_own:
            return layer.skip or f"{self.name}: a {layer.kind} is left to the others"
        return layer.whole or self.takes(layer)

    def family(self) -> str:
        """Candidates of one metric share a decomposition."""
        return f"{self.name}/{self.metric}"

    def check_metric(self) -> None:
        """Refuse an unknown metric.

        Raises:
            CallError: it is none of METRICS.
        """
        if self.metric not in METRICS:
            raise CallError(f"The 'metric' of {self.name} must be one of {', '.join(METRICS)}. Got '{self.metric}'.")

    def worthwhile(self, group: Group, options: Iterable[Self]) -> Sequence[Self]:
        """The options that make something smaller."""
        return [option for option in options if shrinks(cast(Method, option), group)]

    def damages(self, known: LayerStatistics, errors: Tensor, energy: float) -> list[float]:
        """Squared errors tr(B dW A dWᵀ) as damages."""
        values: list[float] = known.damage(errors.double(), energy).tolist()
        return [max(0.0, value) for value in values]

    def rank_of(self, key: str, value: int | None, limit: int, layer: Layer) -> int:
        """A rank as the integer it must be."""
        return integer(self.name, key, value, limit, layer)

    def filled(
        self, resolved: Self, modules: Mapping[str, nn.Module], weights: Mapping[str, Sequence[Tensor]]
    ) -> Rewrite:
        """The skeleton filled with weights in order, the bias of the original on the last layer.

        Args:
            resolved: the method with its final settings.
            modules: the layers.
            weights: of the new layers, by the name of what they replace.
        """
        built: dict[str, nn.Module] = {}
        for name, module in modules.items():
            layer = describe_layer(name, module, (), 1)
            made: Any = cast(Method, resolved).skeleton(Group((layer,)))[name]
            like = weight_of(module)
            parts = list(made.children())
            for part, weight in zip(parts, weights[name], strict=True):
                value = weight.reshape(part.weight.shape).to(like).contiguous()
                part.weight = nn.Parameter(value, requires_grad=like.requires_grad)
            bias = bias_of(module) if isinstance(getattr(module, "bias", None), Tensor) else None
            if bias is not None:
                parts[-1].bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
            built[name] = made
        return Rewrite(built, cast(Method, resolved))


def seeded(layer: Any) -> nn.Module:
    """The layer with seeded random weights, for exact cases."""
    random = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=random)
    built: nn.Module = layer
    return built

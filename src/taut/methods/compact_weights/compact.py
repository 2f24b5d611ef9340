"""What the methods share that hold the weight of one layer in another form."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from taut.errors import CallError
from taut.methods.factorization import Factorization, Unplanned
from taut.nn.rebuilt import Rebuilt
from taut.structure.patches import bias_of, weight_of
from taut.structure.statistics import LayerStatistics
from taut.structure.tracing import describe_layer
from taut.types import Cost, Group, Layer, Method, Rewrite


class Stored(Unplanned, Factorization):
    """Base of the methods that build one `taut.nn.Rebuilt`; subclasses are frozen dataclasses."""

    uses_statistics: ClassVar[bool] = True
    default: ClassVar[bool] = False
    plain: ClassVar[bool] = False
    metrics: ClassVar[tuple[str, ...]] = ("data", "frobenius")
    rank_settings: ClassVar[tuple[str, ...]] = ()

    def refuses_layer(self, layer: Layer) -> str | None:
        """Nothing."""
        del layer
        return None

    @abstractmethod
    def built(self, layer: Layer) -> Rebuilt:
        """The module with uninitialized weights."""

    @abstractmethod
    def tensors(self, module: nn.Module, stats: LayerStatistics) -> Mapping[str, Tensor]:
        """What the module holds, by name: parameters and buffers, in any floating type."""

    def factor(self, modules: Mapping[str, nn.Module], stats: Mapping[str, Any]) -> LayerStatistics:
        """The metric alone: an earlier step may have changed the weights."""
        return LayerStatistics(self.sight(modules, stats).weighting)

    def rewrite(self, modules: Mapping[str, nn.Module], factors: LayerStatistics) -> Rewrite:
        """One module that holds `tensors`, and the bias."""
        ((name, module),) = modules.items()
        built = self.built(describe_layer(name, module, (), 1))
        like, bias = weight_of(module), bias_of(module)
        for key, value in self.tensors(module, factors).items():
            held = value.detach().to(like.device)
            if key in built._buffers:
                built._buffers[key] = held
                continue
            trained = held.is_floating_point()
            held = held.to(like.dtype) if trained else held
            built._parameters[key] = nn.Parameter(held.contiguous(), trained and like.requires_grad)
        if bias is not None:
            built.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
        return Rewrite({name: built}, cast(Method, self))

    def skeleton(self, group: Group) -> Mapping[str, nn.Module]:
        """One module."""
        return {group.layer.name: self.built(group.layer)}

    def must(self, key: str, good: bool, wanted: str, layer: Layer) -> None:
        """Refuse a setting that means nothing.

        Raises:
            CallError: it is not `good`.
        """
        if not good:
            raise CallError(
                f"The '{key}' of {self.name} on layer '{layer.name}' must be {wanted}. "
                f"Got {getattr(self, key)!r} instead."
            )


def dense_macs(layer: Layer) -> int:
    """Multiply-accumulates per sample of the layer with a dense weight."""
    return layer.per_sample(math.prod(layer.weight) * layer.positions)


def stored_cost(layer: Layer, weights: int, index_bytes: int = 0) -> Cost:
    """Cost of so many weights in the layer's type, its bias, and integers beside them; multiplied dense."""
    params = weights + (layer.weight[0] if layer.bias else 0)
    return Cost(params, params, dense_macs(layer), params * layer.itemsize + index_bytes)

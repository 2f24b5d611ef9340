"""What the methods that cluster channels share: candidates by divisors, damage by the built kernel, channel orders."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from taut.errors import CallError
from taut.methods.factorization import Factorization, Sight
from taut.nn import Reorder
from taut.structure.patches import bias_of, weight_of
from taut.structure.tracing import describe_layer
from taut.types import Group, Layer, Method, Rewrite

FAST_GROUP = 16
"""Outputs per group that vector instructions like, or a multiple."""


@dataclass(frozen=True)
class Fit:
    """One approximation of a kernel.

    Attributes:
        W: (F, C, S), the kernel that the new layers compute.
        weights: of the new layers, in order.
        inputs: (C,), the input channels in the order in which the first layer wants them; None: as they come.
        outputs: (F,), the output channels in the order in which the last layer gives them; None: as they are.
    """

    W: Tensor
    weights: tuple[Tensor, ...]
    inputs: Tensor | None = None
    outputs: Tensor | None = None


@dataclass(frozen=True)
class BlockFactors:
    """A layer, its clusters and the damages found so far: kernels would be many times the layer."""

    sight: Sight
    made: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What was made under the key, or is made now."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]


class Blocks(Factorization):
    """Base of the methods that put channels into clusters of equal size; subclasses are frozen dataclasses.

    `reorders` names the sides ("i" inputs, "o" outputs) where channels still have to be brought into another order;
    `taut.apply` empties it where the neighbouring layers can take the order over.
    """

    default: ClassVar[bool] = False
    plain: ClassVar[bool] = False
    paper: bool
    reorders: str

    def refuses_layer(self, layer: Layer) -> str | None:
        """Convolutions with a kernel above 1 and without groups of their own."""
        if not layer.kernel or max(layer.kernel) < 2:
            return f"{self.name}: needs a convolution with a kernel larger than 1"
        if layer.groups > 1:
            return f"{self.name}: the channels of a grouped convolution are split already"
        return None

    def family(self) -> str:
        """Paper mode decomposes otherwise."""
        return f"{super().family()}{'/paper' if self.paper else ''}"

    def factor(self, modules: Mapping[str, nn.Module], stats: Mapping[str, Any]) -> BlockFactors:
        """Nothing yet: clusters and damages are found when first asked for, and once."""
        if self.paper and self.metric != "frobenius":
            raise CallError(f"paper=True of {self.name} knows the metric 'frobenius' alone. Got '{self.metric}'.")
        return BlockFactors(self.sight(modules, stats))

    def fit(self, factors: BlockFactors) -> Fit:
        """The approximation that this resolved method stands for."""
        raise CallError(f"{self.name} fits nothing to {factors.sight.W.shape}.")

    def damage(self, factors: BlockFactors) -> float | None:
        """Of the kernel that is really built, tr(B dW A dW^T)."""
        sight = factors.sight
        key = ("damage", replace(cast(Any, self), reorders=""))

        def measure() -> float:
            # in the metric of what is known, whatever the fit was made in: one unit for all candidates
            return sight.damage((sight.W[0].double() - self.fit(factors).W)[None])

        return float(factors.once(key, measure))

    def rewrite(self, modules: Mapping[str, nn.Module], factors: BlockFactors) -> Rewrite:
        """The fitted layers between the orders that they need; the bias goes to the last."""
        ((name, module),) = modules.items()
        fit = self.fit(factors)
        sides = "".join(side for side, order in (("i", fit.inputs), ("o", fit.outputs)) if order is not None)
        resolved = replace(cast(Any, self), reorders=sides)
        built = resolved.skeleton(Group((describe_layer(name, module, (), 1),)))[name]
        like, bias = weight_of(module), bias_of(module)
        parts = [part for part in built if isinstance(getattr(part, "weight", None), Tensor)]
        for part, weight in zip(parts, fit.weights, strict=True):
            values = weight.reshape(part.weight.shape).to(like).contiguous()
            part.weight = nn.Parameter(values, requires_grad=like.requires_grad)
        if bias is not None:
            turned = bias.detach() if fit.outputs is None else bias.detach()[fit.outputs]
            parts[-1].bias = nn.Parameter(turned.clone(), requires_grad=bias.requires_grad)
        if "i" in sides and fit.inputs is not None:
            built[0].order.copy_(fit.inputs)
        if "o" in sides and fit.outputs is not None:
            built[-1].order.copy_(fit.outputs.argsort())
        return Rewrite({name: built.to(like.device)}, cast(Method, resolved))

    def framed(self, layer: Layer, parts: Sequence[nn.Module]) -> nn.Sequential:
        """The layers between the orders that `reorders` names.

        Raises:
            CallError: it names something else than sides.
        """
        if self.reorders not in {"", "i", "o", "io"}:
            raise CallError(f"'reorders' of {self.name} must be one of '', 'i', 'o', 'io'. Got '{self.reorders}'.")
        axes = len(layer.kernel)
        before = [Reorder(torch.arange(layer.weight[1]), axes)] if "i" in self.reorders else []
        behind = [Reorder(torch.arange(layer.weight[0]), axes)] if "o" in self.reorders else []
        return nn.Sequential(*before, *parts, *behind)

    def divisor(self, key: str, value: int | None, size: int, layer: Layer) -> int:
        """A number of clusters as the divisor of `size` that it must be.

        Raises:
            CallError: it is none.
        """
        if not isinstance(value, int) or isinstance(value, bool) or value < 1 or size % value:
            raise CallError(
                f"The '{key}' of {self.name} on layer '{layer.name}' must be a divisor of its {size} channels. "
                f"Got {value} instead."
            )
        return value


def exact_numbers(*shape: int) -> Tensor:
    """Seeded random powers of two with signs: products with them are exact, and so a planted kernel in any dtype."""
    generator = torch.Generator().manual_seed(1)
    return 2.0 ** torch.randint(-2, 3, shape, generator=generator) * (
        1 - 2 * torch.randint(0, 2, shape, generator=generator)
    )


def divisors(size: int) -> list[int]:
    """All divisors, ascending."""
    return [d for d in range(1, size + 1) if size % d == 0]

"""What all factorizations of one layer share: the group of one, the metric, and which candidates are worth offering."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from taut.decompose.outputs import OutputMoment, squared_error
from taut.decompose.weighting import Weighting
from taut.errors import CallError
from taut.methods.earlier_contract import Needs
from taut.methods.layer_factory import refuse_layer
from taut.structure.patches import grouped_weight, groups_of, weight_of
from taut.structure.statistics import LayerStatistics
from taut.structure.tracing import describe_layer
from taut.types import Cost, Group, Layer, Method, Rewrite

METRICS = ("data", "fisher", "mahalanobis", "frobenius")
"""Second moments of the inputs; of outputs' gradients too; of both the diagonals alone; or nothing.

Of more than 2,048 outputs the gradients' moment is no matrix: there only damages know of it.
"""

MOVED = 1e-2
"""Share of the mean with which outputs, or groups of outputs, count that no sampled label moved."""


@dataclass(frozen=True)
class Sight:
    """A layer as a factorization sees it.

    Attributes:
        W: (g, o, c, s), at least float32.
        weighting: metric of the inputs. response: (g, o, o) metric of the outputs, or None.
        stats: for the damage.
    """

    W: Tensor
    weighting: Weighting
    response: Tensor | None
    stats: LayerStatistics

    def damages(self, errors: Tensor) -> list[float]:
        """Squared errors tr(B dW A dW^T) as damages."""
        energy = self.stats.weighting.energy(self.W) if self.stats.outputs is None else 0.0
        return [max(0.0, value) for value in self.stats.damage(errors, energy).tolist()]

    def damage(self, dW: Tensor) -> float:
        """Of a change (g, o, c, s) of the weight, in the metric of all that is known."""
        return self.damages(squared_error(self.stats.weighting, dW, self.stats.outputs)[None])[0]


class Factorization:
    """Base of the methods that replace one layer by two or three; subclasses are frozen dataclasses."""

    name: ClassVar[str]
    uses_statistics: ClassVar[bool] = True
    default: ClassVar[bool] = True
    plain: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    masks: ClassVar[bool] = False
    rank_settings: ClassVar[tuple[str, ...]] = ("rank",)
    needs = Needs()
    metrics: ClassVar[tuple[str, ...]] = METRICS
    metric: str

    def refuses(self, group: Group) -> str | None:
        """Why this method cannot rewrite the group, or None."""
        if len(group.layers) != 1:
            return f"{self.name} factorizes one layer at a time"
        return refuse_layer(group.layer) or self.refuses_layer(group.layer)

    def refuses_layer(self, layer: Layer) -> str | None:
        """Why this factorization does not apply to a layer that others may factorize, or None."""
        raise CallError(f"{self.name} does not say which layers it takes: '{layer.name}'.")

    def family(self) -> str:
        """Candidates of one method and metric share a decomposition."""
        return f"{self.name}/{self.metric}"

    def sight(self, modules: Mapping[str, nn.Module], stats: Mapping[str, LayerStatistics]) -> Sight:
        """The one layer, seen in this method's metric.

        Raises:
            CallError: the metric is unknown.
        """
        if self.metric not in self.metrics:
            raise CallError(
                f"The 'metric' of {self.name} must be one of {', '.join(self.metrics)}. Got '{self.metric}'."
            )
        ((name, module),) = modules.items()
        known = stats.get(name, LayerStatistics())
        weighting = Weighting() if self.metric == "frobenius" else known.weighting
        response = regular(known.outputs) if self.metric in {"fisher", "mahalanobis"} else None
        if self.metric == "mahalanobis":
            weighting, response = weighting.diagonal(), None if response is None else _diagonal(response)
        return Sight(grouped_weight(module), weighting, response, known)

    def factor_once(self, modules: Mapping[str, nn.Module], stats: Mapping[str, Any]) -> Any:
        """The factors that `rewrite` of this resolved method needs, and no more; `factor` serves every rank."""
        return cast(Method, self).factor(modules, stats)

    def worthwhile(self, group: Group, options: Iterable[Self]) -> Sequence[Self]:
        """The options that lower params or MACs and raise neither."""
        return [option for option in options if option.cost(group).lowers(group.cost)]

    def cost(self, group: Group) -> Cost:
        """Exact for a resolved method."""
        raise CallError(f"{self.name} has no cost for {group.names}.")

    def skeleton(self, group: Group) -> Mapping[str, nn.Module]:
        """Modules with uninitialized weights."""
        raise CallError(f"{self.name} builds nothing for {group.names}.")

    def rewritten(self, modules: Mapping[str, nn.Module], weights: Sequence[Tensor]) -> Rewrite:
        """The skeleton filled with `weights`, in order; the bias of the original goes to the last layer."""
        ((name, module),) = modules.items()
        built = self.skeleton(Group((describe_layer(name, module, (), 1),)))[name]
        parts: list[Any] = list(built.children())
        for part, weight in zip(parts, weights, strict=True):
            like = weight_of(module)
            part.weight = nn.Parameter(
                weight.reshape(part.weight.shape).to(like).contiguous(),
                requires_grad=like.requires_grad,
            )
        if isinstance(module.bias, Tensor):
            parts[-1].bias = nn.Parameter(module.bias.detach().clone(), requires_grad=module.bias.requires_grad)
        return Rewrite({name: built}, cast(Method, self))


class Unplanned:
    """A method that is asked for by name: no budget chooses it, and what it costs in accuracy has to be measured."""

    def candidates(self, group: Group, factors: object) -> Sequence[Method]:
        """None."""
        del group, factors
        return []

    def damage(self, factors: object) -> float | None:
        """Has to be measured."""
        del factors
        return None


def _diagonal(B: Tensor) -> Tensor:
    return torch.diag_embed(B.diagonal(dim1=-2, dim2=-1))


def regular(moment: OutputMoment | None) -> Tensor | None:
    """B (g, o, o) with a ridge of 1e-2 of its mean eigenvalue: outputs that no sampled label moved count a little.

    So do groups that none moved, beside the mean over groups; where nothing was moved, all count alike. None where
    nothing is known, or where the outputs are too many for a matrix.
    """
    B = None if moment is None else moment.full
    if B is None:
        return None
    mean = B.diagonal(dim1=-2, dim2=-1).double().mean(-1)
    over_all = mean.mean()
    size = torch.where(over_all > 0, torch.maximum(mean, MOVED * over_all), 1.0)[:, None, None]
    return B.double() + MOVED * size * torch.eye(B.shape[-1], dtype=torch.float64, device=B.device)


def input_rms(module: nn.Module, stats: LayerStatistics) -> Tensor | None:
    """Root mean square of the input that each weight meets, shaped as the weight; None without calibration data."""
    squares = stats.weighting.squares()
    if squares is None:
        return None
    W = weight_of(module)
    groups = groups_of(module)
    kernel = W.shape[2:] if squares.shape[1] == W[0].numel() else [1] * (W.ndim - 2)
    squares = squares.reshape(groups, 1, W.shape[1], *kernel).expand(groups, 1, *W.shape[1:])
    rms = (squares / max(stats.positions, 1e-30)).sqrt()
    return rms.expand(groups, len(W) // groups, *W.shape[1:]).reshape(W.shape)


def integer(method: str, key: str, value: int | None, limit: int, layer: Layer) -> int:
    """A rank as the integer it must be.

    Raises:
        CallError: it is missing or outside 1 ... `limit`.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
        raise CallError(
            f"The '{key}' of {method} on layer '{layer.name}' must be between 1 and {limit}. Got {value} instead."
        )
    return value

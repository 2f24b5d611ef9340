"""The contract of every method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from taut.types.budget import Cost
from taut.types.network import Group, Layer

if TYPE_CHECKING:
    from torch import nn


class Factors(Protocol):
    """The one decomposition of a group, from which a method cuts every candidate; its shape is the method's own."""


@dataclass(frozen=True)
class Rewrite:
    """What `Method.rewrite` gives: new modules by layer name, and the method with its final settings."""

    modules: Mapping[str, nn.Module]
    resolved: Method


@runtime_checkable
class Method(Protocol):
    """How a group of layers becomes smaller: a frozen dataclass with every setting in it.

    Class attributes:
        name: key in METHODS. family: methods that share one decomposition. needs: names of the statistics it uses.
        default: whether `compress` tries it unasked. plain: whether its modules are plain torch.nn. exact: whether it
        keeps the function of the network bit by bit or up to rounding (then the planner applies it first). masks:
        whether it sets weights to zero and leaves the layers as they are: training then holds the zeros.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    default: ClassVar[bool]
    plain: ClassVar[bool]
    exact: ClassVar[bool]
    masks: ClassVar[bool]

    def refuses(self, group: Group) -> str | None:
        """Why this method cannot rewrite the group, or None."""

    def family(self) -> str:
        """The key under which the decomposition is cached: methods of one family share it."""

    def factor(self, modules: Mapping[str, nn.Module], stats: Mapping[str, Any]) -> Factors:
        """The one decomposition, of which every candidate is a truncation."""

    def candidates(self, group: Group, factors: Factors) -> Sequence[Method]:
        """Resolved methods that lower params, nonzero or MACs, cheapest grid that serves a planner."""

    def damage(self, factors: Factors) -> float | None:
        """Predicted damage of this resolved method; None for what must be measured."""

    def rewrite(self, modules: Mapping[str, nn.Module], factors: Factors) -> Rewrite:
        """New modules for the group. Never refuses, even where nothing shrinks."""

    def skeleton(self, group: Group) -> Mapping[str, nn.Module]:
        """The modules that a resolved method builds, with uninitialized weights."""

    def cost(self, group: Group) -> Cost:
        """Exact for a resolved method."""

    def exact_case(self, group: Group) -> tuple[Method, nn.Module] | None:
        """A resolved method and a layer on which it is exact (full rank, or a planted kernel); None if refused."""


@runtime_checkable
class Looking(Protocol):
    """A method over many layers that has to see how they stand in the whole network."""

    def look(
        self, model: nn.Module, example: Any, places: Mapping[str, str], stats: Mapping[str, Any] | None = None
    ) -> tuple[Method, Any] | str:
        """The method with everything resolved that the network tells, and its factors, in the place of `factor`.

        Args:
            model: as the step finds it.
            example: how it is called.
            places: the step's layers -> where they stand in `model`.
            stats: of these layers, for a method that `needs` some.

        Returns:
            Or, in words, why there is nothing to do: the step's layers then stay as they are.
        """


@runtime_checkable
class Automatic(Protocol):
    """A method of which the weights may decide settings when the step is carried out; its `cost` before is a bound."""

    def decided(self, modules: Mapping[str, nn.Module]) -> Method:
        """Itself with the settings that the weights decide; as it is where nothing is left to them.

        Args:
            modules: the step's layers as the step finds them.
        """


@runtime_checkable
class Slimming(Protocol):
    """A method that leaves layers of their own kind, with fewer channels: later steps find these under their names.

    Its factors have `cuts`, what is left of every layer, and `stays`, why channels of a layer stay.
    """

    def after(self, group: Group) -> tuple[Layer, ...]:
        """The layers as this resolved step leaves them."""


@runtime_checkable
class Fitting(Protocol):
    """A method whose final settings can be read off what it built: a plan that was never resolved can be saved."""

    def fitted(self, group: Group, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> Method:
        """Itself with the settings that the shapes tell; as it is where it is resolved.

        Args:
            group: the layers as the step found them.
            shapes: of the parameters under every layer's name, as the step left them.
        """

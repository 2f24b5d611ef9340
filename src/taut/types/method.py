"""The contract of every method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from typing_extensions import TypeVar

from taut.types.budget import Cost
from taut.types.network import Group, Layer

if TYPE_CHECKING:
    from torch import nn


F = TypeVar("F", default=Any)
"""The one decomposition of a group, from which a method cuts every candidate; its form is the method's own."""

METHODS: dict[str, type[Any]] = {}
"""Every method by its name: filled by `taut.methods`, under which it is public."""


@dataclass(frozen=True)
class Rewrite:
    """What `Method.rewrite` gives: new modules by layer name, and the method with its final settings."""

    modules: Mapping[str, nn.Module]
    resolved: Method


@dataclass(frozen=True)
class NothingToDo:
    """Why a method that looks at the whole network leaves it as it is.

    Attributes:
        reason: in words. warns: whether the user has to hear of it, since something was asked for.
    """

    reason: str
    warns: bool = False


@runtime_checkable
class Method(Protocol[F]):
    """How a group of layers becomes smaller: a frozen dataclass with every setting in it.

    Class attributes:
        name: key in METHODS.
        uses_statistics: whether what was observed of the layers changes what it does; if not, it is handed nothing.
        default: whether it is tried unasked, whatever the data (`channels`: False, for it takes samples enough).
        plain: whether its modules are plain torch.nn. exact: whether it keeps the function of the network bit by bit
        or up to rounding (then the planner applies it first). masks: whether it sets weights to zero and leaves the
        layers as they are: training then holds the zeros.
        rank_settings: the settings that are ranks, which `align` rounds. sparsity_of_rest (False unless it is there):
        whether `sparsity` is a share of what earlier steps left. of_their_own (empty unless it is there): reasons why
        a layer is left alone that are none for this method. trades_macs (False unless it is there): whether it lowers
        parameters at the price of multiply-accumulates. remembers (False unless it is there): whether its `look` takes
        `seen`, a dictionary in which it may keep what it found out about this very model; None: it may be another one.
    """

    name: ClassVar[str]
    uses_statistics: ClassVar[bool]
    default: ClassVar[bool]
    plain: ClassVar[bool]
    exact: ClassVar[bool]
    masks: ClassVar[bool]
    rank_settings: ClassVar[tuple[str, ...]]

    def refuses(self, group: Group) -> str | None:
        """Why this method cannot rewrite the group, or None."""

    def family(self) -> str:
        """The key under which the decomposition is cached: methods of one family share it."""

    def factor(self, modules: Mapping[str, nn.Module], stats: Mapping[str, Any]) -> F:
        """The one decomposition, of which every candidate is a truncation."""

    def candidates(self, group: Group, factors: F) -> Sequence[Method]:
        """Resolved methods that lower params, nonzero or MACs, cheapest grid that serves a planner."""

    def damage(self, factors: F) -> float | None:
        """Predicted damage of this resolved method; None for what must be measured."""

    def rewrite(self, modules: Mapping[str, nn.Module], factors: F) -> Rewrite:
        """New modules for the group. Never refuses, even where nothing shrinks."""

    def skeleton(self, group: Group) -> Mapping[str, nn.Module]:
        """The modules that a resolved method builds, with uninitialized weights."""

    def cost(self, group: Group) -> Cost:
        """Exact for a resolved method."""

    def exact_case(self, group: Group) -> tuple[Method, nn.Module] | None:
        """A resolved method and a layer on which it is exact (full rank, or a planted kernel); None if refused."""


def shrinks(method: Method, group: Group) -> bool:
    """Whether a resolved method makes something of the group smaller, and nothing larger.

    A method whose layers save parameters for multiply-accumulates (`trades_macs`) may raise these.
    """
    cost = method.cost(group)
    if getattr(method, "trades_macs", False):
        return cost.params < group.cost.params
    return cost.lowers(group.cost)


def costs_by_layer(method: Method, group: Group) -> dict[str, Cost]:
    """What is left of every layer alone; what layers share counts in each of them (`costs`, where a method tells)."""
    told = getattr(method, "costs", None)
    if told is not None:
        return dict(told(group))
    gone = group.cost - method.cost(group)
    return {layer.name: layer.cost - gone for layer in group.layers}  # all that goes may be of one


MethodLike = str | Method | Mapping[str, Any]
"""How a method is asked for: its name, one {name: settings}, or itself; in a mapping of several each by its name."""


@runtime_checkable
class Looking(Protocol):
    """A method over many layers that has to see how they stand in the whole network."""

    def look(
        self, model: nn.Module, example: Any, places: Mapping[str, str], stats: Mapping[str, Any] | None = None
    ) -> tuple[Method, Any] | NothingToDo:
        """The method with everything resolved that the network tells, and its factors, in the place of `factor`.

        Args:
            model: as the step finds it.
            example: how it is called.
            places: the step's layers -> where they stand in `model`.
            stats: of these layers, for a method that `uses_statistics`.

        Returns:
            Or why there is nothing to do: the step's layers then stay as they are.
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
class Tracing(Protocol):
    """A method with settings that the trace of the network tells, of what its layers do."""

    def as_traced(self, group: Group) -> Method:
        """Itself with these settings; as it is where it has them."""


@runtime_checkable
class Slimming(Protocol):
    """A method that leaves layers of their own kind, with fewer channels: later steps find these under their names.

    Its factors have `cuts`, what is left of every layer, and `stays`, why channels of a layer stay.
    """

    def after(self, group: Group) -> tuple[Layer, ...]:
        """The layers as this resolved step leaves them."""


@runtime_checkable
class Renumbering(Protocol):
    """A method with which modules around its layers hold other whole numbers, such as how many heads they have."""

    def renumbered(self) -> Mapping[str, Sequence[int]]:
        """'module.attribute' -> what it is before and after this resolved step."""


@runtime_checkable
class Restoring(Protocol):
    """A method that makes of a layer one of its own kind, whatever that is: loading does the same to the base's."""

    def restored(self, module: nn.Module) -> nn.Module:
        """The layer in its new form."""


@runtime_checkable
class Fitting(Protocol):
    """A method whose final settings can be read off what it built: a plan that was never resolved can be saved."""

    def fitted(self, group: Group, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> Method:
        """Itself with the settings that the shapes tell; as it is where it is resolved.

        Args:
            group: the layers as the step found them.
            shapes: of the parameters under every layer's name, as the step left them.
        """

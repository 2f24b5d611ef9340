"""Blocks: whole residual blocks and transformer layers that do least are taken out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from taut.core.example import Example
from taut.errors import CallError
from taut.nn.skipped import PASS, WAYS
from taut.structure.blocks import departs_without, find_blocks, skipped
from taut.types import Cost, Group, Layer, Method, NothingToDo, Rewrite

NO_BLOCK = "blocks: it is no block, which gives the shape that it takes"


@dataclass(frozen=True)
class Blocks:
    """Take out a block whose output has the shape of its input, such as a residual block or a transformer layer.

    Nothing is left of it: no layer, no multiply-accumulate and no call, so all of its time is saved. `taut.compress`
    takes it as a coupled choice of its integer program: a block goes with all of its layers, at the damage that was
    measured without it, or each of its layers is one of its own candidates. The refit of `taut.apply` lets what follows
    make up for it, the later branches of the residual stream above all.

    `taut.trace(...).blocks` lists the blocks. A step names one, `Step(("layer3.1",), "blocks")`.

    Sources: Veit et al. 2016 (residual networks keep working without single blocks); Men et al. 2024 (transformers).

    Attributes:
        way: "pass": the block gives its input; "zero": it gives zeros, as a branch that is added to something should.
    """

    way: str = PASS

    name: ClassVar[str] = "blocks"
    takes_blocks: ClassVar[bool] = True
    uses_statistics: ClassVar[bool] = False
    default: ClassVar[bool] = False
    plain: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    masks: ClassVar[bool] = False
    rank_settings: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Refuse another way.

        Raises:
            CallError: it is neither "pass" nor "zero".
        """
        if self.way not in WAYS:
            raise CallError(f"The 'way' of blocks must be one of {', '.join(WAYS)}. Got {self.way!r} instead.")

    def refuses(self, group: Group) -> str | None:
        """What is no block."""
        if len(group.layers) != 1:
            return "blocks takes one block at a time"
        return group.layer.skip or (NO_BLOCK if group.layer.block is None else None)

    def family(self) -> str:
        """There is nothing to decompose."""
        return self.name

    def look(
        self, model: nn.Module, example: Example, places: Mapping[str, str], stats: Mapping[str, Any] | None = None
    ) -> tuple[Blocks, Layer] | NothingToDo:
        """Itself, and the block as it stands in the network; or why it cannot go."""
        del stats
        ((name, place),) = places.items()
        block = find_blocks(model, example, [place]).get(place)
        if block is None:
            return NothingToDo(f"'{name}' gives no single tensor of the shape that it takes", warns=True)
        reason = departs_without(model, example, block, self.way)
        return (self, block) if reason is None else NothingToDo(reason, warns=True)

    def factor(self, modules: Mapping[str, nn.Module], stats: Mapping[str, Any]) -> None:
        """Nothing: how a block is called is only seen in the whole network."""
        del modules, stats

    def candidates(self, group: Group, factors: object) -> Sequence[Blocks]:
        """Both ways; which of them does less harm is measured."""
        del factors
        return [] if self.refuses(group) else [Blocks(way) for way in WAYS]

    def damage(self, factors: object) -> float | None:
        """Has to be measured."""
        del factors
        return None

    def rewrite(self, modules: Mapping[str, nn.Module], factors: Layer) -> Rewrite:
        """What passes the input on."""
        return Rewrite(dict.fromkeys(modules, skipped(factors, self.way)), self)

    def skeleton(self, group: Group) -> Mapping[str, nn.Module]:
        """The same: there are no weights."""
        return {layer.name: skipped(layer, self.way) for layer in group.layers}

    def cost(self, group: Group) -> Cost:
        """Nothing."""
        del group
        return Cost()

    def exact_case(self, group: Group) -> tuple[Method, nn.Module] | None:
        """A block that does nothing."""
        if self.refuses(group) or group.layer.block is None:
            return None
        return self, _Idle(group.layer)


class _Idle(nn.Module):
    """Holds a layer, which it does not use, and gives its input as a block would."""

    def __init__(self, block: Layer) -> None:
        """Of the block's form."""
        super().__init__()
        self.unused, self.passed = nn.Linear(1, 1), skipped(block, PASS)
        for key, value in block.answers.items():
            setattr(self, key, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The input."""
        return self.passed(*args, **kwargs)

"""What `taut.trace` finds: layers with their shapes, calls and costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from pydantic import ConfigDict, SerializerFunctionWrapHandler, model_serializer

from taut.core.text import count, shape, table
from taut.errors import CallError
from taut.types.budget import FORBID, Cost
from taut.types.keep import AS_ASKED, Candidate, Keep, read_keep

LATER = frozenset({"answers", "block", "computed", "parts", "stacked", "summed", "rows", "tied", "whole"})
"""Fields of a layer that came later than plans that were saved."""


WHOLE = "(model)"
"""How messages name the model itself, whose name is empty."""


@dataclass(frozen=True)
class Invocation:
    """One call of a layer while the example ran: shapes of its first input and of its output."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID
    input: tuple[int, ...]
    output: tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """What makes a module with layers inside a block that can be taken out: it gives the shape that it takes.

    Attributes:
        layers: names of those inside.
        source: where among the arguments of a call its input is: a position, or a keyword.
        items: None where it gives a tensor; else that many in a tuple, of which all but the first are None.
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID
    layers: tuple[str, ...]
    source: int | str = 0
    items: int | None = None


@dataclass(frozen=True)
class Layer:
    """A module that owns parameters, as the example saw it; or a block of such modules.

    Attributes:
        name: dotted name in the original model.
        kind: class name, such as "Conv2d".
        weight: shape of `weight` (empty if it has none).
        bias: whether there is a bias.
        stride, padding, dilation: one entry per kernel axis; empty for a Linear. `padding` is what is added on the
            left of each axis and on the right of each axis, as pairs.
        groups: groups of a convolution.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        calls: one entry per call in one run of the example.
        batch: samples in the example.
        itemsize: bytes of one weight.
        live: per kernel axis the range [first, end) of the taps that ever see something else than padding.
        answers: attributes that other code reads of it, with what they are (of `weight` and `bias` the shape): what
            takes its place answers the same.
        computed: those of its tensors that are computed at every call (weight norm, torch's pruning).
        summed: of a weight that code multiplies by, the axes over which it is summed. rows: the rows that go together,
            where they are used in parts. stacked: whether its first axis counts matrices, all multiplied by at once.
        parts: names of the layers that its plain form has, below its own, where that has several, or others than it.
        tied: the layers that hold its weight, itself among them, where these are embeddings and linear layers.
        skip: why no method may touch it, or None.
        whole: why no method of its own kind may touch it either, where there are such.
        macs: measured multiply-accumulates per sample of the module itself, without those inside of it.
        params: parameters that the module itself owns, each counted once in the network.
        block: what stands in it, where it is a block; `macs` and `params` are then those of all that is inside.
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID
    name: str
    kind: str
    weight: tuple[int, ...] = ()
    bias: bool = False
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"
    calls: tuple[Invocation, ...] = ()
    batch: int = 1
    itemsize: int = 4
    live: tuple[tuple[int, int], ...] = ()
    skip: str | None = None
    whole: str | None = None
    computed: tuple[str, ...] = ()
    summed: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    parts: tuple[str, ...] = ()
    stacked: bool = False
    tied: tuple[str, ...] = ()
    answers: dict[str, int | float | str | tuple[int, ...] | None] = field(default_factory=dict, hash=False)
    macs: int = 0
    params: int = 0
    block: Block | None = None

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As plain data, what came later only where there is some: what is compared with it may be older."""
        fields: dict[str, Any] = write(self)
        return {key: value for key, value in fields.items() if value or key not in LATER}

    @property
    def reason(self) -> str | None:
        """Why it is left alone: what stands in the way of the methods of its own kind, too, where there are such."""
        return self.skip if self.skip in {None, AS_ASKED} else self.whole or self.skip

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel size; empty for a Linear."""
        return self.weight[2:]

    @property
    def bias_shape(self) -> tuple[int, ...]:
        """Shape of the bias; () where there is none."""
        if not self.bias:
            return ()
        if self.kind.startswith("ConvTranspose"):
            return (self.weight[1] * self.groups,)
        return self.weight if self.kind == "LayerNorm" else self.weight[:1]

    @property
    def positions(self) -> int:
        """Output positions over all calls in the whole example (not per sample)."""
        if not self.weight or self.kind == "Embedding":
            return 0
        return sum(math.prod(call.output) for call in self.calls) // self.weight[0]

    @property
    def cost(self) -> Cost:
        """What the layer costs as it is."""
        return Cost(self.params, self.params, self.macs, self.params * self.itemsize)

    def per_sample(self, macs: int) -> int:
        """Multiply-accumulates of the whole example as a number per sample, rounded."""
        return round(macs / self.batch)


@dataclass(frozen=True)
class Group:
    """The layers that one step rewrites together: shapes and calls, no tensors."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID
    layers: tuple[Layer, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers, in order."""
        return tuple(layer.name for layer in self.layers)

    @property
    def layer(self) -> Layer:
        """The only layer of a group of one."""
        (layer,) = self.layers
        return layer

    @property
    def cost(self) -> Cost:
        """What the layers cost as they are."""
        return sum((layer.cost for layer in self.layers), Cost())


@dataclass(frozen=True)
class Floor:
    """What of a layer has to stay, as the user wants it.

    Attributes:
        share: of the layer as it was in the original, in (0, 1).
        weights: of its weight, at least, that are there and not zero.
        cost: at least: that share of its multiply-accumulates, and as many parameters (and their bytes) as are left
            where that share of the weight stays and all else that it holds.
    """

    share: float
    weights: int
    cost: Cost

    @classmethod
    def of(cls, layer: Layer, share: float) -> Floor:
        """A share of a layer."""
        size = math.prod(layer.weight) if layer.weight else 0
        weights = math.ceil(share * size - 1e-9)
        held = layer.params + (size if layer.tied and layer.params < size else 0)  # another may count the weight
        params = max(0, held - (size - weights))
        return cls(share, weights, Cost(params, params, math.ceil(share * layer.macs - 1e-9), params * layer.itemsize))

    def allows(self, cost: Cost) -> bool:
        """Whether a layer of this cost keeps as much."""
        return all(mine >= least for mine, least in zip(cost.values(), self.cost.values(), strict=True))


@dataclass(frozen=True)
class Network:
    """What `taut.trace` found: every layer that owns parameters, and the cost of the whole.

    Attributes:
        layers: in the order of the model's modules.
        cost: of the whole model; `bytes` is the size of its model.safetensors.
        example: how the model is called (`taut.structure.calls.Example`), for the verbs that run it.
        uncounted: notes on what torch's counter does not see and taut counted itself (recurrent cells), and on
            operations that may multiply and are not counted.
        floors: what has to stay of layers that may not go below a share of what they were.
        blocks: the modules that give the shape that they take, and could be taken out.
        forms: what was shown of the plain forms of its layers, so that it is shown once.
        ahead: what has to stay of layers that there are only once others are in their plain form; 1: all.
    """

    layers: tuple[Layer, ...]
    cost: Cost
    uncounted: tuple[str, ...] = ()
    example: Any = field(default=None, repr=False, compare=False)
    floors: Mapping[str, Floor] = field(default_factory=dict, compare=False)
    blocks: tuple[Layer, ...] = field(default=(), repr=False, compare=False)
    forms: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    ahead: Mapping[str, float] = field(default_factory=dict, repr=False, compare=False)

    def __getitem__(self, name: str) -> Layer:
        """The layer, or else the block, of that name.

        Raises:
            CallError: there is none.
        """
        for layer in (*self.layers, *self.blocks):
            if layer.name == name:
                return layer
        known = ", ".join(layer.name or WHOLE for layer in self.layers[:8])
        raise CallError(f"The model has no layer '{name}'. Layers: {known}{', ...' if len(self.layers) > 8 else ''}.")

    def group(self, names: Sequence[str], *, blocks: bool = False) -> Group:
        """The group of the named layers; of the named blocks, where a name may mean both."""
        first = {block.name: block for block in self.blocks} if blocks else {}
        return Group(tuple(first.get(name) or self[name] for name in names))

    @property
    def tied(self) -> tuple[Group, ...]:
        """The layers that hold one weight together."""
        return tuple(self.group(names) for names in dict.fromkeys(layer.tied for layer in self.layers if layer.tied))

    def skipping(self, reasons: Mapping[str, str]) -> Network:
        """The same, with these layers left alone for these reasons; one that is skipped already keeps its own."""
        layers = tuple(replace(layer, skip=layer.skip or reasons.get(layer.name)) for layer in self.layers)
        return replace(self, layers=layers)

    def reason_of(self, layer: Layer) -> str | None:
        """Why a layer is left alone, with what is asked of those that hold its weight, too."""
        if layer.reason == AS_ASKED or layer.whole is not None:
            return layer.reason
        if (held := next((name for name in layer.tied if name in self.kept), None)) is not None:
            return f"'{held}', which holds its weight, is kept as asked"
        if (held := next((name for name in layer.tied if name in self.floors), None)) is not None:
            return f"{self.floors[held].share:.0%} of '{held}', which holds its weight, has to stay, as asked"
        return layer.reason

    def allows(self, name: str, cost: Cost) -> bool:
        """Whether a layer may come down to a cost."""
        floor = self.floors.get(name)
        return floor is None or floor.allows(cost)

    def bound(self, layer: Layer) -> Cost:
        """What of a layer stays because the user wants it so."""
        if layer.skip == AS_ASKED:
            return layer.cost
        floor = self.floors.get(layer.name)
        least = Cost() if floor is None else floor.cost
        return Cost(*(min(mine, its) for mine, its in zip(least.values(), layer.cost.values(), strict=True)))

    @property
    def kept(self) -> frozenset[str]:
        """The layers that are left alone because the user wants it so."""
        return frozenset(layer.name for layer in self.layers if layer.skip == AS_ASKED)

    @property
    def asked(self) -> dict[str, float]:
        """What has to stay of layers, as the user wants it; 1 leaves one alone."""
        floors = {name: floor.share for name, floor in self.floors.items()}
        return {**floors, **self.ahead, **dict.fromkeys(self.kept, 1.0)}

    def parts(self) -> set[str]:
        """Names of the layers that there are only once others are in their plain form."""
        return {f"{layer.name}.{part}" for layer in self.layers for part in layer.parts}

    def keeping(self, keep: Keep) -> Network:
        """The same with some layers left alone, or not below a share of what they are.

        Args:
            keep: names, globs ("head.*") or kinds (`nn.Linear` or "Linear") of layers that are left alone: neither
                their shapes nor their weights change, but by training. As a mapping with the share that stays: that
                much of the layer's weights and of its multiply-accumulates; 1 leaves it alone. Of several that fit
                the strictest holds.

        Raises:
            CallError: nothing is called so, or a share is outside (0, 1].
        """
        named = [
            Candidate(la.name, frozenset({la.kind}), parts=tuple(f"{la.name}.{part}" for part in la.parts))
            for la in self.layers
        ]
        return self.leaving(read_keep(keep, named))

    def leaving(self, shares: Mapping[str, float]) -> Network:
        """The same with layers left alone (share 1), or not below a share; unknown names mean nothing."""
        if not shares:
            return self
        layers = tuple(replace(la, skip=AS_ASKED) if shares.get(la.name) == 1 else la for la in self.layers)
        below = {la.name: Floor.of(la, shares[la.name]) for la in self.layers if shares.get(la.name, 1) < 1}
        ahead = {
            name: shares[name]
            for la in self.layers
            for name in (f"{la.name}.{part}" for part in la.parts)
            if name in shares and shares.get(la.name) != 1
        }
        known = {la.name for la in self.layers}
        ahead = {**self.ahead, **{name: share for name, share in ahead.items() if name not in known}}
        return replace(self, layers=layers, floors={**self.floors, **below}, ahead=ahead)

    def leaving_as(self, before: Network) -> Network:
        """The same with what `before`, of which this was made, leaves alone: of a replaced layer what is inside.

        Of what was one module without a weight of its own, its share is that of each part.
        """
        if not before.asked:
            return self
        inside = {layer.name: _origin(layer.name, before.floors) for layer in self.layers}
        floors = {
            layer.name: before.floors[origin] if before[origin].weight else Floor.of(layer, before.floors[origin].share)
            for layer in self.layers
            if (origin := inside[layer.name]) is not None
        }
        left = self.leaving({**before.ahead, **dict.fromkeys(before.kept, 1.0)})
        return replace(
            left, floors={**floors, **{name: left.floors[name] for name in before.ahead if name in left.floors}}
        )

    def answering(self, answers: Mapping[str, Mapping[str, Any]]) -> Network:
        """The same, where other code reads these attributes of layers, beside those that it reads anyway."""
        layers = tuple(replace(x, answers={**x.answers, **answers.get(x.name, {})}) for x in self.layers)
        return replace(self, layers=layers)

    def __str__(self) -> str:
        """A row for every layer: what it is, what it costs, why it is skipped."""
        rows = [
            (
                layer.name or WHOLE,
                layer.kind,
                shape(layer.weight),
                count(layer.params),
                count(layer.macs),
                layer.skip or "",
            )
            for layer in self.layers
        ]
        rows.append(("total", "", "", count(self.cost.params), count(self.cost.macs), ""))
        notes = "".join(f"\n{note}" for note in self.uncounted)
        return table(("layer", "kind", "weight", "params", "MACs", "skipped because"), rows, right=(3, 4)) + notes


def _origin(name: str, floors: Mapping[str, Floor]) -> str | None:
    """The layer with a floor that a layer is, or stands in."""
    return next((known for known in floors if name == known or name.startswith(f"{known}.")), None)

"""Shared bases: the whole network factorized with one basis per type of channels, stored once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from taut.core.example import Example
from taut.decompose.sharing import Term, leading, share_bases, tried
from taut.decompose.sizing import ranks_for_share, thrifty
from taut.decompose.trifactor import Relation
from taut.errors import CallError
from taut.methods.earlier_contract import Needs
from taut.methods.factorization import Unplanned
from taut.methods.layer_factory import conv, input_places, linear, output_places, random_layer, refuse_layer
from taut.methods.relation_graph import LEAST, RANK, SHARE, type_sizes
from taut.nn import Basis
from taut.structure.channels.links import find_links
from taut.structure.patches import bias_of, grouped_weight, weight_of
from taut.structure.statistics import LayerStatistics
from taut.structure.tracing import describe_layer
from taut.types import Cost, Group, Layer, Rewrite


@dataclass(frozen=True)
class Frame:
    """What a type of channels is to each layer, from shapes alone.

    Attributes:
        layers: of the step. sides: types of inputs and outputs, 0 ... T - 1, one after the other.
        sizes: channels per type.
    """

    layers: tuple[Layer, ...]
    sides: tuple[int, ...]
    sizes: Mapping[int, int]

    @classmethod
    def of(cls, layers: Sequence[Layer], links: Sequence[int] | None) -> Frame:
        """With the types numbered anew; None: no two layers share any.

        Raises:
            CallError: the links do not fit the layers.
        """
        sides = list(range(2 * len(layers))) if links is None else list(links)
        if len(sides) != 2 * len(layers) or not all(type(side) is int for side in sides):
            raise CallError(f"The 'links' must hold two numbers for each of {len(layers)} layers. Got {links}.")
        numbers: dict[int, int] = {}
        sides = [numbers.setdefault(side, len(numbers)) for side in sides]
        return cls(
            tuple(layers), tuple(sides), type_sizes([(layer.weight[0], layer.weight[1]) for layer in layers], sides)
        )

    def side(self, place: int) -> tuple[int, int]:
        """Types of the inputs and of the outputs of a layer."""
        return self.sides[2 * place], self.sides[2 * place + 1]

    def inner(self, place: int) -> int:
        """Features in a row of every input channel: above 1 behind a flatten."""
        return self.layers[place].weight[1] // self.sizes[self.side(place)[0]]

    def links(self) -> list[tuple[str, str, int]]:
        """Names of both types and the matrices between them, per layer."""
        found = []
        for place, layer in enumerate(self.layers):
            rows, columns = self.side(place)
            found.append((str(rows), str(columns), self.inner(place) * math.prod(layer.kernel)))
        return found

    def named(self) -> dict[str, int]:
        """Sizes by name."""
        return {str(number): size for number, size in self.sizes.items()}


@dataclass(frozen=True)
class Shared(Unplanned):
    """Factorize all layers at once, W ~ G_out S G_in^T, with ONE basis G per type of channels, for storage.

    The outputs of a layer and the inputs of all that read them, also over a residual sum or a flatten, are of one type;
    its basis is one Parameter in all these layers: `parameters()` counts it once, a saved folder holds it once. A layer
    becomes a gathering `taut.nn.Basis`, a core (which keeps stride, padding and dilation) and a spreading one with the
    bias; a side of full rank has no basis. Where statistics are there, bases and cores minimize the layers' output
    errors, relative to their outputs and added up. Sharing is for storage: a small net keeps more of its function than
    by layers' own factors, but each basis is multiplied wherever it is used, so that MACs fall less and in small
    convolutions rise: then the step needs `allow_growth`. For speed take "svd" or "tucker".

    Source: factored deployment of Rostan, neural network pruning with simultaneous matrix tri-factorization.

    Attributes:
        share: of these layers' weights that is stored, each basis once; ranks then follow the spectra of all types.
        rank: instead, the same for every type, capped by its size.
        ranks: of every type, 0 ... T - 1; filled in when the step is carried out. A full one has no basis.
        links: types of inputs and outputs of every layer, one after the other; None: found in the network.
    """

    share: float | None = None
    rank: int | None = None
    ranks: list[int] | None = None
    links: list[int] | None = None
    name: ClassVar[str] = "shared"
    uses_statistics: ClassVar[bool] = True
    default: ClassVar[bool] = False
    plain: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    masks: ClassVar[bool] = False
    rank_settings: ClassVar[tuple[str, ...]] = ("rank",)
    needs = Needs()

    def refuses(self, group: Group) -> str | None:
        """The first layer that shares no channels, or None."""
        for layer in group.layers:
            reason = refuse_layer(layer)
            if reason is not None:
                return reason
            if layer.groups > 1:
                return "shared: a grouped convolution does not mix its channels with a basis"
        return None

    def family(self) -> str:
        """What the layers look like depends on the types alone."""
        return f"{self.name}/{self.links}"

    def look(
        self, model: nn.Module, example: Example, places: Mapping[str, str], stats: Mapping[str, Any] | None = None
    ) -> tuple[Shared, list[Term]]:
        """Itself with types and ranks, and the layers in the metric of their inputs.

        Raises:
            CallError: a setting is out of range, or the share too small.
        """
        modules = {name: model.get_submodule(place) for name, place in places.items()}
        links = self.links
        if links is None:
            links = _alike(find_links(model, example, list(places.values())), list(modules.values()))
        found = replace(self, links=links)
        frame = found.frame(_layers(modules))
        terms = found.factor(modules, stats or {})
        return replace(found, ranks=found.chosen(frame, terms)), terms

    def factor(self, modules: Mapping[str, nn.Module], stats: Mapping[str, Any]) -> list[Term]:
        """The layers in the metric of their inputs: every rank is solved from these."""
        frame = self.frame(_layers(modules))
        terms = []
        for module, (rows, columns, m), name in zip(modules.values(), frame.links(), modules, strict=True):
            W = grouped_weight(module)[0]
            split = W.reshape(len(W), -1, m).permute(2, 1, 0)
            weighting = stats.get(name, LayerStatistics()).weighting
            terms.append(Term(Relation(rows, columns, split.double()), weighting))
        return terms

    def frame(self, layers: Sequence[Layer]) -> Frame:
        """The types of the layers.

        Raises:
            CallError: a setting is out of range.
        """
        frame = Frame.of(layers, self.links)
        if self.share is not None and not (type(self.share) in {int, float} and 0 < self.share <= 1):
            raise CallError(f"The 'share' of shared must be in (0, 1]. Got {self.share} instead.")
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
            raise CallError(f"The 'rank' of shared must be at least 1. Got {self.rank} instead.")
        if self.rank is not None and self.share is not None:
            raise CallError(f"Give shared a 'share' or a 'rank', not both. Got {self.share} and {self.rank}.")
        if self.ranks is not None and self.links is not None:
            _check_ranks(self.ranks, frame.sizes)
        return frame

    def chosen(self, frame: Frame, terms: Sequence[Term]) -> list[int]:
        """The rank of every type.

        Raises:
            CallError: the share is too small.
        """
        if self.ranks is not None:
            return list(self.ranks)
        sizes, links = frame.named(), frame.links()
        if self.share is not None:
            found = leading(terms)
            wishes = ranks_for_share(sizes, links, found.tails, self.share)
            ranks = min(wishes, key=lambda wish: tried(terms, found.vectors, wish))
        elif self.rank is not None:
            ranks = thrifty(sizes, {name: min(size, self.rank) for name, size in sizes.items()}, links)
        else:
            usual = {name: min(size, max(LEAST, min(RANK, size // SHARE))) for name, size in sizes.items()}
            ranks = thrifty(sizes, usual, links)
        return [ranks[str(number)] for number in range(len(sizes))]

    def rewrite(self, modules: Mapping[str, nn.Module], factors: list[Term]) -> Rewrite:
        """Every layer as gathering basis, core and spreading basis; one Parameter per type."""
        frame = self.frame(_layers(modules))
        ranks = self.chosen(frame, factors)
        found = share_bases(factors, {str(number): rank for number, rank in enumerate(ranks)})
        built, bases = {}, _parameters(frame, list(modules.values()), found.bases)
        for place, ((name, module), core) in enumerate(zip(modules.items(), found.cores, strict=True)):
            chain = _chain(frame, place, ranks, bases)
            old = weight_of(module)
            middle: Any = next(part for part in chain if not isinstance(part, Basis))
            middle.weight = _like(core.reshape(middle.weight.shape), old)
            bias = bias_of(module)
            if bias is not None:
                last: Any = chain[-1]
                last.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
            built[name] = chain
        return Rewrite(built, replace(self, ranks=ranks))

    def skeleton(self, group: Group) -> Mapping[str, nn.Module]:
        """The chains, tied by their bases.

        Raises:
            CallError: the ranks are not resolved.
        """
        frame, ranks = self._resolved(group)
        bases = {
            number: nn.Parameter(torch.empty(size, ranks[number]))
            for number, size in frame.sizes.items()
            if ranks[number] < size
        }
        return {layer.name: _chain(frame, place, ranks, bases) for place, layer in enumerate(frame.layers)}

    def cost(self, group: Group) -> Cost:
        """Sum n k of the bases, each once, + the cores + the biases; that of the layers until ranks are resolved."""
        frame = self.frame(group.layers)
        if self.ranks is None or self.links is None:
            return group.cost
        params = size = macs = 0
        met: set[int] = set()
        for place, layer in enumerate(frame.layers):
            new = [number for number in frame.side(place) if number not in met]
            met |= set(new)
            owned = sum(_stored(frame, number, self.ranks) for number in dict.fromkeys(new))
            owned += _core(frame, place, self.ranks) + (layer.weight[0] if layer.bias else 0)
            params, size = params + owned, size + owned * layer.itemsize
            macs += _macs(frame, place, self.ranks)
        return Cost(params, params, macs, size)

    def _resolved(self, group: Group) -> tuple[Frame, list[int]]:
        frame = self.frame(group.layers)
        if self.ranks is None or self.links is None:
            raise CallError(
                "The 'ranks' and 'links' of shared are not resolved: they are when the step is carried out."
            )
        return frame, self.ranks

    def fitted(self, group: Group, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> Shared:
        """Itself with ranks read off what was built, where it is not resolved, and links that fit them.

        Which bases are one Parameter the shapes do not say: a basis is taken for that of the last layer before whose
        outputs are as many and as far reduced. A saved folder lists its ties besides.

        Args:
            group: the layers as the step found them.
            shapes: of the parameters under every layer's name, as the step left them.
        """
        if self.ranks is not None and self.links is not None:
            return self
        links: list[int] = []
        ranks: list[int] = []
        met: dict[tuple[int, int], int] = {}
        for layer in group.layers:
            inside, outside = _reduced(layer, shapes.get(layer.name, {}))
            for place, side in enumerate((inside, outside)):
                number = met.get(side, len(ranks)) if place == 0 else len(ranks)
                if number == len(ranks):
                    ranks.append(side[1])
                links.append(number)
            met[outside] = links[-1]
        return replace(self, ranks=ranks, links=links)

    def exact_case(self, group: Group) -> tuple[Shared, nn.Module] | None:
        """A layer planted in half of its channels on either side."""
        if self.refuses(group) or len(group.layers) != 1:
            return None
        built: Any = random_layer(group.layer)
        W = built.weight.data
        ranks = [max(1, size // 2) for size in (W.shape[1], W.shape[0])]
        for axis, rank in ((1, ranks[0]), (0, ranks[1])):
            W = W.movedim(axis, 0)
            size, generator = len(W), torch.Generator().manual_seed(axis)
            Q = torch.linalg.qr(torch.randn(size, rank, generator=generator).double())[0]
            W = torch.tensordot(Q @ Q.mT, W.double(), 1).movedim(0, axis).contiguous()
        built.weight.data = W
        return Shared(ranks=ranks, links=[0, 1]), built


def _layers(modules: Mapping[str, nn.Module]) -> list[Layer]:
    return [describe_layer(name, module, (), 1) for name, module in modules.items()]


def _reduced(layer: Layer, shapes: Mapping[str, tuple[int, ...]]) -> tuple[tuple[int, int], tuple[int, int]]:
    """(channels, rank) of the inputs and of the outputs of a layer that was built with these parameters."""
    weights = [size for name, size in sorted(shapes.items()) if name.endswith("weight")]
    outputs, inputs = layer.weight[:2]
    gathers = spreads = len(weights) == 3
    if len(weights) == 2:
        (n, k), core = weights[0][:2], weights[1]
        gathers = len(weights[0]) == 2 if layer.kernel else (core[0] == outputs and core[1] * n == k * inputs)
        spreads = not gathers
    inside = weights[0] if gathers else (inputs, inputs)
    outside = weights[-1] if spreads else (outputs, outputs)
    return (inside[0], inside[1]), (outside[0], outside[1])


def _alike(links: Sequence[int], modules: Sequence[nn.Module]) -> list[int]:
    """The types, split where layers differ in dtype or device: a Parameter has one of either."""
    numbers: dict[object, int] = {}
    weights = [weight_of(module) for module in modules for _ in range(2)]
    keys = [(link, W.dtype, W.device) for link, W in zip(links, weights, strict=True)]
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def _check_ranks(ranks: Sequence[int], sizes: Mapping[int, int]) -> None:
    if not isinstance(ranks, list) or len(ranks) != len(sizes):
        raise CallError(f"The 'ranks' of shared must be a list of {len(sizes)}, one per type. Got {ranks} instead.")
    for number, size in sizes.items():
        if type(ranks[number]) is not int or not 1 <= ranks[number] <= size:
            raise CallError(
                f"The 'ranks' of shared must be between 1 and {size} for type {number}. Got {ranks[number]} instead."
            )


def _parameters(frame: Frame, modules: Sequence[nn.Module], bases: Mapping[str, Tensor]) -> dict[int, nn.Parameter]:
    """One Parameter per type that has a basis, in the dtype and on the device of its layers."""
    like = {number: weight_of(modules[place // 2]) for place, number in enumerate(frame.sides)}
    return {int(name): _like(G, like[int(name)], frozen=False) for name, G in bases.items()}


def _like(values: Tensor, old: Tensor, *, frozen: bool = True) -> nn.Parameter:
    given = values.detach().to(old).contiguous()
    return nn.Parameter(given, requires_grad=old.requires_grad or not frozen)


def _chain(frame: Frame, place: int, ranks: Sequence[int], bases: Mapping[int, nn.Parameter]) -> nn.Sequential:
    """What stands in the place of a layer, its core and bias uninitialized."""
    layer = frame.layers[place]
    rows, columns = frame.side(place)
    axes, inner = len(layer.kernel), frame.inner(place)
    spreads = columns in bases
    inputs, outputs = inner * ranks[rows], ranks[columns]
    if layer.kind == "Linear":
        core = linear(inputs, outputs, bias=layer.bias and not spreads)
    else:
        core = conv((inputs, outputs), layer, range(axes), groups=1, bias=layer.bias and not spreads)
    parts: list[nn.Module] = [core]
    if rows in bases:
        parts.insert(0, Basis(bases[rows], axes, inner=inner))
    if spreads:
        bias = nn.Parameter(torch.empty(layer.weight[0])) if layer.bias else None
        parts.append(Basis(bases[columns], axes, spread=True, bias=bias))
    return nn.Sequential(*parts)


def _stored(frame: Frame, number: int, ranks: Sequence[int]) -> int:
    """Numbers in the basis of a type."""
    return frame.sizes[number] * ranks[number] if ranks[number] < frame.sizes[number] else 0


def _core(frame: Frame, place: int, ranks: Sequence[int]) -> int:
    rows, columns = frame.side(place)
    return frame.links()[place][2] * ranks[rows] * ranks[columns]


def _macs(frame: Frame, place: int, ranks: Sequence[int]) -> int:
    """Per sample: the gathering basis at the input's positions, the rest at the output's."""
    layer = frame.layers[place]
    rows, columns = frame.side(place)
    gather = _stored(frame, rows, ranks) * frame.inner(place) * input_places(layer)
    return layer.per_sample(
        gather + (_core(frame, place, ranks) + _stored(frame, columns, ranks)) * output_places(layer)
    )

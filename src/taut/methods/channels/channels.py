"""Filter pruning: whole channels leave all layers that give, pass and read them, whatever the network's wiring."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from taut.core.example import Example
from taut.errors import CallError
from taut.methods.channels.compensation import refilled
from taut.methods.channels.importance import CRITERIA
from taut.methods.channels.sight import seen_at
from taut.methods.channels.widths import Costs, Curve, choose_widths, damage_of, even_widths, least_within
from taut.methods.earlier_contract import Needs
from taut.methods.layer_factory import random_layer, refuse_layer
from taut.methods.narrow_layers import (
    PER_CHANNEL,
    TRANSPOSED,
    Sizes,
    empty_layer,
    flat_sizes,
    groups_left,
    is_kept,
    sizes_of,
    slimmed,
)
from taut.structure.channels.cuts import cuts_of, numbers_of
from taut.structure.channels.groups import ChannelGroup
from taut.structure.narrowing import Cut
from taut.structure.rules import UNIT
from taut.structure.statistics import LayerStatistics
from taut.structure.support import STILL_NARROWED
from taut.types import Cost, Group, Layer, NothingToDo, Rewrite

NOTHING = "no channels can be taken out"
ENOUGH = "no channels have to go: what is asked holds already"

NO_RATES = (0.0, 0.0, 0.0, 0.0, 1.0)
"""No time is known."""

READ_ELSEWHERE = "other code reads its attribute"
"""How the reason of a skipped layer starts that is no obstacle here: a narrower layer has all attributes."""


@dataclass(frozen=True)
class Narrowing:
    """What `look` found for `rewrite`.

    Attributes:
        cuts: what is left of every layer that loses something, by the step's names.
        stays: layer -> why (some of) its channels stay.
        stats: of the layers as they were, for the weights that make up for what goes.
        damage: predicted, in the unit of all methods; None where the criterion has another one.
    """

    cuts: Mapping[str, Cut]
    stays: Mapping[str, str] = field(default_factory=dict)
    stats: Mapping[str, LayerStatistics] = field(default_factory=dict)
    damage: float | None = None


@dataclass(frozen=True)
class Channels:
    """Take out the channels that matter least, in coupled groups, until the layers cost no more than asked.

    Which channels go together is read off a run of the example: residual sums, concatenations, grouped and depthwise
    convolutions, flattening, attention heads, shared layers. Those that reach the output, or meet something of fixed
    width, stay. Then, by criterion,

        obs       least rise of the loss if the channel goes and all others make up for it; damages compare over layers
        obd       the same, but nothing makes up for it
        taylor    |mean over positions of a dL/da| (needs calibration data); l1, l2: norm of the filter; bn: scale of
                  the batch norm; median: distance to all other filters; residual: distance to their span; energy: mean
                  square of the activation (all relative to the layer's mean)

    and widths fall where that costs least for what it saves. The weights that stay are moved by least squares (with
    second moments of the inputs), and once more, with the new inputs, by the refit of `taut.apply`.

    A step names all layers, `taut.whole(net, "channels", macs=0.25)`. Where the narrower network does not run, or does
    not compute what the wide one does with those channels silenced, the groups to blame stay as they are.

    Sources: spec of pruning then Tucker; Molchanov et al. 2017 (taylor); Hassibi and Stork 1993 (obs); He et al. 2019
    (median); Liu et al. 2017 (bn).

    Attributes:
        macs, params: share of the step's layers' cost that is kept at most. sparsity: share of the channels that go.
        latency: share of their predicted time that is kept at most. rates: what it is predicted from, four rates
            and the lanes (`taut.measure.LatencyModel`), as a budget of latency finds them.
        criterion: see above.
        even: every group loses the same share.
        hidden: only hidden units of recurrent layers go, with all that reads them; all other channels stay.
        align: widths are multiples of it; None: multiples that kernels like.
        floors: weights that each of the step's layers keeps at least, layer after layer.
        counts: channels that every group keeps, in the order of the network; filled in when the step is carried out,
            and an order when given.
        widths: outputs and inputs, layer after layer; filled in when the step is carried out.
        heads: "module.attribute" -> what it is before and after, of the whole numbers that modules hold and that say
            how many heads there are; filled in when the step is carried out. Where it is given, no others change.
    """

    macs: float | None = None
    params: float | None = None
    sparsity: float | None = None
    latency: float | None = None
    rates: list[float] | None = None
    criterion: str = "obs"
    even: bool = False
    hidden: bool = False
    align: int | None = None
    floors: list[int] | None = None
    counts: list[int] | None = None
    widths: list[int] | None = None
    heads: dict[str, list[int]] | None = None
    name: ClassVar[str] = "channels"
    uses_statistics: ClassVar[bool] = True
    default: ClassVar[bool] = False
    plain: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    masks: ClassVar[bool] = False
    rank_settings: ClassVar[tuple[str, ...]] = ()
    needs = Needs()
    sparsity_of_rest: ClassVar[bool] = True
    remembers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing.

        Raises:
            CallError: a value of the wrong type or outside its range.
        """
        for key in ("macs", "params", "latency"):
            value = getattr(self, key)
            self._must(key, value is None or (_number(value) and 0 < value <= 1), "a share kept, in (0, 1]")
        s = self.sparsity
        self._must("sparsity", s is None or (_number(s) and 0 <= s < 1), "a share of the channels, in [0, 1)")
        rates: Any = self.rates
        listed = isinstance(rates, list) and len(rates) == len(NO_RATES)
        good = rates is None or (
            listed and all(_number(r) and 0 <= r < math.inf for r in rates) and rates[-1] >= 1 and rates[-1] % 1 == 0
        )
        self._must("rates", good, "four numbers, at least 0, and whole lanes, at least 1")
        if self.latency is not None and rates is None:
            raise CallError("A step of channels with 'latency' needs the 'rates' that times are predicted from.")
        self._must("criterion", self.criterion in CRITERIA, f"one of {', '.join(CRITERIA)}")
        good = self.align is None or (type(self.align) is int and self.align > 0)
        self._must("align", good, "a whole number, at least 1")
        for key in ("even", "hidden"):
            self._must(key, isinstance(getattr(self, key), bool), "True or False")
        floors: Any = self.floors
        good = floors is None or (
            isinstance(floors, list) and all(type(least) is int and least >= 0 for least in floors)
        )
        self._must("floors", good, "whole numbers, at least 0")
        heads: Any = self.heads
        good = heads is None or (isinstance(heads, dict) and heads and all(_fewer(*pair) for pair in heads.items()))
        self._must("heads", bool(good), "two whole numbers for every 'module.attribute', before and after")

    def _must(self, key: str, good: bool, wanted: str) -> None:
        if not good:
            raise CallError(f"The '{key}' of channels must be {wanted}. Got {getattr(self, key)!r} instead.")

    def refuses(self, group: Group) -> str | None:
        """The first layer that cannot become narrower, or None."""
        return next((reason for layer in group.layers if (reason := _refuse(layer))), None)

    def family(self) -> str:
        """Orders of removal are made anew: they belong to a network, not to a layer."""
        return f"{self.name}/{self.criterion}"

    def look(
        self,
        model: nn.Module,
        example: Example,
        places: Mapping[str, str],
        stats: Mapping[str, Any] | None = None,
        seen: dict[Any, Any] | None = None,
    ) -> tuple[Channels, Narrowing] | NothingToDo:
        """Itself with the widths that meet what was asked, and what is left of every layer.

        Raises:
            CallError: nothing was asked, no widths meet it, or the counts are not those of this network.
        """
        known = stats or {}
        names = {place: name for name, place in places.items()}
        if self.widths is not None and self.counts is None:
            raise CallError("The 'widths' of channels are a record: give 'counts', or what the layers may cost.")
        numbers = None if self.heads is None and self.counts is None else frozenset(self.heads or ())
        sight = seen_at(model, example, places, known, (self.criterion, self.hidden, numbers), seen)
        groups, curves, stays = sight.groups, sight.curves, dict(sight.stays)
        usable = list(range(len(groups)))
        while usable:
            counts = self._counts(sight.layers, groups, curves, usable)
            gone = [
                torch.from_numpy(c.order[: g.size - n].copy()) for g, c, n in zip(groups, curves, counts, strict=True)
            ]
            if not any(len(index) for index in gone):
                return NothingToDo(ENOUGH)
            bad = sight.failing(model, example, gone)
            if not bad:
                cuts = {names[place]: cut for place, cut in cuts_of(model, groups, gone).items()}
                sizes = flat_sizes(model, places, cuts)
                heads = numbers_of(groups, gone, model) or None
                resolved = replace(self, counts=counts, widths=sizes, heads=heads, latency=None, rates=None)
                return resolved, Narrowing(cuts, stays, known, damage_of(groups, curves, counts))
            if self.counts is not None:
                place, reason = next(iter(bad.items()))
                return NothingToDo(f"channels of '{groups[place].name}' cannot go: {reason}", warns=True)
            for place, reason in bad.items():
                stays |= {names[member.layer]: reason for member in groups[place].of("out")}
            usable = [place for place in usable if place not in bad]
        return NothingToDo(_why(stays), warns=True)

    def _counts(
        self, layers: Sequence[Layer], groups: Sequence[ChannelGroup], curves: Sequence[Curve], usable: Sequence[int]
    ) -> list[int]:
        """Channels that each of the groups keeps; those that are not `usable` keep all.

        Raises:
            CallError: see `look`.
        """
        sizes = [group.size for group in groups]
        if self.counts is not None:
            self._check_counts(sizes)
            return list(self.counts)
        self._must("floors", self.floors is None or len(self.floors) == len(layers), "one number for each layer")
        costs = Costs(layers, [groups[place] for place in usable], self.rates or NO_RATES, self.floors)
        limits = self._limits(costs)
        if self.even:
            found = even_widths(costs, limits, self.align)
        else:
            found = choose_widths(costs, [curves[place] for place in usable], limits, self.align)
        if found is None:
            raise CallError(f"No widths of channels meet {self._asked()}: {least_within(costs, limits)}.")
        for place, count in zip(usable, found, strict=True):
            sizes[place] = count
        return sizes

    def _check_counts(self, sizes: Sequence[int]) -> None:
        """Raise what is wrong with the counts."""
        given: Any = self.counts
        fits = isinstance(given, list) and len(given) == len(sizes)
        if not fits or not all(type(n) is int and 1 <= n <= most for n, most in zip(given, sizes, strict=True)):
            raise CallError(
                f"The 'counts' of channels must be one number for each of {len(sizes)} groups, between 1 and "
                f"{list(sizes)}. Got {given} instead."
            )

    def _limits(self, costs: Costs) -> dict[str, float]:
        whole = np.zeros((1, len(costs.groups)))
        asked = {
            "macs": self.macs,
            "params": self.params,
            "channels": None if self.sparsity is None else 1 - self.sparsity,
            "latency": self.latency,
        }
        limits = {k: share * float(costs.of(whole, {k: 1.0})[0]) for k, share in asked.items() if share is not None}
        if not limits:
            raise CallError("A step of channels needs 'macs', 'params', 'sparsity', 'latency' or 'counts'. Got none.")
        return limits

    def _asked(self) -> str:
        asked = {"macs": self.macs, "params": self.params, "sparsity": self.sparsity, "latency": self.latency}
        return ", ".join(f"{key}={value}" for key, value in asked.items() if value is not None)

    def factor(self, modules: Mapping[str, nn.Module], stats: Mapping[str, Any]) -> Narrowing:
        """Nothing: what goes together is only seen in the whole network."""
        del modules, stats
        return Narrowing({})

    def candidates(self, group: Group, factors: object) -> Sequence[Channels]:
        """None: widths are chosen over all groups at once (`taut.compress` does)."""
        del group, factors
        return []

    def damage(self, factors: Narrowing) -> float | None:
        """What the readers of the channels that go lose, others making up for them, where the criterion says it."""
        return factors.damage

    def rewrite(self, modules: Mapping[str, nn.Module], factors: Narrowing) -> Rewrite:
        """Narrower layers whose weights make up for what is gone; copies of the layers that lose nothing."""
        built = {
            name: refilled(module, factors.cuts[name], factors.stats.get(name))
            if name in factors.cuts
            else copy.deepcopy(module)
            for name, module in modules.items()
        }
        return Rewrite(built, self)

    def skeleton(self, group: Group) -> Mapping[str, nn.Module]:
        """The layers that are not as they were, with uninitialized weights."""
        found = zip(group.layers, self._checked(group), strict=True)
        return {
            layer.name: empty_layer(layer, sizes)
            for layer, sizes in found
            if layer.skip != UNIT and not is_kept(layer, sizes)
        }

    def units(self, group: Group) -> Mapping[str, Sizes]:
        """The modules with a channel rule of the user's that are not as they were: their outputs and inputs."""
        sized = zip(group.layers, self._checked(group), strict=True)
        return {layer.name: sizes for layer, sizes in sized if layer.skip == UNIT and not is_kept(layer, sizes)}

    def fitted(self, group: Group, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> Channels:
        """Itself with the widths that the parameters of the step's layers have, where it is not resolved.

        Args:
            group: the layers as the step found them.
            shapes: of the parameters under every layer's name, as the step left them.

        Raises:
            CallError: a norm has no parameters, so that no shape tells its width.
        """
        if self.widths is not None:
            return self
        silent = [
            layer.name
            for layer in group.layers
            if not layer.weight or (layer.skip == UNIT and "weight" not in shapes.get(layer.name, {}))
        ]
        if silent:
            raise CallError(
                f"The width of '{silent[0]}', which has no weight, is told by the resolved plan alone: save the "
                "plan of a taut.Result, or the model that apply or finetune returned itself and not a copy of it."
            )
        now = [replace(layer, weight=shapes.get(layer.name, {}).get("weight", layer.weight)) for layer in group.layers]
        grouped = [replace(n, groups=groups_left(n, old)) for n, old in zip(now, group.layers, strict=True)]
        return replace(self, widths=[size for layer in grouped for size in sizes_of(layer)])

    def renumbered(self) -> Mapping[str, Sequence[int]]:
        """What modules around the layers hold, before and after."""
        return self.heads or {}

    def cost(self, group: Group) -> Cost:
        """Of the narrower layers; before they are known, of the layers as they are."""
        if self.widths is None:
            return group.cost
        return sum((layer.cost for layer in self.after(group)), Cost())

    def after(self, group: Group) -> tuple[Layer, ...]:
        """The layers as this resolved step leaves them."""
        found = zip(group.layers, self._checked(group), strict=True)
        return tuple(layer if is_kept(layer, sizes) else slimmed(layer, sizes) for layer, sizes in found)

    def _checked(self, group: Group) -> list[Sizes]:
        """The widths layer by layer.

        Raises:
            CallError: they do not fit the layers.
        """
        flat = self.widths or []
        fits = len(flat) == 2 * len(group.layers) and all(type(size) is int and size >= 0 for size in flat)
        pairs = list(zip(flat[::2], flat[1::2], strict=True)) if fits else []
        for layer, sizes in zip(group.layers, pairs, strict=False):
            most = sizes_of(layer)
            fits = fits and (most == (0, 0) or all(1 <= size <= limit for size, limit in zip(sizes, most, strict=True)))
        if not fits:
            raise CallError(
                f"The 'widths' of channels must hold outputs and inputs for each of {len(group.layers)} layers, from "
                f"'{group.names[0]}' on, none larger than it was. Got {self.widths} instead."
            )
        return pairs

    def exact_case(self, group: Group) -> tuple[Channels, nn.Module] | None:
        """Nothing taken out: one layer alone has no channels that others would not miss."""
        if len(group.layers) != 1 or refuse_layer(group.layer):
            return None
        return replace(self, widths=list(sizes_of(group.layer)), counts=[]), random_layer(group.layer)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _fewer(key: Any, pair: Any) -> bool:
    whole = isinstance(pair, list) and len(pair) == 2 and all(type(number) is int for number in pair)
    return isinstance(key, str) and whole and 1 <= pair[1] <= pair[0]


def _refuse(layer: Layer) -> str | None:
    if layer.skip == UNIT:
        return None if layer.weight else UNIT
    if layer.kind in PER_CHANNEL or layer.kind in {"GroupNorm", *TRANSPOSED, "Embedding", "StateLinear"}:
        return None if layer.skip in STILL_NARROWED else layer.skip
    if layer.skip is not None and layer.skip.startswith(READ_ELSEWHERE):
        return None
    return refuse_layer(layer)


def _why(stays: Mapping[str, str]) -> str:
    told = "; ".join(f"'{name}': {reason}" for name, reason in list(stays.items())[:3])
    return f"{NOTHING}{told and ' ('}{told}{', ...' if len(stays) > 3 else ''}{told and ')'}"

"""Filter pruning: whole channels leave all layers that give, pass and read them, whatever the network's wiring."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from taut.calls import Example
from taut.criteria.channels import Reader, kept_weights
from taut.decompose.linalg import ridge
from taut.errors import CallError
from taut.methods.building import random_layer, refuse_layer
from taut.methods.ranking import CRITERIA, RIDGE, curves_of
from taut.methods.slimming import PER_CHANNEL, TRANSPOSED, Sizes, empty_layer, sizes_after, sizes_of, slim, slimmed
from taut.methods.trial import failing
from taut.methods.widths import Costs, Curve, choose_widths, even_widths
from taut.structure.channels import ChannelGroup, coupled
from taut.structure.cutting import cuts_of, sides_of
from taut.structure.narrowing import Cut
from taut.structure.patches import grouped_weight
from taut.structure.probing import record_calls
from taut.structure.statistics import LayerStatistics
from taut.structure.support import OTHERS, UNFACTORIZED
from taut.structure.tracing import describe_layer
from taut.types import Cost, Group, Layer, Rewrite

NOTHING = "no channels can be taken out"

READ_ELSEWHERE = "other code reads its attribute"
"""How the reason of a skipped layer starts that is no obstacle here: a narrower layer has all attributes."""


@dataclass(frozen=True)
class Narrowing:
    """What `look` found for `rewrite`.

    Attributes:
        cuts: what is left of every layer that loses something, by the step's names.
        stays: layer -> why (some of) its channels stay.
        stats: of the layers as they were, for the weights that make up for what goes.
    """

    cuts: Mapping[str, Cut]
    stays: Mapping[str, str] = field(default_factory=dict)
    stats: Mapping[str, LayerStatistics] = field(default_factory=dict)


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
        criterion: see above.
        even: every group loses the same share.
        align: widths are multiples of it; None: multiples that kernels like.
        counts: channels that every group keeps, in the order of the network; filled in when the step is carried out,
            and an order when given.
        widths: outputs and inputs, layer after layer; filled in when the step is carried out.
    """

    macs: float | None = None
    params: float | None = None
    sparsity: float | None = None
    criterion: str = "obs"
    even: bool = False
    align: int | None = None
    counts: list[int] | None = None
    widths: list[int] | None = None
    name: ClassVar[str] = "channels"
    needs: ClassVar[frozenset[str]] = frozenset({"inputs", "outputs"})
    default: ClassVar[bool] = False
    plain: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    masks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing.

        Raises:
            CallError: a value of the wrong type or outside its range.
        """
        for key in ("macs", "params"):
            value = getattr(self, key)
            self._must(key, value is None or (_number(value) and 0 < value <= 1), "a share kept, in (0, 1]")
        s = self.sparsity
        self._must("sparsity", s is None or (_number(s) and 0 <= s < 1), "a share of the channels, in [0, 1)")
        self._must("criterion", self.criterion in CRITERIA, f"one of {', '.join(CRITERIA)}")
        good = self.align is None or (type(self.align) is int and self.align > 0)
        self._must("align", good, "a whole number, at least 1")

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
        self, model: nn.Module, example: Example, places: Mapping[str, str], stats: Mapping[str, Any] | None = None
    ) -> tuple[Channels, Narrowing] | str:
        """Itself with the widths that meet what was asked, and what is left of every layer.

        Raises:
            CallError: nothing was asked, no widths meet it, or the counts are not those of this network.
        """
        known = stats or {}
        names = {place: name for name, place in places.items()}
        coupling = coupled(model, example)
        groups = [g for g in coupling.groups if all(m.layer in names for m in g.members)]
        stays = {names[k]: reason for k, reason in coupling.stays.items() if k in names}
        if self.widths is not None and self.counts is None:
            raise CallError("The 'widths' of channels are a record: give 'counts', or what the layers may cost.")
        layers = described(model, example, names)
        curves = curves_of(model, groups, known, self.criterion, names)
        usable = list(range(len(groups)))
        while usable:
            counts = [group.size for group in groups]
            some = self._counts(layers, [groups[i] for i in usable], [curves[i] for i in usable], whole=groups)
            for place, count in zip(usable, some, strict=True):
                counts[place] = count
            gone = [
                torch.from_numpy(c.order[: g.size - n].copy()) for g, c, n in zip(groups, curves, counts, strict=True)
            ]
            if not any(len(index) for index in gone):
                break
            bad = failing(model, example, groups, gone)
            if not bad:
                cuts = {names[place]: cut for place, cut in cuts_of(model, groups, gone).items()}
                resolved = replace(self, counts=counts, widths=_flat(model, places, cuts))
                return resolved, Narrowing(cuts, stays, known)
            if self.counts is not None:
                return f"channels of '{groups[bad[0][0]].name}' cannot go: {bad[0][1]}"
            stays |= {names[groups[place].name]: reason for place, reason in bad}
            usable = [place for place in usable if place not in {place for place, _ in bad}]
        return _why(stays)

    def _counts(
        self,
        layers: Sequence[Layer],
        groups: Sequence[ChannelGroup],
        curves: Sequence[Curve],
        whole: Sequence[ChannelGroup],
    ) -> list[int]:
        """Channels that each of `groups` keeps, those of `whole` of which some may go.

        Raises:
            CallError: see `look`.
        """
        sizes = [group.size for group in whole]
        if self.counts is not None:
            fits = len(self.counts) == len(sizes) and all(
                type(n) is int and 1 <= n <= most for n, most in zip(self.counts, sizes, strict=True)
            )
            if not fits:
                raise CallError(
                    f"The 'counts' of channels must be one number for each of {len(sizes)} groups, between 1 and "
                    f"{sizes}. Got {self.counts} instead."
                )
            return list(self.counts)
        costs = Costs(layers, groups)
        limits = self._limits(costs)
        find = even_widths(costs, limits, self.align) if self.even else choose_widths(costs, curves, limits, self.align)
        if find is None:
            least = costs.of(np.array([[group.size - 1 for group in groups]], dtype=float), dict.fromkeys(limits, 1.0))
            raise CallError(
                f"No widths of channels meet {self._asked()}: one channel a group still costs {least[0]:.0f}."
            )
        return find

    def _limits(self, costs: Costs) -> dict[str, float]:
        whole = np.zeros((1, len(costs.groups)))
        asked = {
            "macs": self.macs,
            "params": self.params,
            "channels": None if self.sparsity is None else 1 - self.sparsity,
        }
        limits = {k: share * float(costs.of(whole, {k: 1.0})[0]) for k, share in asked.items() if share is not None}
        if not limits:
            raise CallError("A step of channels needs 'macs', 'params', 'sparsity' or 'counts'. Got none.")
        return limits

    def _asked(self) -> str:
        asked = {"macs": self.macs, "params": self.params, "sparsity": self.sparsity}
        return ", ".join(f"{key}={value}" for key, value in asked.items() if value is not None)

    def factor(self, modules: Mapping[str, nn.Module], stats: Mapping[str, Any]) -> Narrowing:
        """Nothing: what goes together is only seen in the whole network."""
        del modules, stats
        return Narrowing({})

    def candidates(self, group: Group, factors: Any) -> Sequence[Channels]:
        """None: widths are chosen over all groups at once (`taut.compress` does)."""
        del group, factors
        return []

    def damage(self, factors: Any) -> float | None:
        """Has to be measured."""
        del factors
        return None

    def rewrite(self, modules: Mapping[str, nn.Module], factors: Any) -> Rewrite:
        """Narrower layers whose weights make up for what is gone; copies of the layers that lose nothing."""
        found: Narrowing = factors
        built = {
            name: _narrow(module, found.cuts[name], found.stats.get(name))
            if name in found.cuts
            else copy.deepcopy(module)
            for name, module in modules.items()
        }
        return Rewrite(built, self)

    def skeleton(self, group: Group) -> Mapping[str, nn.Module]:
        """The layers that are not as they were, with uninitialized weights."""
        found = zip(group.layers, self._checked(group), strict=True)
        return {layer.name: empty_layer(layer, sizes) for layer, sizes in found if not _kept(layer, sizes)}

    def cost(self, group: Group) -> Cost:
        """Of the narrower layers; before they are known, of the layers as they are."""
        if self.widths is None:
            return group.cost
        return sum((layer.cost for layer in self.after(group)), Cost())

    def after(self, group: Group) -> tuple[Layer, ...]:
        """The layers as this resolved step leaves them."""
        found = zip(group.layers, self._checked(group), strict=True)
        return tuple(layer if _kept(layer, sizes) else slimmed(layer, sizes) for layer, sizes in found)

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


def _refuse(layer: Layer) -> str | None:
    if layer.kind in PER_CHANNEL or layer.kind in {"GroupNorm", *TRANSPOSED, "Embedding"}:
        usual = layer.skip in {*UNFACTORIZED, *(OTHERS[kind] for kind in (_ConvTransposeNd, nn.Embedding))}
        return None if layer.skip is None or usual else layer.skip
    if layer.skip is not None and layer.skip.startswith(READ_ELSEWHERE):
        return None
    return refuse_layer(layer)


def described(model: nn.Module, example: Example, names: Mapping[str, str]) -> list[Layer]:
    """The layers as they are now, by where they stand, with their calls and multiply-accumulates."""
    calls, _ = record_calls(model, example)
    found = []
    for place in names:
        module = model.get_submodule(place)
        layer = describe_layer(place, module, tuple(calls.get(place, ())), example.batch)
        params = sum(p.numel() for p in module.parameters(recurse=False))
        found.append(replace(layer, params=params, macs=_macs(layer)))
    return found


def _macs(layer: Layer) -> int:
    weights = math.prod(layer.weight)
    if layer.kind in TRANSPOSED:
        return layer.per_sample(weights * sum(math.prod(call.input) for call in layer.calls) // layer.weight[0])
    if layer.kind == "Linear" or layer.kernel:
        return layer.per_sample(weights * layer.positions)
    return 0


def _kept(layer: Layer, sizes: Sizes) -> bool:
    return sizes in {sizes_of(layer), (0, 0)}


def _flat(model: nn.Module, places: Mapping[str, str], cuts: Mapping[str, Cut]) -> list[int]:
    """Outputs and inputs of all layers in a row; zeros for a norm without parameters that keeps its width."""
    flat: list[int] = []
    for name, place in places.items():
        module = model.get_submodule(place)
        if name not in cuts and not any(True for _ in module.parameters(recurse=False)):
            flat += [0, 0]
        else:
            flat += sizes_after(module, cuts.get(name))
    return flat


def _why(stays: Mapping[str, str]) -> str:
    told = "; ".join(f"'{name}': {reason}" for name, reason in list(stays.items())[:3])
    return f"{NOTHING}{told and ' ('}{told}{', ...' if len(stays) > 3 else ''}{told and ')'}"


def _narrow(module: nn.Module, cut: Cut, stats: LayerStatistics | None) -> nn.Module:
    """The narrower layer; where inputs went and their second moments are known, those that stay make up for them."""
    small = slim(module, cut)
    if stats is None or not stats.weighting.known or len(cut.inputs) == sides_of(module)[1]:
        return small
    made_up = _made_up(module, cut, stats)
    if made_up is not None:
        weight: Any = small.weight
        weight.data.copy_(made_up.reshape(weight.shape))
    return small


def _made_up(module: nn.Module, cut: Cut, stats: LayerStatistics) -> Tensor | None:
    """The kept columns moved so that tr(dW A dW^T) is least, of the kept rows; None where A is only sketched."""
    held = stats.weighting.full if stats.weighting.full is not None else stats.weighting.channel
    if held is None or not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return None
    W = grouped_weight(module)
    g, _, c, taps = W.shape
    kept = torch.zeros(c, dtype=torch.bool)
    kept[cut.inputs] = True
    found = []
    for i in range(g):
        A = ridge(held[i], RIDGE).cpu()
        wide = stats.weighting.full is not None
        rows = W[i].flatten(1) if wide else W[i].movedim(2, 0).flatten(0, 1)
        owner = torch.arange(c).repeat_interleave(taps if wide else 1)
        moved = kept_weights(Reader(rows.cpu(), A, owner), kept)
        found.append(moved.reshape(-1, c, taps) if wide else moved.reshape(taps, -1, c).movedim(0, 2))
    return torch.cat(found)[cut.outputs][:, cut.inputs]

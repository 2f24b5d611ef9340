"""Dead units: neurons and channels that pruning left without work are taken out; the output does not change."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from taut.core.example import Example
from taut.core.text import some
from taut.errors import CallError
from taut.methods.earlier_contract import Needs
from taut.methods.layer_factory import random_layer, refuse_layer
from taut.methods.narrow_layers import empty_layer, slim
from taut.nn import Pick
from taut.structure.channels.groups import coupled
from taut.structure.compacting import PER_CHANNEL, compact
from taut.structure.narrowing import Cut
from taut.structure.patches import weight_of
from taut.structure.support import UNFACTORIZED
from taut.types import Cost, Group, Layer, NothingToDo, Rewrite

BETWEEN = frozenset(kind.__name__ for kind in PER_CHANNEL)
"""Layers with values per channel, which become narrower with the layers around them."""

NOTHING = "nothing is dead, or nothing that can be taken out exactly"

Widths = tuple[int, int, int]
"""Outputs, inputs, and 1 where a `Pick` stands before the layer."""


@dataclass(frozen=True)
class DeadUnits:
    """Take out the units that pruning left without work: zeros in weights become narrower layers, with fewer MACs.

    A unit is dead where all its readers have zeros for it, or where all its own weights are zero, so that it is a
    constant, which the biases of its readers take over (not those of convolutions that pad zeros, and not across a
    product or a sum with a mask, another input or a number from outside, or a sum over positions, unless the constant
    is zero). That goes on until nothing is dead.
    Then inputs that a layer does not read, but that stay because others do, are left out by a `taut.nn.Pick` before it
    where they are a tenth or more.

    A step names all layers, `taut.whole(net, "dead_units")`, and belongs behind the steps that prune. Which units go
    together is read off labelled channels, as for `channels`: a unit is several rows or columns of a layer where these
    can only go together. Channels stay where something else reads them: the output of the model, a grouped convolution,
    a layer that shares a weight, a norm over channels; all stay where a layer is not reached, since it may read any.
    What is left computes the same up to rounding, at any input of the example's kind; a copy in float64 is asked. For
    constants other than zero that convolutions take over, that holds at the example's input SIZE: a network that pads
    in `forward`, by as much as an input lacks, has zeros in their place at other sizes, and code that multiplies by a
    size of its tensors has other constants.

    Attributes:
        widths: outputs, inputs and 0 or 1 (a `Pick`), layer after layer; filled in when the step is carried out. The
            widths that the layers have already ask for nothing. Any others are no order but a record: carried out
            again, on other weights, a step finds what is dead there, and other widths.
    """

    widths: list[int] | None = None
    name: ClassVar[str] = "dead_units"
    uses_statistics: ClassVar[bool] = False
    default: ClassVar[bool] = False
    plain: ClassVar[bool] = False
    exact: ClassVar[bool] = True
    masks: ClassVar[bool] = False
    rank_settings: ClassVar[tuple[str, ...]] = ()
    needs = Needs()

    def refuses(self, group: Group) -> str | None:
        """The first layer that is none of those which units are taken out of, or None."""
        return next((reason for layer in group.layers if (reason := _refuse(layer))), None)

    def family(self) -> str:
        """There is nothing to decompose."""
        return self.name

    def look(
        self, model: nn.Module, example: Example, places: Mapping[str, str], stats: Mapping[str, Any] | None = None
    ) -> tuple[DeadUnits, Mapping[str, Cut]] | NothingToDo:
        """Itself with the widths that are left, and what is left of every layer; or that nothing is dead."""
        del stats
        before = {name: _widths(model.get_submodule(place).weight) for name, place in places.items()}
        if self.widths == [size for widths in before.values() for size in widths]:
            return self, {}
        coupling = coupled(model, example)
        found = compact(model, example, list(places.values()), coupling)
        within = {*places.values()}
        outside = (m.layer for group in coupling.groups for m in group.members if m.layer not in within)
        spared = _spared(model, [*dict.fromkeys((*coupling.unreached, *outside))], found)
        if not found:
            return NothingToDo(f"{NOTHING}{spared and '; '}{spared}")
        if spared:
            warnings.warn(f"dead_units made no layer narrower, but for unread inputs: {spared}.", stacklevel=2)
        cuts = {name: found[place] for name, place in places.items() if place in found}
        after = {name: cuts[name].widths if name in cuts else before[name] for name in places}
        return replace(self, widths=[size for widths in after.values() for size in widths]), cuts

    def factor(self, modules: Mapping[str, nn.Module], stats: Mapping[str, Any]) -> Mapping[str, Cut]:
        """Nothing: what is dead is only seen in the whole network."""
        del modules, stats
        return {}

    def candidates(self, group: Group, factors: object) -> Sequence[DeadUnits]:
        """None: one layer does not say what is dead."""
        del group, factors
        return []

    def damage(self, factors: object) -> float | None:
        """None is done."""
        del factors
        return 0.0

    def rewrite(self, modules: Mapping[str, nn.Module], factors: Mapping[str, Cut]) -> Rewrite:
        """Narrower layers with slices of the weights; copies of the layers of which nothing goes."""
        built = {
            name: _filled(module, factors[name]) if name in factors else copy.deepcopy(module)
            for name, module in modules.items()
        }
        return Rewrite(built, self)

    def skeleton(self, group: Group) -> Mapping[str, nn.Module]:
        """The layers that are not as they were, with uninitialized weights."""
        found = zip(group.layers, self._checked(group), strict=True)
        return {layer.name: _empty(layer, widths) for layer, widths in found if widths != _widths(layer)}

    def fitted(self, group: Group, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> DeadUnits:
        """Itself with the widths that the parameters of the step's layers have, where it is not resolved.

        Args:
            group: the layers as the step found them.
            shapes: of the parameters under every layer's name, as the step left them.
        """
        if self.widths is not None:
            return self
        found: list[int] = []
        for layer in group.layers:
            own = shapes.get(layer.name, {})
            outputs, inputs, _ = _widths(own.get("weight", own.get("1.weight", layer.weight)))
            found += [outputs, inputs, int("1.weight" in own)]
        return replace(self, widths=found)

    def cost(self, group: Group) -> Cost:
        """Of the narrower layers; before they are known, of the layers as they are."""
        if self.widths is None:
            return group.cost
        costs = (_cost(*pair) for pair in zip(group.layers, self._checked(group), strict=True))
        return sum(costs, Cost())

    def _checked(self, group: Group) -> list[Widths]:
        """The widths layer by layer.

        Raises:
            CallError: they do not fit the layers.
        """
        flat = self.widths or []
        fits = len(flat) == 3 * len(group.layers) and all(type(size) is int for size in flat)
        triples = list(zip(flat[::3], flat[1::3], flat[2::3], strict=True)) if fits else []
        for layer, widths in zip(group.layers, triples, strict=False):
            fits = fits and _fits(widths, layer)
        if not fits:
            raise CallError(
                f"The 'widths' of dead_units must hold outputs, inputs and 0 or 1 for each of {len(group.layers)} "
                f"layers, from '{group.names[0]}' on, none larger than it was. Got {self.widths} instead."
            )
        return triples

    def exact_case(self, group: Group) -> tuple[DeadUnits, nn.Module] | None:
        """Nothing taken out: one layer alone has no units that the rest of the network leaves without work."""
        if len(group.layers) != 1 or refuse_layer(group.layer):
            return None
        return replace(self, widths=list(_widths(group.layer))), random_layer(group.layer)


def _refuse(layer: Layer) -> str | None:
    if layer.kind not in BETWEEN:
        return refuse_layer(layer)
    between = layer.skip in UNFACTORIZED and len(layer.weight) == 1 and layer.weight[0] > 1
    return None if between else layer.skip or f"dead_units: this {layer.kind} has no value per channel"


def _spared(model: nn.Module, others: Sequence[str], found: Mapping[str, Cut]) -> str:
    """Why no layer lost outputs, in words; empty where one did, or where nothing kept the layers from it."""
    if any(len(cut.outputs) < len(weight_of(model.get_submodule(place))) for place, cut in found.items()):
        return ""
    if not others:
        return ""
    return f"channels stay that belong to {some(others)}, too, which the example does not call or the step leaves out"


def _widths(like: Any) -> Widths:
    """Of a layer, of a weight or of its shape as it is."""
    sizes: tuple[int, ...] = like.weight if isinstance(like, Layer) else getattr(like, "shape", like)
    return sizes[0], sizes[min(1, len(sizes) - 1)], 0


def _fits(widths: Widths, layer: Layer) -> bool:
    outputs, inputs, picked = widths
    most = _widths(layer)
    within = 1 <= outputs <= most[0] and 1 <= inputs <= most[1] and picked in {0, 1}
    if layer.kind in BETWEEN:
        return within and outputs == inputs and not picked
    return within and (layer.groups == 1 or widths == most)


def _empty(layer: Layer, widths: Widths) -> nn.Module:
    outputs, inputs, picked = widths
    built = empty_layer(layer, (outputs, inputs))
    return nn.Sequential(Pick(torch.zeros(inputs), len(layer.kernel)), built) if picked else built


def _filled(module: nn.Module, cut: Cut) -> nn.Module:
    """The narrower layer, with what is left of the weights."""
    built = slim(module, cut)
    if cut.pick is None:
        return built
    weight = weight_of(module)
    return nn.Sequential(Pick(cut.pick, weight.ndim - 2), built).to(weight.device)


def _cost(layer: Layer, widths: Widths) -> Cost:
    if widths == _widths(layer):
        return layer.cost
    outputs, inputs, _ = widths
    if layer.kind in BETWEEN:
        params = outputs * (1 + layer.bias)
        return Cost(params, params, layer.macs, params * layer.itemsize)
    weights = outputs * inputs * math.prod(layer.kernel)
    params = weights + (outputs if layer.bias else 0)
    return Cost(params, params, layer.per_sample(weights * layer.positions), params * layer.itemsize)

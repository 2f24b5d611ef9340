"""Units that do nothing, found and counted out: what is left of every layer when they are gone.

A unit (a neuron, a channel) is dead where nobody reads it, or where nothing feeds it, so that it is a constant that the
biases of its readers can take over. Taking one out may leave others dead. All of it is done on a copy in float64, and
believed only where that copy computes the same afterwards, layer by layer, on random inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from taut.core.example import Example
from taut.core.modes import evaluating
from taut.structure.channels.groups import ChannelGroup, Coupling, Member, coupled
from taut.structure.channels.runs import End
from taut.structure.narrowing import Cut, Departure, Trail, channel_axis, departure, narrowed, trail
from taut.structure.patches import bias_of, groups_of, weight_of
from taut.structure.sameness import PROBES, few, probes_of
from taut.structure.support import SUPPORTED
from taut.structure.surgery import clone, shallow

PER_CHANNEL = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.PReLU)
"""Layers between others that hold values per channel, and become narrower with these."""

CONSTANT = 1e-12
"""Spread of a channel over samples and positions, as a share of its value, that is still rounding."""

LEAST_PICKED = 0.1
"""Share of a layer's inputs that must be dead before a `Pick` pays, which moves all that are left."""


def compact(
    model: nn.Module, example: Example, names: Sequence[str], coupling: Coupling | None = None
) -> dict[str, Cut]:
    """What is left of the named layers when everything dead is taken out; layers that stay as they are are missing.

    Where the whole does not compute the same in float64, the groups of channels that are to blame are looked for. A few
    samples of the example do, unless the model cannot run on so few.

    Args:
        model: is not changed.
        example: how it is called.
        names: Linear layers, convolutions, and batch norms and PReLUs with values per channel.
        coupling: of the model's channels, where it is known already.

    Raises:
        ModelError: the model cannot be run.
    """
    mixing = [name for name in names if isinstance(model.get_submodule(name), SUPPORTED)]
    for part in dict.fromkeys((few(example), example)):
        wide = clone(model).double()
        before = _reference(wide, part, mixing)
        if before:
            coupling = coupled(model, part) if coupling is None else coupling
            reached = {name for _, run in before for name, outputs in run.items() if outputs}
            seen = [name for name in names if name in reached or name not in mixing]
            groups = [group for group in coupling.groups if _removable(model, group, seen)]
            search = _Search(wide, part, before, mixing, coupling.foreign)
            if not search.add([], groups) and groups:
                search.departs([])
            return search.cuts
    return {}


def _removable(model: nn.Module, group: ChannelGroup, names: Sequence[str]) -> bool:
    """Whether all that give, read or pass channels are among `names`, and of kinds that dead ones are cut out of."""
    for member in group.members:
        module = model.get_submodule(member.layer)
        between = member.end == "through" and type(module) in PER_CHANNEL
        mixes = member.end != "through" and isinstance(module, SUPPORTED) and groups_of(module) == 1
        if not _bare(module) and (member.layer not in names or not (between or mixes)):
            return False
    return True


def _bare(module: nn.Module) -> bool:
    """Whether a layer treats every channel for itself and holds nothing, so that it fits any number of them."""
    held = any(t is not None for t in (*module._parameters.values(), *module._buffers.values()))
    return isinstance(module, _BatchNorm | _InstanceNorm) and not held


Reference = list[tuple[Any, Trail]]
"""Probes, and what the layers of the model gave for each."""


def _reference(wide: nn.Module, example: Example, mixing: Sequence[str]) -> Reference | None:
    """The probes that the model runs on in float64; None where these are too few to tell anything."""
    copied = shallow(wide)
    runs = [(probe, run) for probe in probes_of(example) if (run := trail(copied, example, probe, mixing)) is not None]
    return runs if len(runs) >= PROBES else None


class _Search:
    """The groups of channels that can be taken out together, all or nearly all, found in few trials.

    Attributes:
        cuts: what is left of the layers, in the last trial that computed the same.
    """

    def __init__(
        self, wide: nn.Module, example: Example, before: Reference, mixing: Sequence[str], foreign: frozenset[str]
    ) -> None:
        self.wide, self.example, self.before, self.mixing, self.foreign = wide, example, before, mixing, foreign
        self.cuts: dict[str, Cut] = {}

    def add(self, chosen: list[ChannelGroup], more: list[ChannelGroup]) -> list[ChannelGroup]:
        """`chosen` and those of `more` that can be taken out, too.

        What does not go together is tried without the channels around the layer where the model departs from what it
        was, and without half of them where that says nothing.
        """
        first = self.departs([*chosen, *more])
        if first is None:
            return [*chosen, *more]
        if len(more) < 2:
            return chosen
        part = [group for group in more if any(member.layer == first.layer for member in group.of(first.end))]
        part = part if 0 < len(part) < len(more) else more[len(more) // 2 :]
        rest = [group for group in more if group not in part]
        taken = self.add(chosen, rest)
        if len(part) == 1 and len(taken) == len(chosen) + len(rest):
            return taken  # all together are what has just failed
        return self.add(taken, part)

    def departs(self, chosen: Sequence[ChannelGroup]) -> Departure | None:
        """Where the model computes something else when these are taken out; None where it does not."""
        work = _Work(clone(self.wide), self.example, [probe for probe, _ in self.before], chosen, self.foreign)
        work.settle()
        cuts = work.cuts(self.mixing)
        if cuts:
            small = narrowed(work.undone(self.wide), cuts)
            for probe, before in self.before:
                first = departure(small, self.example, probe, before, cuts)
                if first is not None:
                    return first
        self.cuts = cuts
        return None


class _Work:
    """A float64 copy in which dead units are silenced one after the other; it keeps computing the same.

    A unit is a channel of a group: several rows or columns of a layer, where these can only go together.
    """

    def __init__(
        self,
        wide: nn.Module,
        example: Example,
        probes: list[Any],
        groups: Sequence[ChannelGroup],
        foreign: frozenset[str],
    ) -> None:
        self.wide, self.example, self.probes, self.groups, self.foreign = wide, example, probes, groups, foreign
        self.dead = [torch.zeros(group.size, dtype=torch.bool) for group in groups]
        self.spared: list[int | None] = [None for _ in groups]
        self.folded: set[str] = set()

    def settle(self) -> None:
        """Until taking out what is dead leaves nothing else dead."""
        moved = True
        while moved:
            silenced = [self._silence_unread(number) for number in range(len(self.groups))]
            moved = any(silenced) or self._fold_constants()

    def _layer(self, name: str) -> Any:
        return self.wide.get_submodule(name)

    def _members(self, group: ChannelGroup, end: End) -> Iterator[tuple[Any, Member]]:
        return ((self._layer(member.layer), member) for member in group.of(end))

    def _read(self, group: ChannelGroup) -> Tensor:
        """Which units some reader has a weight for."""
        return torch.stack([read_columns(layer)[m.index].any(1) for layer, m in self._members(group, "in")]).any(0)

    def _fed(self, group: ChannelGroup) -> Tensor:
        """Which units have a weight of some producer."""
        return torch.stack([_fed_rows(layer)[m.index].any(1) for layer, m in self._members(group, "out")]).any(0)

    def _silence_unread(self, number: int) -> bool:
        """The units that nobody reads: their rows become zero. Where none is left, one stays for its width alone."""
        dying = ~self._read(self.groups[number]) & ~self.dead[number]
        if not bool(dying.any()):
            return False
        self.dead[number] |= dying
        if bool(self.dead[number].all()):
            self.spared[number] = int(dying.nonzero()[0])
        self._silence(number, dying)
        return True

    def _silence(self, number: int, units: Tensor) -> None:
        for layer, member in self._members(self.groups[number], "out"):
            rows = member.index[units].flatten()
            layer.weight.data[rows.to(layer.weight.device)] = 0
            if bias_of(layer) is not None:
                layer.bias.data[rows.to(layer.bias.device)] = 0

    def _fold_constants(self) -> bool:
        """The units that nothing feeds: the readers' biases take over what they are. One unit always stays."""
        unfed = {
            number: candidates
            for number, group in enumerate(self.groups)
            if bool((candidates := ~self._fed(group) & ~self.dead[number]).any())
        }
        readers = {member.layer for number in unfed for member in self.groups[number].of("in")}
        values = self._values(readers) if unfed else {}
        moved = False
        for number, candidates in unfed.items():
            units = candidates & self._foldable(self.groups[number], values)
            if bool((self.dead[number] | units).all()):
                units[int(units.nonzero()[0])] = False
            if bool(units.any()):
                self._fold(number, units, values)
                moved = True
        return moved

    def _values(self, names: set[str]) -> dict[str, Tensor]:
        """What every input of the named layers always is; NaN where it is not constant."""
        low: dict[str, Tensor] = {}
        high: dict[str, Tensor] = {}

        def note(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                axis = channel_axis(module, args[0])
                rows = args[0].movedim(axis, 0).reshape(args[0].shape[axis], -1)
                low[name] = torch.minimum(low.get(name, rows.amin(1)), rows.amin(1))
                high[name] = torch.maximum(high.get(name, rows.amax(1)), rows.amax(1))

            return hook

        handles = [self._layer(name).register_forward_pre_hook(note(name)) for name in names]
        with evaluating(self.wide), torch.no_grad():
            for probe in self.probes:
                self.example.run(self.wide, probe)
        for handle in handles:
            handle.remove()
        return {name: _constant(low[name], high[name]).cpu() for name in names}

    def _foldable(self, group: ChannelGroup, values: Mapping[str, Tensor]) -> Tensor:
        """Which units every reader can do without: it does not read them, or reads a constant that it can hold.

        Times a mask, say, only zero is sure to be constant: the masks of the probes are not all that there are.
        """
        able = torch.ones(group.size, dtype=torch.bool)
        for layer, member in self._members(group, "in"):
            inputs = values[member.layer]
            holds = _takes_constants(layer) and member.layer not in self.foreign
            known = inputs.isfinite() if holds else inputs == 0
            able &= (known | ~read_columns(layer))[member.index].all(1)
        return able

    def _fold(self, number: int, units: Tensor, values: Mapping[str, Tensor]) -> None:
        for layer, member in self._members(self.groups[number], "in"):
            columns = member.index[units].flatten()
            columns = columns[read_columns(layer)[columns]].to(layer.weight.device)
            taken = values[member.layer].to(layer.weight.device)[columns]
            if bool((taken != 0).any()):
                summed = layer.weight.data[:, columns].reshape(len(layer.weight), len(columns), -1).sum(-1)
                layer.bias.data += summed @ taken
                self.folded.add(member.layer)
            layer.weight.data[:, columns] = 0
        self.dead[number] |= units
        self._silence(number, units)

    def cuts(self, mixing: Sequence[str]) -> dict[str, Cut]:
        """What is left of every layer that does not stay as it is."""
        kept: dict[tuple[str, End], Tensor] = {}
        live: dict[str, Tensor] = {}
        for group, dead, spared in zip(self.groups, self.dead, self.spared, strict=True):
            gone = dead.clone()
            if spared is not None:
                gone[spared] = False
            for member in (m for m in group.members if not _bare(self._layer(m.layer))):
                every = torch.ones(member.width, dtype=torch.bool)
                kept.setdefault((member.layer, member.end), every)[member.index[gone].flatten()] = False
                if member.end == "out":
                    live.setdefault(member.layer, every.clone())[member.index[dead].flatten()] = False
        cuts = {name: self._cut(name, kept.get((name, "out")), kept.get((name, "in")), live) for name in mixing}
        for (name, end), values in kept.items():
            if end == "through":
                cuts[name] = Cut(values.nonzero().flatten(), values.nonzero().flatten())
        return {name: cut for name, cut in cuts.items() if self._narrower(name, cut)}

    def _cut(self, name: str, outputs: Tensor | None, inputs: Tensor | None, live: Mapping[str, Tensor]) -> Cut:
        layer = self._layer(name)
        outputs = torch.ones(len(layer.weight), dtype=torch.bool) if outputs is None else outputs
        arriving = torch.ones(layer.weight.shape[1], dtype=torch.bool) if inputs is None else inputs
        wanted = _picked(layer, arriving)
        return Cut(
            outputs.nonzero().flatten(),
            wanted.nonzero().flatten(),
            None if torch.equal(wanted, arriving) else wanted[arriving].nonzero().flatten(),
            layer.bias.data.clone() if name in self.folded else None,
            live.get(name, outputs)[outputs],
        )

    def undone(self, wide: nn.Module) -> nn.Module:
        """The copy with the weights of the model again: it is what is to be narrowed."""
        for group in self.groups:
            for layer, member in (*self._members(group, "out"), *self._members(group, "in")):
                original: Any = wide.get_submodule(member.layer)
                layer.weight.data.copy_(original.weight.data)
                if bias_of(layer) is not None:
                    layer.bias.data.copy_(original.bias.data)
        return self.wide

    def _narrower(self, name: str, cut: Cut) -> bool:
        weight = self._layer(name).weight
        return len(cut.outputs) < len(weight) or (weight.ndim > 1 and len(cut.inputs) < weight.shape[1])


def read_columns(layer: nn.Module) -> Tensor:
    """Which inputs a layer has a weight for that is not zero."""
    return (weight_of(layer) != 0).transpose(0, 1).flatten(1).any(1).cpu()


def _fed_rows(layer: nn.Module) -> Tensor:
    """Which outputs of a layer have a weight that is not zero."""
    return (weight_of(layer) != 0).flatten(1).any(1).cpu()


def _constant(low: Tensor, high: Tensor) -> Tensor:
    still = high - low <= CONSTANT * torch.maximum(low.abs(), high.abs())
    return torch.where(still, low, torch.full_like(low, float("nan")))


def _takes_constants(layer: Any) -> bool:
    """Whether a constant input gives every output position the same: there is a bias, and no zeros are padded."""
    if bias_of(layer) is None:
        return False
    padded = getattr(layer, "padding_mode", "") == "zeros" and any(layer._reversed_padding_repeated_twice)
    return not padded


def _picked(layer: nn.Module, arriving: Tensor) -> Tensor:
    """Of the inputs that arrive the ones to keep: those with a weight, where enough are without; at least one."""
    wanted = arriving & read_columns(layer) if groups_of(layer) == 1 else arriving
    if not bool(wanted.any()):
        wanted = torch.zeros_like(arriving)
        wanted[int(arriving.nonzero()[0])] = True
    gone = int(arriving.sum() - wanted.sum())
    return wanted if gone and gone >= LEAST_PICKED * int(arriving.sum()) else arriving

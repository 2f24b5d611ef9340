"""Units that do nothing, found and counted out: what is left of every layer when they are gone.

A unit (a neuron, a channel) is dead where nobody reads it, or where nothing feeds it, so that it is a constant that the
biases of its readers can take over. Taking one out may leave others dead. All of it is done on a copy in float64, and
believed only where that copy computes the same afterwards, layer by layer, on random inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from taut.core.example import Example
from taut.core.modes import evaluating
from taut.errors import ModelError
from taut.structure.coupling import couple
from taut.structure.flow import MIXING, Flow, flow_of
from taut.structure.narrowing import Cut, Trail, channel_axis, departure, narrowed, trail
from taut.structure.patches import bias_of, groups_of, weight_of
from taut.structure.probing import record_calls
from taut.structure.sameness import PROBES, few, probes_of
from taut.structure.surgery import clone, shallow

PER_CHANNEL = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.PReLU)
"""Layers between others that hold values per channel, and become narrower with these."""

CONSTANT = 1e-12
"""Spread of a channel over samples and positions, as a share of its value, that is still rounding."""

LEAST_PICKED = 0.1
"""Share of a layer's inputs that must be dead before a `Pick` pays, which moves all that are left."""


@dataclass(frozen=True)
class Channels:
    """Channels that layers share: what some give, channel by channel, is what others read.

    Attributes:
        size: how many.
        producers, readers: layers that mix channels.
        through: layers between, with values per channel.
        foreign: of the readers those that may read them times, or plus, something that other runs have otherwise.
    """

    size: int
    producers: tuple[str, ...]
    readers: tuple[str, ...]
    through: tuple[str, ...]
    foreign: frozenset[str] = frozenset()


def compact(model: nn.Module, example: Example, names: Sequence[str]) -> dict[str, Cut]:
    """What is left of the named layers when everything dead is taken out; layers that stay as they are are missing.

    Where the whole does not compute the same in float64, the shared channels that are to blame are looked for. A few
    samples of the example do, unless the model cannot run on so few.

    Args:
        model: is not changed.
        example: how it is called.
        names: Linear layers, convolutions, and batch norms and PReLUs with values per channel.
    """
    mixing = [name for name in names if isinstance(model.get_submodule(name), MIXING)]
    for part in dict.fromkeys((few(example), example)):
        before = _reference(model, part, mixing)
        if before:
            search = _Search(model, part, before, mixing)
            found = shared_channels(model, part, names)
            if not search.add([], found) and found:
                search.departs([])
            return search.cuts
    return {}


def uncalled(model: nn.Module, example: Example) -> tuple[str, ...]:
    """The layers that the example does not call: they may read any channels, so that all of these stay."""
    try:
        return flow_of(model, few(example)).uncalled
    except ModelError:
        return flow_of(model, example).uncalled


Reference = list[tuple[Any, Trail]]
"""Probes, and what the layers of the model gave for each."""


def _reference(model: nn.Module, example: Example, mixing: Sequence[str]) -> Reference | None:
    """The probes that the model runs on in float64; None where these are too few to tell anything."""
    wide = _wide(model)
    found = [(probe, run) for probe in probes_of(example) if (run := trail(wide, example, probe, mixing)) is not None]
    return found if len(found) >= PROBES else None


class _Search:
    """The shared channels that can be taken out together, all or nearly all, found in few trials.

    Attributes:
        cuts: what is left of the layers, in the last trial that computed the same.
    """

    def __init__(self, model: nn.Module, example: Example, before: Reference, mixing: Sequence[str]) -> None:
        self.model, self.example, self.before, self.mixing = model, example, before, mixing
        self.cuts: dict[str, Cut] = {}

    def add(self, chosen: list[Channels], group: list[Channels]) -> list[Channels]:
        """`chosen` and those of `group` that can be taken out, too.

        What does not go together is tried without the channels that the first layer reads whose output changed, and
        without half of them where that says nothing.
        """
        first = self.departs([*chosen, *group])
        if first is None:
            return [*chosen, *group]
        if len(group) < 2:
            return chosen
        part = [channels for channels in group if first in channels.readers] or group[len(group) // 2 :]
        rest = [channels for channels in group if channels not in part]
        taken = self.add(chosen, rest)
        if len(part) == 1 and len(taken) == len(chosen) + len(rest):
            return taken  # all together are what has just failed
        return self.add(taken, part)

    def departs(self, chosen: Sequence[Channels]) -> str | None:
        """The first layer that computes something else where these are taken out; None where none does."""
        cuts = self._left(chosen)
        if cuts:
            small = narrowed(_wide(self.model), cuts)
            for probe, before in self.before:
                first = departure(small, self.example, probe, before, cuts)
                if first is not None:
                    return first
        self.cuts = cuts
        return None

    def _left(self, chosen: Sequence[Channels]) -> dict[str, Cut]:
        work = _Work(_wide(self.model), self.example, [probe for probe, _ in self.before], chosen)
        work.settle()
        return work.cuts(self.mixing)


def _wide(model: nn.Module) -> nn.Module:
    return clone(model).double()


# Which channels can be taken out.


def shared_channels(model: nn.Module, example: Example, names: Sequence[str]) -> list[Channels]:
    """The channels that can be taken out: all that give, read or pass them are among `names`, and called once.

    Whoever reads them must do so through operations that treat channels alike, and each on its own; and no tensor may
    be shared with another layer.
    """
    flow = flow_of(model, example)
    if not flow.whole:  # a layer that the example does not call may read them, too
        return []
    mixing = [name for name in names if isinstance(model.get_submodule(name), MIXING)]
    links = couple(model, example, mixing, flow)
    reading, giving = dict(zip(mixing, links[::2], strict=True)), dict(zip(mixing, links[1::2], strict=True))
    alone = _alone(model, example, names)
    found = []
    for number in dict.fromkeys(giving.values()):
        producers = tuple(name for name in mixing if giving[name] == number)
        readers = tuple(name for name in mixing if reading[name] == number)
        crossed = {name for producer in producers for name in flow.through.get(producer, ())}
        through = tuple(sorted(name for name in crossed if not _scalar(model.get_submodule(name))))
        size = len(weight_of(model.get_submodule(producers[0])))
        channels = Channels(size, producers, readers, through, frozenset(readers) & flow.foreign)
        if _removable(model, flow, channels, alone):
            found.append(channels)
    return found


def _alone(model: nn.Module, example: Example, names: Iterable[str]) -> set[str]:
    """The layers that are called once, with their input in its place, and share no tensor."""
    calls, keywords = record_calls(model, example)
    held = Counter(t.data_ptr() for module in model.modules() for t in _own(module))
    once = (name for name in names if len(calls.get(name, ())) == 1 and name not in keywords)
    return {name for name in once if all(held[t.data_ptr()] == 1 for t in _own(model.get_submodule(name)))}


def _own(module: nn.Module) -> list[Tensor]:
    return [t for t in (*module.parameters(recurse=False), *module.buffers(recurse=False)) if t.numel()]


def _scalar(module: nn.Module) -> bool:
    """A PReLU with one slope for all channels."""
    return isinstance(module, nn.PReLU) and module.num_parameters == 1


def _removable(model: nn.Module, flow: Flow, channels: Channels, alone: set[str]) -> bool:
    read_by = {reader for producer in channels.producers for reader in flow.readers.get(producer, ())}
    if channels.size < 2 or not read_by or read_by != set(channels.readers) or read_by & (flow.mixed | flow.sharing):
        return False
    if not {*channels.producers, *channels.readers, *channels.through} <= alone:
        return False
    between = [model.get_submodule(name) for name in channels.through]
    return all(type(m) in PER_CHANNEL and len(weight_of(m)) % channels.size == 0 for m in between)


# What is dead.


class _Work:
    """A float64 copy in which dead units are silenced one after the other; it keeps computing the same."""

    def __init__(self, wide: nn.Module, example: Example, probes: list[Any], kinds: Sequence[Channels]) -> None:
        self.wide, self.example, self.probes, self.kinds = wide, example, probes, kinds
        self.dead = [torch.zeros(channels.size, dtype=torch.bool) for channels in kinds]
        self.spared: list[int | None] = [None for _ in kinds]
        self.folded: set[str] = set()

    def settle(self) -> None:
        """Until taking out what is dead leaves nothing else dead."""
        moved = True
        while moved:
            found = [self._silence_unread(place) for place in range(len(self.kinds))]
            moved = any(found) or self._fold_constants()

    def _layer(self, name: str) -> Any:
        return self.wide.get_submodule(name)

    def _read(self, channels: Channels) -> Tensor:
        """Which units some reader has a weight for."""
        sides = [read_columns(self._layer(name)).reshape(channels.size, -1).any(1) for name in channels.readers]
        return torch.stack(sides).any(0)

    def _fed(self, channels: Channels) -> Tensor:
        """Which units have a weight of some producer."""
        sides = [(self._layer(name).weight != 0).flatten(1).any(1).cpu() for name in channels.producers]
        return torch.stack(sides).any(0)

    def _silence_unread(self, place: int) -> bool:
        """The units that nobody reads: their rows become zero. Where none is left, one stays for its width alone."""
        dying = ~self._read(self.kinds[place]) & ~self.dead[place]
        if not bool(dying.any()):
            return False
        self.dead[place] |= dying
        if bool(self.dead[place].all()):
            self.spared[place] = int(dying.nonzero()[0])
        self._silence(place, dying)
        return True

    def _silence(self, place: int, units: Tensor) -> None:
        for name in self.kinds[place].producers:
            layer = self._layer(name)
            layer.weight.data[units.to(layer.weight.device)] = 0
            if bias_of(layer) is not None:
                layer.bias.data[units.to(layer.bias.device)] = 0

    def _fold_constants(self) -> bool:
        """The units that nothing feeds: the readers' biases take over what they are. One unit always stays."""
        asked = {
            place: candidates
            for place, channels in enumerate(self.kinds)
            if bool((candidates := ~self._fed(channels) & ~self.dead[place]).any())
        }
        values = self._values({name for place in asked for name in self.kinds[place].readers}) if asked else {}
        moved = False
        for place, candidates in asked.items():
            units = candidates & self._foldable(self.kinds[place], values)
            if bool((self.dead[place] | units).all()):
                units[int(units.nonzero()[0])] = False
            if bool(units.any()):
                self._fold(place, units, values)
                moved = True
        return moved

    def _values(self, names: set[str]) -> dict[str, Tensor]:
        """What every input of the named layers always is; NaN where it is not constant."""
        copied = shallow(self.wide)
        low: dict[str, Tensor] = {}
        high: dict[str, Tensor] = {}

        def note(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                axis = channel_axis(module, args[0])
                rows = args[0].movedim(axis, 0).reshape(args[0].shape[axis], -1)
                low[name] = torch.minimum(low.get(name, rows.amin(1)), rows.amin(1))
                high[name] = torch.maximum(high.get(name, rows.amax(1)), rows.amax(1))

            return hook

        for name in names:
            copied.get_submodule(name).register_forward_pre_hook(note(name))
        with evaluating(copied), torch.no_grad():
            for probe in self.probes:
                self.example.run(copied, probe)
        return {name: _constant(low[name], high[name]).cpu() for name in names}

    def _foldable(self, channels: Channels, values: Mapping[str, Tensor]) -> Tensor:
        """Which units every reader can do without: it does not read them, or reads a constant that it can hold.

        Times a mask, say, only zero is sure to be constant: the masks of the probes are not all that there are.
        """
        able = torch.ones(channels.size, dtype=torch.bool)
        for name in channels.readers:
            layer, found = self._layer(name), values[name]
            held = _takes_constants(layer) and name not in channels.foreign
            known = found.isfinite() if held else found == 0
            able &= (known | ~read_columns(layer)).reshape(channels.size, -1).all(1)
        return able

    def _fold(self, place: int, units: Tensor, values: Mapping[str, Tensor]) -> None:
        for name in self.kinds[place].readers:
            layer = self._layer(name)
            columns = _spread(units, layer.weight.shape[1]) & read_columns(layer)
            index = columns.nonzero().flatten().to(layer.weight.device)
            taken = values[name].to(layer.weight.device)[index]
            if bool((taken != 0).any()):
                summed = layer.weight.data[:, index].reshape(len(layer.weight), len(index), -1).sum(-1)
                layer.bias.data += summed @ taken
                self.folded.add(name)
            layer.weight.data[:, index] = 0
        self.dead[place] |= units
        self._silence(place, units)

    def cuts(self, mixing: Sequence[str]) -> dict[str, Cut]:
        """What is left of every layer that does not stay as it is."""
        found: dict[str, Cut] = {}
        outputs: dict[str, tuple[Tensor, Tensor]] = {}
        inputs: dict[str, Tensor] = {}
        for channels, dead, spared in zip(self.kinds, self.dead, self.spared, strict=True):
            kept = ~dead
            if spared is not None:
                kept[spared] = True
            outputs |= dict.fromkeys(channels.producers, (kept, ~dead))
            inputs |= dict.fromkeys(channels.readers, kept)
            for name in channels.through:
                left = _spread(kept, len(self._layer(name).weight)).nonzero().flatten()
                found[name] = Cut(left, left)
        for name in mixing:
            found[name] = self._cut(name, outputs.get(name), inputs.get(name))
        return {name: cut for name, cut in found.items() if self._narrower(name, cut)}

    def _cut(self, name: str, outputs: tuple[Tensor, Tensor] | None, inputs: Tensor | None) -> Cut:
        layer = self._layer(name)
        every = torch.ones(len(layer.weight), dtype=torch.bool)
        kept, live = (every, every) if outputs is None else outputs
        width = layer.weight.shape[1]
        arriving = torch.ones(width, dtype=torch.bool) if inputs is None else _spread(inputs, width)
        wanted = _picked(layer, arriving)
        return Cut(
            kept.nonzero().flatten(),
            wanted.nonzero().flatten(),
            None if torch.equal(wanted, arriving) else wanted[arriving].nonzero().flatten(),
            layer.bias.data if name in self.folded else None,
            live[kept],
        )

    def _narrower(self, name: str, cut: Cut) -> bool:
        weight = self._layer(name).weight
        return len(cut.outputs) < len(weight) or (weight.ndim > 1 and len(cut.inputs) < weight.shape[1])


def read_columns(layer: nn.Module) -> Tensor:
    """Which inputs a layer has a weight for that is not zero."""
    return (weight_of(layer) != 0).transpose(0, 1).flatten(1).any(1).cpu()


def _constant(low: Tensor, high: Tensor) -> Tensor:
    still = high - low <= CONSTANT * torch.maximum(low.abs(), high.abs())
    return torch.where(still, low, torch.full_like(low, float("nan")))


def _takes_constants(layer: Any) -> bool:
    """Whether a constant input gives every output position the same: there is a bias, and no zeros are padded."""
    if bias_of(layer) is None:
        return False
    padded = getattr(layer, "padding_mode", "") == "zeros" and any(layer._reversed_padding_repeated_twice)
    return not padded


def _spread(units: Tensor, width: int) -> Tensor:
    """A mask over units as one over values: behind a flatten every channel has several in a row."""
    return units.repeat_interleave(width // len(units))


def _picked(layer: nn.Module, arriving: Tensor) -> Tensor:
    """Of the inputs that arrive the ones to keep: those with a weight, where enough are without; at least one."""
    wanted = arriving & read_columns(layer) if groups_of(layer) == 1 else arriving
    if not bool(wanted.any()):
        wanted = torch.zeros_like(arriving)
        wanted[int(arriving.nonzero()[0])] = True
    gone = int(arriving.sum() - wanted.sum())
    return wanted if gone and gone >= LEAST_PICKED * int(arriving.sum()) else arriving

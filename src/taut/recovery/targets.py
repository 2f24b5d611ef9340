"""What every layer of the original gives, and has to give in the compressed model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from taut.core.data import collect
from taut.core.modes import evaluating
from taut.errors import ModelError
from taut.recovery.batch_norm import Norm, pooled
from taut.recovery.norms_seen import NormsSeen, affine
from taut.recovery.samples import ROWS, ROWS_PER_COLUMN, affordable, joined, refit_samples
from taut.recovery.successors import Following, Follows
from taut.recovery.verification import unseen
from taut.structure.collecting import FULL_LIMIT
from taut.structure.coverage import seeded
from taut.structure.narrowing import Cut
from taut.structure.padding import Padding
from taut.structure.patches import CONVOLUTIONS, choose, fan_in, groups_of, output_rows, positions, row_budget
from taut.structure.surgery import shallow
from taut.types import Network


@dataclass(frozen=True)
class Seen:
    """A layer's output in one batch of the original.

    Attributes:
        index: chosen output positions.
        rows: (g, n, o), outputs there.
        output: the whole output's shape, on the meta device.
        total: (g, n, o), the sum behind it there; None where there is none.
    """

    index: Tensor
    rows: Tensor
    output: Tensor
    total: Tensor | None = None


@dataclass(frozen=True)
class Target:
    """What a layer gave in the original model.

    Attributes:
        seen: batch by batch, by the batch's number.
        norm: the batch norm directly behind it, which takes care of the mean, or "".
        follows: the sum or the ReLU behind it, None where there is none for certain.
    """

    seen: Mapping[int, Seen]
    norm: str = ""
    follows: Follows | None = None

    @property
    def rows(self) -> Tensor:
        """(g, n, o), outputs at the chosen positions of all batches."""
        return together([seen.rows for seen in self.seen.values()])

    def of(self, batches: Collection[int]) -> Target:
        """In these batches alone."""
        if set(self.seen) <= set(batches):
            return self
        return self._with({number: seen for number, seen in self.seen.items() if number in batches})

    def thinned(self, most: int) -> Target:
        """At most so many positions, evenly spread over all batches."""
        counts = [len(seen.index) for seen in self.seen.values()]
        chosen = spread(sum(counts), most)
        thin: dict[int, Seen] = {}
        start = 0
        for (number, seen), count in zip(self.seen.items(), counts, strict=True):
            part = chosen[(chosen >= start) & (chosen < start + count)] - start
            start += count
            if len(part):
                thin[number] = Seen(seen.index[part], seen.rows[:, part.to(seen.rows.device)], seen.output)
        return replace(self, seen=thin, follows=None)

    def kept(self, module: nn.Module, cut: Cut | None) -> Target:
        """For a layer (`module` as it is now) that lost outputs."""
        if cut is None:
            return self
        columns = cut.outputs

        def keep(t: Tensor) -> Tensor:
            flat = t.transpose(0, 1).reshape(t.shape[1], -1)[:, columns.to(t.device)]
            return flat.reshape(t.shape[1], groups_of(module), -1).transpose(0, 1).contiguous()

        left = {
            number: replace(seen, rows=keep(seen.rows), total=None if seen.total is None else keep(seen.total))
            for number, seen in self.seen.items()
        }
        return replace(self, follows=None if self.follows is None else self.follows.narrowed(keep))._with(left)

    def _with(self, seen: Mapping[int, Seen]) -> Target:
        """With other batches, and the sums of these."""
        follows = self.follows
        if follows is not None and follows.total is not None:
            follows = replace(follows, total=together([one.total for one in seen.values() if one.total is not None]))
        return replace(self, seen=seen, follows=follows)


def together(parts: Sequence[Tensor]) -> Tensor:
    """Rows (g, n, o) of several batches, one after the other."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


def spread(total: int, most: int) -> Tensor:
    """At most `most` of `total` positions, evenly spread."""
    return torch.linspace(0, total - 1, min(total, most)).round().long()


@dataclass(frozen=True)
class Targets:
    """What a refit aims at.

    Attributes:
        batches: inputs, as few as the model takes. layers: by name. norms: what batch norms saw, by name.
        orders: batch by batch, layers and norms in the order in which they ran.
    """

    batches: Sequence[Any]
    layers: Mapping[str, Target]
    norms: Mapping[str, Norm]
    orders: Sequence[Sequence[str]]

    def of(self, names: Iterable[str]) -> Targets:
        """Of these layers, and of all norms."""
        return replace(self, layers={name: self.layers[name] for name in names if name in self.layers})


class Noted:
    """Batches, and the targets of one model on them, noted once for all plans that are tried on it.

    Attributes:
        data: the calibration batches.
    """

    def __init__(self, data: Any, net: Network, names: Sequence[str] | None = None) -> None:
        """Nothing is noted yet; `names` are the layers that will be asked for, None for all that can be solved."""
        self.data, self.net = data, net
        self.names = solvable(net) if names is None else list(names)
        self._targets: Targets | None = None

    def of(self, model: nn.Module, names: Sequence[str]) -> Targets:
        """What `note_targets` finds for some layers."""
        if self._targets is None:
            self._targets = self._note(model)
        return self._targets.of(names)

    def _note(self, model: nn.Module) -> Targets:
        example = self.net.example
        apart = affordable(example, collect(example, self.data, refit_samples(self.net)))
        batches = joined(example, model, apart)
        try:
            return note_targets(model, self.net, self.names, batches)
        except ModelError:
            if len(batches) == len(apart):
                raise
            return note_targets(model, self.net, self.names, apart)  # so many samples at once are too many for it


def solvable(net: Network) -> list[str]:
    """Layers that a refit can solve: one call, and nothing that forbids a change."""
    return [layer.name for layer in net.layers if layer.skip is None and len(layer.calls) == 1]


def note_targets(model: nn.Module, net: Network, names: Sequence[str], batches: Sequence[Any]) -> Targets:
    """The original's outputs at chosen positions of every named layer, and what its batch norms see.

    Args:
        model: the original.
        net: of it.
        names: layers; those that some batch calls more than once are left out.
        batches: inputs, each of which is run by itself.
    """
    samples = [net.example.samples.size(inputs) for inputs in batches]
    proofs: Proofs = {}
    notes = [
        _note(model, net, names, inputs, number, sum(samples) / size, proofs)
        for number, (inputs, size) in enumerate(zip(batches, samples, strict=True))
    ]
    repeated = {name for note in notes for name in note.repeated}
    layers = {
        name: _merged([note.layers[name] for note in notes if name in note.layers])
        for name in names
        if name not in repeated and any(name in note.layers for note in notes)
    }
    norms: dict[str, Norm] = {}
    for name in dict.fromkeys(name for note in notes for name in note.norms):
        parts = [note.norms[name] for note in notes if name in note.norms]
        if None not in parts and sum(part[0] for part in parts if part) > 1:
            norms[name] = pooled([part for part in parts if part is not None])
    layers = {n: t if t.norm in {"", *norms} else replace(t, norm="", follows=None) for n, t in layers.items()}
    return Targets(batches, layers, norms, [note.order for note in notes])


def _merged(parts: Sequence[Target]) -> Target:
    """One layer's targets of several batches; of what follows it, what is the same in all."""
    first = parts[0]
    if len(parts) == 1:
        return first
    seen = {number: one for part in parts for number, one in part.seen.items()}
    norms = {part.norm for part in parts}
    follows = first.follows
    if len(norms) > 1 or any(not _follow_alike(first.follows, part.follows) for part in parts):
        follows = None
    return replace(first, norm=first.norm if len(norms) == 1 else "", follows=follows)._with(seen)


def _follow_alike(a: Follows | None, b: Follows | None) -> bool:
    if a is None or b is None:
        return a is b
    return (a.partner, a.rectified, a.total is None) == (b.partner, b.rectified, b.total is None)


Proofs = dict[frozenset[Any], frozenset[str]]
"""What follows layers -> those of which it is proved that their negative outputs are not used: once for all batches."""


@dataclass
class _Note:
    """What one batch told: as `Targets`, the norms' moments still with their counts, None where they say nothing."""

    layers: dict[str, Target]
    norms: dict[str, tuple[int, Tensor, Tensor] | None]
    order: list[str]
    repeated: set[str]


def _note(  # noqa: PLR0913, PLR0917 - one batch of all that `note_targets` is given
    model: nn.Module,
    net: Network,
    names: Sequence[str],
    inputs: Any,
    number: int,
    share: float,
    proofs: Proofs,
) -> _Note:
    """One run of the original; `share` is how many times more samples all batches hold."""
    copied = shallow(model)
    seen: dict[str, Seen] = {}

    def rows(name: str, t: Tensor, index: Tensor | None = None) -> Tensor:
        chosen = seen[name].index if index is None else index
        return output_rows(copied.get_submodule(name), t, chosen).to(seen[name].rows)

    watch, padding = Following(rows), Padding(net.example, inputs)
    norms = NormsSeen(watch, padding)
    note = _Note({}, {}, [], set())
    seeds = {layer.name: rank + 1_000_003 * number for rank, layer in enumerate(net.layers)}
    for name in names:
        layer = copied.get_submodule(name)
        layer.register_forward_pre_hook(_entered(name, watch))
        hook = _noted(name, seeds[name], share, seen, note, watch, norms, padding)
        layer.register_forward_hook(hook, prepend=True)
    for name, module in copied.named_modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            module.register_forward_pre_hook(norms.before(name, note.order))
            module.register_forward_hook(norms.behind(name, seen))
    with evaluating(copied), seeded(number), watch:
        watch.returned(net.example.run(copied, inputs))
    direct = norms.direct()
    targets = {name: Target({number: one}, direct.get(name, "")) for name, one in seen.items()}
    follows = {name: _follows(copied, name, watch, t) for name, t in targets.items()}
    rectified = {name: f for name, f in follows.items() if f is not None and f.rectified}
    key = frozenset((name, f.partner, f.total is None) for name, f in rectified.items())
    if key not in proofs:
        proofs[key] = frozenset(unseen(model, net, inputs, rectified))
    for name in rectified.keys() - proofs[key]:
        follows[name] = rectified[name].seen()
    for name, target in targets.items():
        total = None if (f := follows[name]) is None else f.total
        held = {number: replace(seen[name], total=total)}
        note.layers[name] = replace(target, seen=held, follows=follows[name])
    note.norms.update(norms.moments)
    return note


def _entered(name: str, watch: Following) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            watch.enter(name, args[0])

    return hook


def _noted(  # noqa: PLR0913, PLR0917 - a hook over all that one run fills
    name: str,
    seed: int,
    share: float,
    seen: dict[str, Seen],
    note: _Note,
    watch: Following,
    norms: NormsSeen,
    padding: Padding,
) -> Any:
    """A hook that notes outputs of a layer at chosen positions."""

    def hook(module: nn.Module, _: Any, output: Tensor) -> None:
        with watch.looking_away():
            if name in seen:
                note.repeated.add(name)
                return
            note.order.append(name)
            real = padding.rows(name, module, output)
            total = positions(module, output) if real is None else len(real)
            wanted = row_budget(max(fan_in(module), 1), round(total * share), ROWS_PER_COLUMN)
            wanted = min(round(total * share), ROWS) if fan_in(module) > FULL_LIMIT else wanted
            index = choose(total, max(1, round(wanted / share)), seed)
            index = index if real is None else real[index]
            shape = torch.empty(output.shape, device="meta")
            seen[name] = Seen(index, output_rows(module, output, index), shape)
            if isinstance(module, CONVOLUTIONS) or output.ndim == 2:  # else a norm's channels are another axis
                norms.last = name, output
            watch.leave(name, output)
            watch.layer(name, output)

    return hook


def _follows(model: nn.Module, name: str, watch: Following, target: Target) -> Follows | None:
    """What the original makes of a layer's output, in numbers."""
    certain = watch.certain(name)
    if certain is None or certain[0].norm not in {"", target.norm} or not target.rows.is_floating_point():
        return None
    trail, rectified = certain
    norm = model.get_submodule(trail.norm) if trail.norm else None
    return Follows(*affine(norm, target.rows), trail.total, trail.partner, rectified)

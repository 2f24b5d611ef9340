"""What can be done to a model, layer by layer: by which methods, what stands in the way, and what to change."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from taut.core.data import collect
from taut.core.modes import quietly
from taut.core.showing import shown
from taut.core.text import count, numbered, shape, table
from taut.errors import CallError, ModelError
from taut.methods import METHODS
from taut.methods.channels.heads import with_heads
from taut.planning.plain_form import in_plain_form
from taut.report.remedies import remedy
from taut.structure.calling import read_example
from taut.structure.channels.groups import Coupling
from taut.structure.surgery import shallow
from taut.structure.tracing import trace
from taut.structure.wrappers import unwrapped
from taut.types import Group, Layer, Looking, Method, Network, shrinks

SAMPLES = 64
"""Calibration samples that are looked at for other paths through the model."""

ONE_BY_ONE = 40
"""Layers up to which each has a row of its own."""

LOW_RANK, CHANNELS, EITHER, MASKS = "low rank", "channels", "either", "masks"

TOO_SMALL = "no rank makes it smaller"


@dataclass(frozen=True)
class Reach:
    """What can be done to a layer.

    Attributes:
        layer: as it was traced.
        default: methods of low rank, tried unasked, that can make it smaller. named: those that do so where they are
            named; neither has channels, which `outputs` and `inputs` tell of.
        masks: methods that set weights of it to zero.
        outputs, inputs: how many of its channels may go with those around it, of how many; a layer that holds values
            per channel between others, as a norm, has outputs alone.
        plain_form: the method that gives it its plain form before all others, without being asked.
        blocked: why none of `default` can. remedy: what to do about it.
        pinned: why (some of) its output channels stay. unpinning: what to do about it.
    """

    layer: Layer
    default: tuple[str, ...] = ()
    named: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()
    outputs: tuple[int, int] = (0, 0)
    inputs: tuple[int, int] = (0, 0)
    plain_form: str | None = None
    blocked: str | None = None
    pinned: str | None = None

    @property
    def remedy(self) -> str | None:
        """What to change so that low rank can."""
        return None if self.blocked is None else remedy(self.blocked)

    @property
    def unpinning(self) -> str | None:
        """What to change so that its channels may go."""
        return None if self.pinned is None else remedy(self.pinned)

    @property
    def narrows(self) -> bool:
        """Whether channels may go on one of its sides."""
        return bool(self.outputs[0] or self.inputs[0])

    def within(self, way: str) -> bool:
        """Whether a way of making networks smaller reaches it."""
        ways = {LOW_RANK: bool(self.default), CHANNELS: self.narrows, MASKS: bool(self.masks)}
        return ways.get(way, bool(self.default) or self.narrows)


@dataclass(frozen=True)
class Inspection:
    """What can be done to a network.

    Attributes:
        network: as it was traced.
        layers: what can be done to each.
        note: why channels could not be followed, or None.
    """

    network: Network
    layers: tuple[Reach, ...]
    note: str | None = None

    def share(self, way: str, key: str) -> float:
        """Share of "macs" or "params" in the layers that a way reaches: "low rank", "channels", "either" or "masks"."""
        whole = getattr(self.network.cost, key)
        return sum(getattr(reach.layer, key) for reach in self.layers if reach.within(way)) / whole if whole else 0.0

    def __str__(self) -> str:
        """A row for every layer (of long networks, for layers alike), the reasons below, and what is within reach."""
        reasons: dict[str, int] = {}
        rows = [_row(alike, reasons) for alike in _alike(self.layers)]
        cost = self.network.cost
        rows.append(("total", "", count(cost.params), count(cost.macs), "", ""))
        headers = ("layer", "kind", "params", "MACs", "made smaller by", "what stands in the way")
        parts = [table(headers, rows, right=(2, 3))]
        if reasons:
            parts.append("\n".join(f"[{number}] {why}\n    -> {remedy(why)}" for why, number in reasons.items()))
        parts.append(table(("within reach", "MACs", "params", "layers"), self._shares(), right=(1, 2, 3)))
        parts += [note for note in (self.note, *self.network.uncounted) if note is not None]
        return "\n\n".join(parts)

    def _shares(self) -> list[tuple[str, ...]]:
        names = {
            LOW_RANK: f"by low rank ({', '.join(_defaults())})",
            CHANNELS: "by channels (unasked with enough calibration samples)",
            EITHER: "by either",
            MASKS: "by masks (zeros in dense layers)",
        }
        return [
            (
                name,
                f"{self.share(way, 'macs'):.1%}",
                f"{self.share(way, 'params'):.1%}",
                f"{sum(reach.within(way) for reach in self.layers)} of {len(self.layers)}",
            )
            for way, name in names.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        layers = [
            {
                "name": reach.layer.name,
                "kind": reach.layer.kind,
                "params": reach.layer.params,
                "macs": reach.layer.macs,
                "default": list(reach.default),
                "named": list(reach.named),
                "plain_form": reach.plain_form,
                "masks": list(reach.masks),
                "outputs_free": reach.outputs[0],
                "outputs": reach.outputs[1],
                "inputs_free": reach.inputs[0],
                "inputs": reach.inputs[1],
                "blocked": reach.blocked,
                "remedy": reach.remedy,
                "pinned": reach.pinned,
                "unpinning": reach.unpinning,
            }
            for reach in self.layers
        ]
        shares = {
            way.replace(" ", "_"): {key: self.share(way, key) for key in ("macs", "params")}
            for way in (LOW_RANK, CHANNELS, EITHER, MASKS)
        }
        cost = self.network.cost
        notes = [note for note in (self.note, *self.network.uncounted) if note is not None]
        return {"params": cost.params, "macs": cost.macs, "within_reach": shares, "layers": layers, "notes": notes}

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"


@shown
@quietly
def inspect(model: nn.Module, example: Any, data: Any = None) -> Inspection:
    """Say of every layer what can be done to it, what stands in the way and what to change; nothing is decomposed.

    Args:
        model: is not changed.
        example: an input that fixes how the model is called.
        data: calibration batches, whose other paths through the model count, too; None: the example alone.

    Raises:
        CallError: `model` is no module.
        ModelError: the model cannot be run.
        DataError: the example or a batch is of no use.
    """
    model = unwrapped(model)
    call = read_example(model, example)
    network = trace(model, call, None if data is None else collect(call, data, SAMPLES))
    plain, base, steps = in_plain_form(model, network)
    note = None
    try:
        channels = with_heads(shallow(plain), base.example)
    except ModelError as error:
        channels, note = Coupling(()), f"Channels could not be followed: {error}"
    first = {name: step.method for step in steps for name in step.layers}
    layers = tuple(_reaches(network, base, channels, first))
    return Inspection(network, layers, note)


def _reaches(network: Network, base: Network, channels: Coupling, first: Mapping[str, str]) -> Iterator[Reach]:
    """What can be done to every layer, by its own name; of a module that becomes several, to each of these.

    Args:
        network: as it was traced.
        base: with every layer in its plain form.
        channels: which of its channels go together.
        first: layers -> the methods that gave them that form.
    """
    known = {layer.name: layer for layer in network.layers}
    for layer in base.layers:
        whole = next((name for name in first if f"{layer.name}.".startswith(f"{name}.")), layer.name)
        own = known.get(whole, layer)
        if own.summed and not own.rows and layer.name == whole:
            continue  # what is left of a module whose weight is a layer
        reach = _reach(_groups(base, layer), channels, first.get(whole))
        yield replace(reach, layer=own if (own.weight and not own.rows) or whole not in first else layer)


def _defaults() -> list[str]:
    return [name for name, kind in METHODS.items() if kind.default]


def _groups(base: Network, layer: Layer) -> list[Group]:
    """What a method may take of which a layer is part: itself first, and all that hold its weight."""
    return [Group((layer,)), *([base.group(layer.tied)] if layer.tied else [])]


def _reach(groups: Sequence[Group], channels: Coupling, plain_form: str | None) -> Reach:
    """What can be done to a layer in its plain form; `plain_form` is the method that gives it that."""
    group = groups[0]
    layer = group.layer
    reach = Reach(layer, plain_form=plain_form)
    found = ((name, _takes(kind(), one)) for name, kind in METHODS.items() for one in groups)
    takers = {name: smaller for name, smaller in found if smaller is not None}
    default = tuple(name for name in _defaults() if takers.get(name))
    masks = tuple(name for name, smaller in takers.items() if smaller and METHODS[name].masks)
    named = tuple(name for name, smaller in takers.items() if smaller and name not in {*default, *masks, CHANNELS})
    blocked = None
    if not default:
        blocked = layer.reason or (TOO_SMALL if any(name in takers for name in _defaults()) else _refusal(group))
    sides = {"out": _free(channels, layer.name, ("out", "through")), "in": _free(channels, layer.name, ("in",))}
    return replace(
        reach,
        default=default,
        named=named,
        masks=masks,
        outputs=sides["out"],
        inputs=sides["in"],
        blocked=None if blocked is None else blocked.replace(f"'{layer.name}'", "it"),
        pinned=channels.stays.get(layer.name),
    )


def _refusal(group: Group) -> str:
    """What the first of the default methods says against a layer."""
    return str(next(reason for name in _defaults() if (reason := METHODS[name]().refuses(group)) is not None))


def _takes(method: Method, group: Group) -> bool | None:
    """Whether a method can make the layer smaller; None where it does not take it at all."""
    if method.refuses(group) is not None:
        return None
    if method.masks or isinstance(method, Looking) or not method.rank_settings:
        return True
    try:
        least = replace(method, **dict.fromkeys(method.rank_settings, 1))  # type: ignore[type-var]
        return shrinks(least, group)
    except (CallError, TypeError, ValueError):  # what its ranks are is seen with the weights
        return True


def _free(channels: Coupling, layer: str, ends: Sequence[str]) -> tuple[int, int]:
    """How many channels of a side may go, and how many there are; (0, 0) where none may."""
    members = [m for group in channels.groups for m in group.members if m.layer == layer and m.end in ends]
    return sum(m.index.numel() for m in members), max((m.width for m in members), default=0)


def _alike(layers: Sequence[Reach]) -> Iterable[tuple[Reach, ...]]:
    """Layers that share a row: of long networks those to which the same can be done, for the same reasons."""
    if len(layers) <= ONE_BY_ONE:
        return [(reach,) for reach in layers]
    rows: dict[tuple[Any, ...], list[Reach]] = {}
    for reach in layers:
        ways = (reach.default, reach.outputs[0] > 0, reach.inputs[0] > 0, reach.plain_form, reach.blocked, reach.pinned)
        rows.setdefault((reach.layer.kind, *ways), []).append(reach)
    return [tuple(row) for row in rows.values()]


def _row(alike: Sequence[Reach], reasons: dict[str, int]) -> tuple[str, ...]:
    first = alike[0]
    name = first.layer.name or "(model)"
    if len(alike) > 1:
        name = f"{numbered(len(alike), 'layer')}, {name} ... {alike[-1].layer.name}"
    ways = [*first.default] if first.plain_form is None else [f"{first.plain_form} first", *first.default]
    if first.narrows:
        sides = [_side(alike, "outputs", "out"), _side(alike, "inputs", "in")]
        ways.append(f"channels ({', '.join(side for side in sides if side)})")
    against = []
    for what, why in ((LOW_RANK, first.blocked), (CHANNELS, first.pinned)):
        if why is not None:
            against.append(f"{what} [{reasons.setdefault(why, len(reasons) + 1)}]")
    return (
        name,
        f"{first.layer.kind} {shape(first.layer.weight)}".strip() if len(alike) == 1 else first.layer.kind,
        count(sum(reach.layer.params for reach in alike)),
        count(sum(reach.layer.macs for reach in alike)),
        ", ".join(ways),
        ", ".join(against),
    )


def _side(alike: Sequence[Reach], attribute: str, word: str) -> str:
    free, width = (sum(getattr(reach, attribute)[place] for reach in alike) for place in (0, 1))
    return f"{free} of {width} {word}" if free else ""

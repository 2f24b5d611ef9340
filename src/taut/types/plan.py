"""A plan: which layers, which method with which settings, and why; plain data."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Set
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, TypeAdapter, ValidationError, model_serializer

from taut.core.text import count, fold, numbered, table, unique_keys
from taut.errors import CallError
from taut.types.budget import FORBID, Cost
from taut.types.keep import AS_ASKED
from taut.types.method import METHODS
from taut.types.network import WHOLE, Group, Network

Numbers = Annotated[dict[str, list[int]], Field(min_length=1)]
"""Whole numbers by name: an empty mapping says nothing."""

Setting = bool | int | float | str | list[int] | list[float] | Numbers | None
"""A value that a method's settings may hold: what JSON can carry."""

KeptCode = Literal["kept", "skipped", "rolled back", "nothing to do", "taken out", "as asked"]
"""Why a layer stays: the plan prefers it so, no method may touch it, a rewrite failed, a step found nothing to do, the
user took it out, or wants it left alone."""

FEW = 3
"""Layers that a table names one by one."""

NOT_PREDICTED = "not predicted"
"""The unit of damage of plans made by hand."""


@dataclass(frozen=True)
class Step:
    """One rewrite: which layers, which method with which settings, and why.

    Attributes:
        layers: names in the ORIGINAL model.
        method: name in `taut.methods.METHODS`.
        settings: the method's fields; missing ones take their defaults.
        group: shapes of the layers as this step finds them (filled by `Plan.of` and `taut.plan`).
        allow_growth: apply even though nothing shrinks.
        before, after: cost of the layers.
        damage: predicted, in the plan's unit.
        reason: why this one was chosen.
        keep: layers that are left alone when the step is carried out: no refit changes their weights either.
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID
    layers: tuple[str, ...]
    method: str
    settings: dict[str, Setting] = field(default_factory=dict)
    group: Group | None = None
    allow_growth: bool = False
    before: Cost | None = None
    after: Cost | None = None
    damage: float | None = None
    reason: str = ""
    keep: tuple[str, ...] = ()

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As plain data, `keep` only where there is something: what is compared with it may be older."""
        written: dict[str, Any] = write(self)
        if not self.keep:
            del written["keep"]
        return written


@dataclass(frozen=True)
class Kept:
    """A layer that the plan leaves as it is.

    Attributes:
        layer: its name. reason: why, in words. cost: of it. code: why, for programs.
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID
    layer: str
    reason: str
    cost: Cost = field(default_factory=Cost)
    code: KeptCode = "kept"


@dataclass(frozen=True)
class Plan:
    """Steps in the order in which they are applied; a later step sees the network that the earlier ones made.

    Attributes:
        steps: the rewrites.
        kept: layers that stay as they are, with reasons.
        before: cost of the original model. after: predicted cost of the result.
        unit: what `damage` measures: "loss", "relative output error" or "relative weight error".
        floors: layers that may not go below a share of what they were -> that share, as the user wants it; 1 for one
            that is left alone and is there only behind a step that gives another its plain form.
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID
    steps: tuple[Step, ...]
    kept: tuple[Kept, ...] = ()
    before: Cost = field(default_factory=Cost)
    after: Cost = field(default_factory=Cost)
    unit: str = "loss"
    floors: dict[str, float] = field(default_factory=dict)

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As plain data, `floors` only where there are some: what is compared with it may be older."""
        written: dict[str, Any] = write(self)
        if not self.floors:
            del written["floors"]
        return written

    @classmethod
    def of(cls, network: Network, steps: Iterable[Step]) -> Plan:
        """A plan made by hand: the groups of its steps are filled in from the traced network.

        What the network keeps (`Network.keeping`) holds for every step: one over many layers leaves out those that are
        kept, and knows the least of the others. The group of a step stays open that names layers which an earlier step
        makes, as the projections of attention: `apply` fills it.

        Raises:
            CallError: a step names a layer that the network does not have, or changes one that is kept.
        """
        filled: list[Step] = []
        ahead: set[str] = set()
        for step in steps:
            filled.append(_held(network, step, ahead))
            ahead |= _made_by(filled[-1])
        kept = tuple(Kept(la.name, AS_ASKED, la.cost, "as asked") for la in network.layers if la.name in network.kept)
        floors = {name: share for name, share in network.asked.items() if name not in network.kept}
        plan = cls(tuple(filled), kept, before=network.cost, after=network.cost, unit=NOT_PREDICTED, floors=floors)
        plan.check_kept()
        return plan

    @property
    def left_alone(self) -> frozenset[str]:
        """The layers that the user wants left alone."""
        named = {name for step in self.steps for name in step.keep}
        return frozenset(named | {kept.layer for kept in self.kept if kept.code == "as asked"})

    @property
    def shares(self) -> dict[str, float]:
        """What has to stay of layers, as the user wants it; 1 leaves one alone."""
        return {**self.floors, **dict.fromkeys(self.left_alone, 1.0)}

    def check_kept(self) -> None:
        """Refuse steps on layers that the whole plan leaves alone.

        Raises:
            CallError: there is one.
        """
        alone = {kept.layer for kept in self.kept if kept.code == "as asked"}
        alone |= {name for name, share in self.floors.items() if share == 1}
        for step in self.steps:
            blocks = () if step.group is None else (la.block for la in step.group.layers if la.block is not None)
            names = (*step.layers, *(name for block in blocks for name in block.layers))
            both = [name for name in names if name in alone]
            if both and not hasattr(METHODS.get(step.method), "restored"):  # a plain form computes the same
                raise CallError(
                    f"{step.method} does not apply to layer '{both[0]}': {AS_ASKED}. Leave the layer out of the step, "
                    "or keep it no longer."
                )

    def to_json(self) -> str:
        """The plan as JSON, to read, edit and replay."""
        return json.dumps(_schema().dump_python(self, mode="json"), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """The plan that `to_json` wrote, perhaps edited by hand.

        Raises:
            CallError: not JSON, an unknown or repeated key, or a value of the wrong type.
        """
        try:
            return _schema().validate_python(json.loads(text, object_pairs_hook=unique_keys))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise CallError(f"The plan's '{where}' is wrong: {first['msg']}. Got {first['input']!r}.") from None
        except (ValueError, RecursionError) as error:
            raise CallError(f"The plan is not valid JSON: {error}") from None

    def without(self, layers: Iterable[str]) -> Plan:
        """The same plan, the steps on these layers left out; a step over many layers is left out for all of them."""
        drop = set(layers)
        kept = tuple(
            Kept(name, "taken out of the plan", step.before or Cost(), "taken out")
            for step in self.steps
            if drop & set(step.layers)
            for name in step.layers
        )
        return replace(self, steps=tuple(s for s in self.steps if not drop & set(s.layers)), kept=self.kept + kept)

    @property
    def _predicted(self) -> Cost | None:
        """What the result costs; None where nothing was predicted of these steps."""
        return None if self.unit == NOT_PREDICTED and self.steps and self.after == self.before else self.after

    def summary(self) -> str:
        """One line: how many layers became what, and what the whole costs now."""
        changed = Counter(step.method for step in self.steps for _ in step.layers)
        ways = ", ".join(f"{amount} by {method}" for method, amount in changed.items()) or "none"
        after = self._predicted
        costs = f"params {_change(self.before, after, 'params')}, MACs {_change(self.before, after, 'macs')}"
        return f"{numbered(sum(changed.values()), 'layer')} changed ({ways}); {costs}"

    def __str__(self) -> str:
        """A row for every layer: method, settings, cost before and after, damage, reason."""
        rows = [_step_row(step) for step in self.steps]
        after = self._predicted
        rows += [
            (
                kept.layer or WHOLE,
                "keep",
                "",
                _change(kept.cost, kept.cost, "params"),
                _change(kept.cost, kept.cost, "macs"),
                "",
                kept.reason,
            )
            for kept in self.kept
        ]
        rows.append(
            (
                "whole model",
                "",
                "",
                _change(self.before, after, "params"),
                _change(self.before, after, "macs"),
                "" if self.unit == NOT_PREDICTED else f"{sum(step.damage or 0.0 for step in self.steps):.3g}",
                f"damage {'is not predicted' if self.unit == NOT_PREDICTED else f'in units of {self.unit}'}",
            )
        )
        return table(("layer", "method", "settings", "params", "MACs", "damage", "why"), rows, right=(3, 4, 5))


@cache
def _schema() -> TypeAdapter[Plan]:
    """Made once: it takes longer than most plans."""
    return TypeAdapter(Plan)


def _made_by(step: Step) -> set[str]:
    """The layers that there are behind a step that gives others their plain form."""
    layers = () if step.group is None or not hasattr(METHODS.get(step.method), "restored") else step.group.layers
    return {f"{layer.name}.{part}" for layer in layers for part in layer.parts}


def _known(network: Network, step: Step) -> Group:
    """The layers of a step as the network has them.

    Raises:
        CallError: it has none of such a name, or only behind a step that is not there.
    """
    for layer in network.layers:
        inside = [name for name in step.layers if name in {f"{layer.name}.{part}" for part in layer.parts}]
        if inside and all(inside[0] != other.name for other in network.layers):
            raise CallError(
                f"The model has no layer '{inside[0]}' yet: put the step that gives '{layer.name}' its plain form in "
                f"front. It is left alone so far: {layer.skip}."
            )
    return network.group(step.layers, blocks=getattr(METHODS.get(step.method), "takes_blocks", False))


def _held(network: Network, step: Step, ahead: Set[str]) -> Step:
    """The step with its group, as far as the network lets it: what `taut.whole` does with its `keep`.

    Args:
        network: as it was traced.
        step: as it was asked for.
        ahead: the layers that earlier steps make.

    Raises:
        CallError: layers would have to be left out of a step that says something of each.
    """
    if step.group is None and not ahead.isdisjoint(step.layers):
        return step
    group = _known(network, step) if step.group is None else step.group
    kind, floors = METHODS.get(step.method), network.floors
    holds = hasattr(kind, "floors")
    looks = hasattr(kind, "look") and not hasattr(kind, "restored")
    out = {name for name in step.layers if name in network.kept or (name in floors and looks and not holds)}
    stay = [place for place, name in enumerate(step.layers) if name not in out]
    if len(step.layers) == 1 or not stay:
        out, stay = set(), list(range(len(step.layers)))
    asked = step.settings
    if holds and set(step.layers) & set(floors):
        known = asked.get("floors") or [0] * len(step.layers)
        if isinstance(known, list) and len(known) == len(step.layers):
            own = [floors[name].weights if name in floors else 0 for name in step.layers]
            asked = {**asked, "floors": [max(pair) for pair in zip(known, own, strict=True)]}
    if not out:
        return replace(step, group=group, settings=asked)
    if any(isinstance(value, list) and value for key, value in asked.items() if key != "floors"):
        raise CallError(
            f"The step of {step.method} says something of each of its layers, of which '{min(out)}' is to be kept: "
            f'make it for the others, as taut.whole(net, "{step.method}", keep=...) does.'
        )
    least = asked.get("floors")
    if isinstance(least, list):
        asked = {**asked, "floors": [least[place] for place in stay]}
    group = Group(tuple(layer for layer in group.layers if layer.name not in out))
    before = None if step.before is None else group.cost
    return replace(step, layers=group.names, group=group, settings=asked, before=before)


def _step_row(step: Step) -> tuple[str, ...]:
    usual = _defaults(step.method)
    asked = {key: value for key, value in step.settings.items() if key not in usual or value != usual[key]}
    settings = " ".join(f"{key}={_brief(value)}" for key, value in asked.items())
    layers = step.layers
    names = ", ".join(layers) if len(layers) <= FEW else f"{len(layers)} layers, {layers[0]} ... {layers[-1]}"
    before = step.before or (None if step.group is None else step.group.cost)
    damage = "" if step.damage is None else f"{step.damage:.3g}"
    return (
        names,
        step.method,
        settings,
        _change(before, step.after, "params"),
        _change(before, step.after, "macs"),
        damage,
        step.reason,
    )


def _defaults(method: str) -> dict[str, Setting]:
    """Settings that a method has unless somebody asks for others: a plan's table leaves them out."""
    kind = METHODS.get(method)
    return {} if kind is None else {f.name: f.default for f in fields(kind) if f.default is not MISSING}


def _brief(value: Setting) -> str:
    """A setting as a table shows it: of a list with something about every layer only the length.

    Of whole numbers that modules hold the first that change.
    """
    if isinstance(value, dict):
        changed = [f"{key} {old} -> {new}" for key, (old, new) in value.items() if old != new]
        return ", ".join([*changed[:FEW], *(["..."] if len(changed) > FEW else [])]) or "(as they were)"
    if isinstance(value, list) and len(value) > 2 * FEW:
        return f"({len(value)} numbers)"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _change(before: Cost | None, after: Cost | None, key: str) -> str:
    """What a cost becomes; "?" where that is not known before the step is carried out."""
    if before is None or after is None:
        return f"{'?' if before is None else count(getattr(before, key))} -> ?"
    old, new = getattr(before, key), getattr(after, key)
    return count(old) if old == new else f"{count(old)} -> {count(new)} ({fold(old, new)})"

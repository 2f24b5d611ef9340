"""Steps carried out in place, one after the other; what fails is undone, with the reason."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

import torch
from torch import nn

from taut.core.deprecation import warn_author
from taut.core.progress import track
from taut.errors import CallError
from taut.methods import resolve, settings
from taut.methods.plain_form import PlainForm
from taut.nn.recurrent import without_kernel
from taut.planning.step_checks import below_floor, departs, growth, listed, shown_settings, staying_in
from taut.structure.narrowing import Cut, composed
from taut.structure.outputs import Outputs
from taut.structure.patches import weight_of
from taut.structure.statistics import LayerStatistics, Statistics
from taut.structure.surgery import answering, held_outside, locate, part, renumber, shallow
from taut.structure.surgery import replace as put
from taut.types import (
    Automatic,
    Group,
    Kept,
    Looking,
    Method,
    NothingToDo,
    Renumbering,
    Restoring,
    Slimming,
    Step,
    Tracing,
    shrinks,
)
from taut.types.gone import gone_blocks, without_gone
from taut.types.plan import KeptCode

QUICK = 4
"""Inputs on which each step is tried; all of them are tried at the end."""


@dataclass(frozen=True)
class Check:
    """How steps are held against the original.

    Attributes:
        outputs: the original's.
        most: inputs on which a step is tried; None: all.
        each: whether every step is tried when it was carried out; else exact ones alone, and all together at the end.
    """

    outputs: Outputs
    most: int | None = QUICK
    each: bool = True

    def __call__(self, small: nn.Module, exact: nn.Module | None = None) -> str | None:
        """How a model, and from the model before it where the step was exact, departs; None where it does not."""
        return departs(self.outputs, self.most, small, exact)

    def seen_all(self, steps: Sequence[Step]) -> bool:
        """Whether each of the steps was tried on all inputs."""
        few = self.most is None or len(self.outputs.inputs) <= self.most
        return few and (self.each or all(resolve(step).exact for step in steps))


@dataclass(frozen=True)
class Outcome:
    """What became of a step.

    Attributes:
        step: as it was resolved; as it was where it was not carried out.
        factors: of which the new layers were made.
        reason: why it was not carried out, in words; None where it was. code: the same for programs.
        warns: whether the user has to hear of it.
        gone: what was replaced, by its place.
    """

    step: Step
    factors: Any = None
    reason: str | None = None
    code: KeptCode = "nothing to do"
    warns: bool = False
    gone: Mapping[str, nn.Module] = field(default_factory=dict)


@dataclass(eq=False)
class Left:
    """What steps leave as it was: layers with the reason, and what the user has to hear of it."""

    kept: list[Kept]
    told: list[str] = field(default_factory=list)


def carry_all(
    small: nn.Module, steps: tuple[Step, ...], stats: Statistics, left: Left, check: Check
) -> tuple[list[Step], Statistics, dict[str, Cut]]:
    """The steps that were carried out, resolved; the layers of the others are added to what is `left`.

    Returns:
        Beside the steps the statistics of what they left, and what is left of layers with fewer channels.
    """
    done: list[Step] = []
    staying: list[Kept] = []
    cuts: dict[str, Cut] = {}
    forms = tuple(takewhile(lambda step: isinstance(resolve(step), Restoring), steps))
    first = iter(_carry_forms(small, forms, stats, check))
    for step in track(steps, "rewriting") if steps else ():
        rest = without_gone(step, gone_blocks(done))
        if (form := next(first, None)) is not None:
            outcome = form
        elif isinstance(rest, str):
            outcome = Outcome(step, reason=f"it went with '{rest}'")
        else:
            outcome = _carry_out(small, rest, stats, check)
        if outcome.reason is not None:
            if outcome.warns:
                left.told.append(f"Layer {listed(step.layers)} is left as it was: {outcome.reason}")
            left.kept += kept_of(step, outcome.reason, outcome.code)
            continue
        done.append(outcome.step)
        stats = stats if stats.looks is None else replace(stats, looks=None)  # it is another model now
        method, group, factors = resolve(outcome.step), outcome.step.group, outcome.factors
        if isinstance(method, Slimming) and group is not None:
            lost = {name: (cut.outputs, cut.inputs) for name, cut in factors.cuts.items()}
            stats = stats.narrowed(small, method.after(group), lost)
            cuts = composed(cuts, factors.cuts)
            staying += staying_in(outcome.step, factors.stays, stats.network)
    changed = {name for step in done if not isinstance(resolve(step), Slimming) for name in step.layers}
    left.kept += [one for one in staying if one.layer not in changed]
    return done, stats, cuts


def _carry_forms(small: nn.Module, steps: Sequence[Step], stats: Statistics, check: Check) -> list[Outcome]:
    """Give layers their plain form, which changes no output: all at once, and halves of them where it does."""
    if len(steps) < 2:
        return [_carry_out(small, step, stats, check) for step in steps]
    before = shallow(small)
    outcomes = [_carry_out(small, step, stats, None) for step in steps]
    places = [place for outcome in outcomes for place in outcome.gone]
    if (check(small, before) or without_kernel(small, places)) is None:
        return outcomes
    for outcome in reversed(outcomes):
        _restore(small, {place: place for place in outcome.gone}, outcome.gone)
    half = len(steps) // 2
    return [o for part in (steps[:half], steps[half:]) for o in _carry_forms(small, part, stats, check)]


def kept_of(step: Step, reason: str, code: KeptCode) -> list[Kept]:
    """The layers of a step that was not carried out, with the reason."""
    costs = {} if step.group is None else {layer.name: layer.cost for layer in step.group.layers}
    return [Kept(name, reason, costs.get(name, step.before or Group(()).cost), code) for name in step.layers]


def _found(small: nn.Module, step: Step, stats: Statistics) -> Group:
    """The layers as the step finds them: as it says, or as an earlier step left them where it says otherwise."""
    if step.group is None:
        return stats.network.group(step.layers)
    known = {layer.name: layer for layer in stats.network.layers}
    if all(known.get(layer.name, layer).weight == layer.weight for layer in step.group.layers):
        return step.group
    try:
        for layer in step.group.layers:
            locate(small, layer)
    except CallError:
        return stats.network.group(step.layers) if set(step.layers) <= set(known) else step.group
    return step.group


def _carry_out(small: nn.Module, step: Step, stats: Statistics, check: Check | None) -> Outcome:
    """Do one step in place, on failure undo it; without a check nothing is tried."""
    method = resolve(step)
    group = _found(small, step, stats)
    refused = method.refuses(group)
    if refused:
        raise CallError(f"{step.method} does not apply to layer '{step.layers[0]}': {refused}.")
    method = method.as_traced(group) if isinstance(method, Tracing) else method
    places = {layer.name: locate(small, layer) for layer in group.layers}
    modules = {name: part(small, place) for name, place in places.items()}
    asked, method = method, method.decided(modules) if isinstance(method, Automatic) else method
    decided = method != asked
    method.cost(group)  # refuses settings outside their range
    found: Any = None
    if isinstance(method, Looking):
        looked = looked_at(method, small, stats, places, _known(stats, modules))
        if isinstance(looked, NothingToDo):
            _restore(small, places, modules)
            return Outcome(step, reason=looked.reason, warns=looked.warns)
        method, found = looked
    if not step.allow_growth and not isinstance(method, Restoring) and not shrinks(method, group):
        if not decided:
            raise growth(step, method, group)
        _restore(small, places, modules)
        reason = f"what its weights decide for {step.method} would not shrink it: {shown_settings(settings(method))}"
        return Outcome(step, reason=reason)
    factors = found if isinstance(method, Looking) else _factors(stats, group, method, modules)
    rewrite = method.rewrite(modules, factors)
    below = below_floor(stats.network, group, rewrite, modules)
    if below is not None:
        _restore(small, places, modules)
        return Outcome(step, reason=below)
    tried = check is not None and (check.each or method.exact)
    before = shallow(small) if tried and method.exact else None
    for name, place in places.items():
        put(small, place, answering(rewrite.modules[name], next(x for x in group.layers if x.name == name)))
    numbers = rewrite.resolved.renumbered() if isinstance(rewrite.resolved, Renumbering) else {}
    renumber(small, numbers)
    failed = check(small, before) if check and tried else None
    failed = failed or (without_kernel(small, places.values()) if check else None)
    if failed is not None:
        _restore(small, places, modules)
        renumber(small, {key: (after, before) for key, (before, after) in numbers.items()})
        return Outcome(step, reason=f"rolled back: {failed}", code="rolled back", warns=True)
    resolved = rewrite.resolved
    after = resolved.cost(group)
    done = replace(step, settings=settings(resolved), group=group, before=group.cost, after=after)
    return Outcome(done, factors, gone={place: modules[name] for name, place in places.items()})


def looked_at(
    method: Looking,
    small: nn.Module,
    stats: Statistics,
    places: Mapping[str, str],
    known: Mapping[str, LayerStatistics],
) -> tuple[Method, Any] | NothingToDo:
    """What a method over the whole network finds; one of an earlier contract says in bare words that it is nothing.

    Args:
        method: of some step.
        small: the model as the step finds it; where `stats` remember looks, as they found it.
        stats: of the network.
        places: the step's layers -> where they stand.
        known: what was observed of those that are as they were.
    """
    given: dict[str, Any] = {"stats": known} if method.uses_statistics else {}  # type: ignore[attr-defined]
    if getattr(method, "remembers", False):
        given["seen"] = stats.looks
    looked: Any = method.look(small, stats.network.example, places, **given)
    if not isinstance(looked, str):
        return looked  # type: ignore[no-any-return]
    warn_author(
        type(method),
        f"{type(method).__name__}.look gives bare words where there is nothing to do: the contract now asks for a "
        "taut.types.NothingToDo.",
    )
    return NothingToDo(looked)


def _restore(small: nn.Module, places: Mapping[str, str], modules: Mapping[str, nn.Module]) -> None:
    """Put copies of the layers back; until now they shared the original's weights. What they tie stays tied."""
    around = held_outside(small, list(places.values()))
    copies = copy.deepcopy(dict(modules), {id(p): p for p in around})
    for name, place in places.items():
        put(small, place, copies[name])


def _factors(stats: Statistics, group: Group, method: Method, modules: Mapping[str, nn.Module]) -> Any:
    """The cached decomposition of the original layers; of the present ones where an earlier step changed them."""
    if isinstance(method, PlainForm):  # what tracing showed; the output is compared
        return stats.network.forms.get(group.names[0])
    known = _known(stats, modules)
    if method.masks and not (method.uses_statistics and _untouched(stats, modules)):
        return method.factor(modules, known if method.uses_statistics else {})  # what was pruned must count as pruned
    return stats.factors(group, method) if len(known) == len(modules) else method.factor(modules, {})


def _known(stats: Statistics, modules: Mapping[str, nn.Module]) -> dict[str, LayerStatistics]:
    """Statistics of the layers that no earlier step changed."""
    held = {name: m for name, m in modules.items() if name in stats.modules or name in stats.asides}
    return {name: stats.seen(name) for name, m in held.items() if stats.module(name).weight.shape == m.weight.shape}


def _untouched(stats: Statistics, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the layers still have the values that were observed."""
    pairs = ((stats.modules.get(name), module) for name, module in modules.items())
    return all(old is not None and torch.equal(weight_of(old), weight_of(new)) for old, new in pairs)

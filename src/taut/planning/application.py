"""`apply`: a plan turned into a new model of plain layers; the input model is untouched."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import nn

from taut.artifact.provenance import history, remember
from taut.artifact.rebuild import with_sides
from taut.core.arguments import expect
from taut.core.data import collect
from taut.core.deprecation import warn_author
from taut.core.example import Example
from taut.core.modes import quietly
from taut.core.progress import track
from taut.errors import CallError, ModelError
from taut.methods import resolve, settings
from taut.methods.plain_form import PlainForm
from taut.nn.recurrent import without_kernel
from taut.planning.step_checks import below_floor, departs, growth, listed, shown_settings, staying_in, without_form
from taut.recovery.refit import recover
from taut.recovery.samples import SAMPLES
from taut.recovery.targets import Noted
from taut.structure.coverage import covering
from taut.structure.narrowing import Cut, composed
from taut.structure.observation import observe
from taut.structure.outputs import Outputs
from taut.structure.patches import weight_of
from taut.structure.reordering import fold
from taut.structure.statistics import LayerStatistics, Statistics
from taut.structure.surgery import answering, clone, held_outside, locate, part, shallow
from taut.structure.surgery import replace as put
from taut.structure.tracing import trace
from taut.structure.wrappers import unwrapped
from taut.types import (
    Automatic,
    Group,
    Kept,
    Looking,
    Method,
    Network,
    NothingToDo,
    Plan,
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

Check = Callable[..., str | None]
"""How a model, and before an exact step the model before it, departs from the original; None where it does not."""


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


@quietly
def apply(model: nn.Module, plan: Plan, stats: Statistics, data: Any = None) -> nn.Module:
    """A new model with every step of `plan` done.

    Args:
        model: the ORIGINAL model; it is not changed.
        plan: steps by original layer names.
        stats: what `observe` found in this model.
        data: calibration batches for the closed-form refit and the batch-norm re-estimation; None leaves them out.

    Returns:
        The new model, with train flags, hooks, dtypes, devices and ties as in the original.

    Raises:
        CallError: a step names an unknown layer, method or setting, or would grow its layer.
    """
    expect(plan, Plan, "taut.plan(net, stats, budget)")
    expect(stats, Statistics, "taut.observe(net, model, data)")
    if data is not None and not isinstance(data, Noted):
        data = collect(stats.network.example, data, SAMPLES)
        covering(unwrapped(model), stats.network.example, data)
    small = apply_plan(model, plan, stats, data)[0]
    warn_of_training(stats.outputs(unwrapped(model)), small)
    return small


def warn_of_training(outputs: Outputs, small: nn.Module) -> None:
    """Warn where the result no longer trains: code that runs only then may read what is gone."""
    reason = outputs.differ_in_training(small)
    if reason is not None:
        warnings.warn(f"The result works in eval mode alone. In train mode {reason}", stacklevel=3)


def apply_plan(model: nn.Module, plan: Plan, stats: Statistics, data: Any = None) -> tuple[nn.Module, Plan]:
    """The new model, and the plan as it was really carried out: settings resolved, failed steps moved to `kept`."""
    model = unwrapped(model)
    if first := _forms_in_front(model, plan):
        return _apply_behind(model, plan, first, stats, data)
    _check_names(model, plan)
    plan.check_kept()
    stats = stats.leaving(plan.shares)
    outputs = stats.outputs(model)
    small, done, reason = _tried(model, plan, stats, data, outputs, QUICK)
    if reason is not None:
        small, done, reason = _tried(model, plan, stats, data, outputs, None)  # which step, on which path
    if reason is not None and data is not None:
        warnings.warn(f"The refit is left out: with it {reason}.", stacklevel=3)
        small, done, reason = _tried(model, plan, stats, None, outputs, None)
    remember(small, done, history(model))
    return small, done


def _tried(
    model: nn.Module, plan: Plan, stats: Statistics, data: Any, outputs: Outputs, most: int | None
) -> tuple[nn.Module, Plan, str | None]:
    """The new model, the plan, and how its outputs depart from the original's on any path.

    Each step is tried on the first `most` inputs.
    """
    late = _late(plan.steps)
    kept = list(plan.kept)
    small = clone(model, without=frozenset(name for step in plan.steps[:late] for name in step.layers))
    check = partial(departs, outputs, most)
    done, stats, cuts = _carry_all(small, plan.steps[:late], stats, kept, check)
    failed = None
    if data is not None and any(not resolve(step).exact for step in done):
        try:
            recover(model, small, done, stats, data, cuts)
        except ModelError as error:
            failed = f"the model fails: {error}"
    done, folded = _fold(small, done, stats.network)
    done += _carry_all(small, plan.steps[late:], stats, kept, check)[0]
    tried = data is None and not folded and (most is None or len(outputs.inputs) <= most)
    reason = failed or (None if tried else departs(outputs, None, small))
    return small, replace(plan, steps=tuple(done), kept=tuple(kept)), reason


def _late(steps: tuple[Step, ...]) -> int:
    """Where the steps at the end begin that see the whole network and keep its function: recovery comes before them."""
    late = len(steps)
    while late and isinstance(method := resolve(steps[late - 1]), Looking) and method.exact:
        late -= 1
    return late


def _carry_all(
    small: nn.Module, steps: tuple[Step, ...], stats: Statistics, kept: list[Kept], check: Check
) -> tuple[list[Step], Statistics, dict[str, Cut]]:
    """The steps that were carried out, resolved; the layers of the others are added to `kept`.

    Returns:
        Beside the steps the statistics of what they left, and what is left of layers with fewer channels.
    """
    done: list[Step] = []
    staying: list[Kept] = []
    cuts: dict[str, Cut] = {}
    forms = tuple(takewhile(lambda step: isinstance(resolve(step), Restoring), steps))
    first = iter(_carry_forms(small, forms, stats, check))
    for step in track(steps, "rewriting") if steps else ():
        left = without_gone(step, gone_blocks(done))
        if (form := next(first, None)) is not None:
            outcome = form
        elif isinstance(left, str):
            outcome = Outcome(step, reason=f"it went with '{left}'")
        else:
            outcome = _carry_out(small, left, stats, check)
        if outcome.reason is not None:
            if outcome.warns:
                warnings.warn(f"Layer {listed(step.layers)} is left as it was: {outcome.reason}", stacklevel=3)
            kept += _kept(step, outcome.reason, outcome.code)
            continue
        done.append(outcome.step)
        method, group, factors = resolve(outcome.step), outcome.step.group, outcome.factors
        if isinstance(method, Slimming) and group is not None:
            lost = {name: (cut.outputs, cut.inputs) for name, cut in factors.cuts.items()}
            stats = stats.narrowed(small, method.after(group), lost)
            cuts = composed(cuts, factors.cuts)
            staying += staying_in(outcome.step, factors.stays, stats.network)
    changed = {name for step in done if not isinstance(resolve(step), Slimming) for name in step.layers}
    kept += [one for one in staying if one.layer not in changed]
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


def _kept(step: Step, reason: str, code: KeptCode) -> list[Kept]:
    costs = {} if step.group is None else {layer.name: layer.cost for layer in step.group.layers}
    return [Kept(name, reason, costs.get(name, step.before or Group(()).cost), code) for name in step.layers]


def _fold(small: nn.Module, done: list[Step], net: Network) -> tuple[list[Step], bool]:
    """Let neighbouring layers take over channel orders: the steps, with the orders that are left, and whether any."""
    if not any(step.settings.get("reorders") for step in done):
        return done, False
    fold(small, net.example, net.kept)
    return [with_sides(small, step) for step in done], True


def _forms_in_front(model: nn.Module, plan: Plan) -> int:
    """How many steps give layers their plain form before one that names what came of them; 0 where none does."""
    named = {name for step in plan.steps for name in step.layers}
    if named <= _names(model):
        return 0
    forms = takewhile(lambda step: isinstance(resolve(step), Restoring), plan.steps)
    return sum(1 for _ in forms)


def _apply_behind(model: nn.Module, plan: Plan, first: int, stats: Statistics, data: Any) -> tuple[nn.Module, Plan]:
    """`apply_plan` in two parts: what the first steps make is traced and observed before the others are carried out.

    Args:
        model: the original.
        plan: of it.
        first: steps that give layers their plain form.
        stats: of the original.
        data: calibration batches; None: of the new layers the weights alone decide.
    """
    base, forms = apply_plan(model, replace(plan, steps=plan.steps[:first], kept=()), stats)
    net = trace(base, stats.network.example).leaving_as(stats.network)
    verdicts = [(step, without_form(step, forms)) for step in plan.steps[first:]]
    asked = replace(plan, steps=tuple(step for step, why in verdicts if why is None))
    small, rest = apply_plan(base, asked, observe(net, base, data), data)
    lost = (one for step, why in verdicts if why for one in _kept(step, why, "rolled back"))
    done = replace(rest, steps=(*forms.steps, *rest.steps), kept=(*forms.kept, *lost, *rest.kept))
    remember(small, done, history(model))
    return small, done


def _names(model: nn.Module) -> set[str]:
    """What a step may name: modules, and parameters that may become some."""
    return {name for name, _ in (*model.named_modules(), *model.named_parameters(remove_duplicate=False))}


def _check_names(model: nn.Module, plan: Plan) -> None:
    if missing := sorted({name for step in plan.steps for name in step.layers} - _names(model)):
        raise CallError(f"The plan names a layer that the model does not have: '{missing[0]}'.")


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
        known = {"stats": _known(stats, modules)} if method.uses_statistics else {}
        looked = looked_at(method, small, stats.network.example, places, known)
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
    before = shallow(small) if method.exact and check else None
    for name, place in places.items():
        put(small, place, answering(rewrite.modules[name], next(x for x in group.layers if x.name == name)))
    failed = (check(small, before) or without_kernel(small, places.values())) if check else None
    if failed is not None:
        _restore(small, places, modules)
        return Outcome(step, reason=f"rolled back: {failed}", code="rolled back", warns=True)
    resolved = rewrite.resolved
    after = resolved.cost(group)
    done = replace(step, settings=settings(resolved), group=group, before=group.cost, after=after)
    return Outcome(done, factors, gone={place: modules[name] for name, place in places.items()})


def looked_at(
    method: Looking, small: nn.Module, example: Example, places: Mapping[str, str], known: Mapping[str, Any]
) -> tuple[Method, Any] | NothingToDo:
    """What a method over the whole network finds; one of an earlier contract says in bare words that it is nothing."""
    looked: Any = method.look(small, example, places, **known)
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

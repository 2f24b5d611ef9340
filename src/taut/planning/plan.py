"""`plan`: the least damage that meets a budget, over all layers, methods and ranks at once; and its words."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import replace

from taut.core.arguments import expect
from taut.core.modes import quietly
from taut.core.text import count, numbered, some
from taut.errors import BudgetError, CallError
from taut.methods import choose, resolve, settings
from taut.planning.candidates import Choice, Option, survey
from taut.planning.knapsack import Limits, option_cost, solve
from taut.planning.plain_form import PLAIN_FORMS
from taut.structure.statistics import Statistics
from taut.types import Budget, BudgetLike, Group, Kept, Layer, Looking, Method, Network, Plan, Setting, Step
from taut.types.amounts import percent_note
from taut.types.keep import AS_ASKED, Keep
from taut.types.method import MethodLike

MET, UNMET = "the budget is met without it", "no network near the budget works with it changed"
"""Why a layer stays that nothing would be lost by changing."""

MOST_LEFT = 3
"""Layers that a message names at most."""

ASKED = ("macs", "params", "sparsity", "latency", "rates", "counts", "widths")
"""Settings with which a method that takes out channels is told how many."""


@quietly
def plan(
    net: Network,
    stats: Statistics,
    budget: BudgetLike,
    methods: Iterable[MethodLike] | None = None,
    *,
    keep: Keep = None,
    align: int = 1,
) -> Plan:
    """The steps with the least predicted damage that meet `budget`.

    Args:
        net: what `trace` found.
        stats: what `observe` found; they hold the decompositions, so that a second plan is cheap.
        budget: ceilings on params, macs and bytes (`taut.Budget`, or as it is written: {"macs": 0.5}, "macs=50%");
            `drop` needs an `evaluate` and is `compress`'s.
        methods: names or method objects, names also with settings; None: "low rank", which is not all that
            `taut.compress` takes.
        keep: layers that are left alone, or not below a share (`Network.keeping`).
        align: every rank is a multiple of it; 16 is what convolutions of CPUs like (latency over rank is a staircase).

    Raises:
        BudgetError: no combination of candidates is small enough; the message says how far they go.
        CallError: an unknown method, or a budget of `drop` alone.
    """
    expect(net, Network, "taut.trace(model, example)")
    expect(stats, Statistics, "taut.observe(net, model, data)")
    limits = Budget.of(budget).limits(net.cost)
    if not limits or "latency" in limits:
        raise CallError("A plan needs a budget of params, macs or bytes; 'latency' and 'drop' are for taut.compress.")
    chosen = choose(methods)
    net = net.leaving_as(stats.network).keeping(keep)
    net = net.skipping({layer.name: layer.skip for layer in stats.network.layers if layer.skip is not None})
    choices = survey(net, stats, chosen, align)
    picks = solve(net, choices, limits)
    if picks is None:
        raise BudgetError(unmet(net, choices, limits))
    return describe(net, stats, choices, picks)


def whole(net: Network, method: str, without: Iterable[str] = (), *, keep: Keep = None, **settings: Setting) -> Step:
    """One step over every layer that the method takes: for the pruning methods, which look at the whole network.

    Args:
        net: what `trace` found.
        method: such as "mfbp", "magnitude" or "dead_units".
        without: layers to leave out, by name; a refit may still solve them again.
        keep: layers that are left alone, their weights included, or not below a share (`Network.keeping`).
        settings: of the method, as in a `Step`.

    Returns:
        The step; its reason names the layers that are in no plain form yet, and so not in it: put the steps that give
        them theirs in front, and name in a step behind them what they make.

    Raises:
        CallError: the method, a setting or a layer left out is unknown, or no layer is taken.
    """
    expect(net, Network, "taut.trace(model, example)")
    chosen = resolve(Step((), method, settings))
    net = net.keeping(keep)
    left_out = {net[name].name for name in without}
    taken = (layer for layer in net.layers if layer.name not in left_out)
    layers = tuple(layer for layer in taken if _takes(chosen, net, layer))
    wanted = net.kept | set(net.floors)
    free = replace(net, floors={}, layers=tuple(replace(net[name], skip=None) for name in wanted))
    if not layers and any(_takes(chosen, free, layer) for layer in free.layers):
        raise CallError(f"{method} has nothing left to change: all layers that it would take are kept, as asked.")
    if not layers:
        raise CallError(f"{method} takes no layer of this network: taut inspect says why each is skipped.")
    group = Group(layers)
    asked = {**settings, **_floors(net, chosen, group)}
    kept = tuple(sorted(name for name, share in net.asked.items() if share == 1))
    return Step(group.names, method, asked, group, before=group.cost, reason=_left_out(net, left_out), keep=kept)


def _left_out(net: Network, without: Container[str]) -> str:
    """Which layers a step over the whole network does not see, since they are in no plain form yet."""
    forms = {la.name: PLAIN_FORMS[la.skip] for la in net.layers if la.skip in PLAIN_FORMS and la.name not in without}
    if not forms:
        return ""
    steps = " and ".join(dict.fromkeys(forms.values()))
    return f"without {some(list(forms))}: no plain layers before {steps}, which taut.compress does first"


def _takes(method: Method, net: Network, layer: Layer) -> bool:
    """Whether a step over many layers takes one: with a floor only where the method can hold it."""
    held = layer.name not in net.floors or hasattr(method, "floors") or not isinstance(method, Looking)
    return held and method.refuses(Group((layer,))) is None


def _floors(net: Network, method: Method, group: Group) -> dict[str, Setting]:
    """The setting with which a step over many layers is told what has to stay of each."""
    if not hasattr(method, "floors") or not set(group.names) & set(net.floors):
        return {}
    return {"floors": [net.floors[name].weights if name in net.floors else 0 for name in group.names]}


def narrowing_step(net: Network, method: Method, **asked: Setting) -> Step:
    """One step over every layer that `method` makes narrower, as far as it is asked to.

    Args:
        net: what `trace` found.
        method: takes out channels.
        asked: its settings that say how far, such as macs=0.5; all others of these are unset.
    """
    group = Group(tuple(layer for layer in net.layers if _takes(method, net, layer)))
    wanted = {**settings(method), **dict.fromkeys(ASKED), **_floors(net, method, group), **asked}
    return Step(group.names, method.name, wanted, group)


def unmet(net: Network, choices: Sequence[Choice], limits: Limits) -> str:
    """Why the limits cannot be met: the least that every key can reach."""
    parts = []
    for key, limit in limits.items():
        saved = sum(
            option_cost(c.options[0], key, None) - min(option_cost(o, key, None) for o in c.options) for c in choices
        )
        least = getattr(net.cost, key) - saved
        parts.append(
            f"{key} <= {count(limit)} (the candidates alone reach {count(least)} of {count(getattr(net.cost, key))})"
        )
    free = {name for choice in choices for name in choice.group.names}
    skipped = sum(la.skip not in {None, AS_ASKED} and la.params > 0 and la.name not in free for la in net.layers)
    why = f"; {numbered(skipped, 'layer')} cannot be changed, taut inspect says why" if skipped else ""
    rest = _rest(net, choices, limits)
    return (
        f"No plan meets the budget {' and '.join(parts)}. {rest}Ask for less, or add methods{why}."
        f"{percent_note(limits, {key: getattr(net.cost, key) for key in limits})}"
    )


def _rest(net: Network, choices: Sequence[Choice], limits: Limits) -> str:
    """The layers in which most of the least is, and those that the user wants kept."""
    key = next(key for key in limits if key != "bytes" or len(limits) == 1)
    least = {layer.name: float(getattr(layer.cost, key)) for layer in net.layers}
    least |= {name: 0.0 for c in choices for name in c.group.names[1:]}
    least |= {c.name: min(option_cost(o, key, None) for o in c.options) for c in choices}
    largest = [name for name in sorted(least, key=least.__getitem__, reverse=True)[:MOST_LEFT] if least[name]]
    kept = sorted(net.kept, key=list(least).index)
    where = ", ".join(f"'{name}' ({count(least[name])})" for name in largest)
    alone = f" Kept as asked: {some(kept, 8)}." if kept else ""
    floors = f" At least a share stays, as asked, of {some(list(net.floors), 8)}." if net.floors else ""
    return (f"Most of that is in {where}." if where else "") + f"{alone}{floors} "


def describe(
    net: Network, stats: Statistics, choices: Sequence[Choice], picks: Sequence[int], *, met: bool = True
) -> Plan:
    """The picked options as a plan, with reasons; `met` says whether they meet the budget that was asked for."""
    total = sum(choice.options[i].damage for choice, i in zip(choices, picks, strict=True))
    steps: list[Step] = []
    blocks = [c.block for c, i in zip(choices, picks, strict=True) if i and c.block is not None]
    gone = {name for block in blocks for name in block.layers}
    kept = [
        _kept(net, layer)
        for layer in net.layers
        if layer.name not in {name for choice in choices for name in choice.group.names} | gone
        and (len(layer.weight) > 1 or layer.macs or layer.skip == AS_ASKED)
    ]
    after = net.cost
    for choice, index in zip(choices, picks, strict=True):
        option = choice.options[index]
        if option.block or (choice.block is not None and option.method is None):
            after = after - (choice.options[0].cost - option.cost)
            continue
        if option.method is None:
            reason = _keep_reason(choice, total, met=met)
            kept += [Kept(layer.name, reason, layer.cost) for layer in choice.group.layers]
            continue
        after = after - (choice.options[0].cost - option.cost)
        steps.append(_step(choice, option, total))
    order = {layer.name: position for position, layer in enumerate(net.layers)}
    kept.sort(key=lambda k: order[k.layer])
    steps.sort(key=lambda step: step.layers[0] in order)  # blocks go first
    return Plan(tuple(steps), tuple(kept), net.cost, after, stats.unit)


def _kept(net: Network, layer: Layer) -> Kept:
    """A layer without a choice, and why there is none."""
    if (reason := net.reason_of(layer)) is not None:
        return Kept(layer.name, reason, layer.cost, "as asked" if layer.skip == AS_ASKED else "skipped")
    if layer.name in net.floors:
        return Kept(layer.name, f"no change leaves {net.floors[layer.name].share:.0%} of it, as asked", layer.cost)
    return Kept(layer.name, "no candidate makes it smaller", layer.cost)


def _step(choice: Choice, option: Option, total: float) -> Step:
    if option.method is None:
        raise CallError("Keeping a layer is no step.")
    share = option.damage / total if total > 0 else 0.0
    old, new = choice.group.cost, option.cost
    saved = 1 - new.macs / old.macs if old.macs else 1 - new.params / max(old.params, 1)
    return Step(
        choice.group.names,
        option.method.name,
        settings(option.method),
        choice.group,
        before=old,
        after=new,
        damage=option.damage,
        reason=f"saves {saved:.0%} of its {'MACs' if old.macs else 'parameters'} for {share:.0%} of the damage",
    )


def unmet_plan(plan: Plan) -> Plan:
    """The plan of what comes closest: nothing in it says that the budget is met."""
    return replace(plan, kept=tuple(replace(kept, reason=UNMET) if kept.reason == MET else kept for kept in plan.kept))


def _keep_reason(choice: Choice, total: float, *, met: bool) -> str:
    changes = [option for option in choice.options[1:] if option.method is not None]
    if not changes:
        return "no candidate makes it smaller"
    gentlest = min(changes, key=lambda option: option.damage)
    if total <= 0:
        return MET if met else UNMET
    saved, times = choice.options[0].cost.macs - gentlest.cost.macs, gentlest.damage / total
    worse = f"{times:.1%} of the damage of all changes" if times < 1 else f"{times:.3g} times the damage of all changes"
    return f"the gentlest change would add {worse}, to save {count(saved)} MACs"

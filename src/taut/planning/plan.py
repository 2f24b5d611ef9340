"""`plan`: the cheapest damage that meets a budget, over all layers, methods and ranks at once.

A multiple-choice knapsack: one option per layer (keeping it is always one), damages add up in one unit, every budget
key is one linear constraint. Solved to optimality (gap 1e-4) as an integer program.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from taut.core.files import one_line
from taut.core.modes import quietly
from taut.core.progress import track
from taut.core.text import count
from taut.errors import BudgetError, CallError, ModelError
from taut.measure.latency_model import Ops, Pace, built_ops, layer_ops, work
from taut.methods import choose, resolve, settings
from taut.structure.statistics import Statistics
from taut.types import Budget, Cost, Group, Kept, Looking, Method, Network, Plan, Setting, Step

HEADER_BYTES = 96
"""Upper estimate of what one more tensor adds to the header of a safetensors file."""

Limits = Mapping[str, float]


@dataclass(frozen=True)
class Option:
    """One thing that can be done to a layer: a resolved method, or None to keep it.

    Attributes:
        ops: what it does when it runs, where times are to be predicted.
    """

    method: Method | None
    cost: Cost
    damage: float
    ops: Ops | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Choice:
    """A layer with everything that can be done to it; the first option keeps it."""

    group: Group
    options: tuple[Option, ...]


@quietly
def plan(
    net: Network,
    stats: Statistics,
    budget: Budget,
    methods: Iterable[str | Method] | None = None,
    *,
    align: int = 1,
) -> Plan:
    """The steps with the least predicted damage that meet `budget`.

    Args:
        net: what `trace` found.
        stats: what `observe` found; they hold the decompositions, so that a second plan is cheap.
        budget: ceilings on params, macs and bytes; `drop` needs an `evaluate` and is `compress`'s.
        methods: names or method objects; None for those marked default.
        align: every rank is a multiple of it; 16 is what convolutions of CPUs like (latency over rank is a staircase).

    Raises:
        BudgetError: no combination of candidates is small enough; the message says how far they go.
        CallError: an unknown method, or a budget of `drop` alone.
    """
    limits = budget.limits(net.cost)
    if not limits or "latency" in limits:
        raise CallError("A plan needs a budget of params, macs or bytes; 'latency' and 'drop' are for taut.compress.")
    chosen = choose(methods)
    net = net.skipping({layer.name: layer.skip for layer in stats.network.layers if layer.skip is not None})
    choices = survey(net, stats, chosen, align)
    picks = solve(net, choices, limits)
    if picks is None:
        raise BudgetError(unmet(net, choices, limits))
    return describe(net, stats, choices, picks)


def whole(net: Network, method: str, without: Iterable[str] = (), **settings: Setting) -> Step:
    """One step over every layer that the method takes: for the pruning methods, which look at the whole network.

    Args:
        net: what `trace` found.
        method: such as "mfbp", "magnitude" or "dead_units".
        without: layers to leave out, by name.
        settings: of the method, as in a `Step`.

    Raises:
        CallError: the method, a setting or a layer left out is unknown, or no layer is taken.
    """
    chosen = resolve(Step((), method, settings))
    left_out = {net[name].name for name in without}
    taken = (layer for layer in net.layers if layer.name not in left_out)
    layers = tuple(layer for layer in taken if chosen.refuses(Group((layer,))) is None)
    if not layers:
        raise CallError(f"{method} takes no layer of this network: taut inspect says why each is skipped.")
    group = Group(layers)
    return Step(group.names, method, settings, group, before=group.cost)


def survey(
    net: Network, stats: Statistics, methods: Sequence[Method], align: int = 1, *, timed: bool = False
) -> list[Choice]:
    """Every layer that a method applies to, with the options that no other option beats in cost, time and damage.

    Raises:
        CallError: `align` is no positive whole number.
    """
    if not isinstance(align, int) or isinstance(align, bool) or align < 1:
        raise CallError(f"'align' must be a whole number, at least 1. Got {align!r} instead.")
    for method in methods:
        if method.masks or isinstance(method, Looking):
            raise CallError(
                f"{method.name} works on the whole network and is no candidate for a budget: name it in a step, "
                f"taut.whole(net, '{method.name}', ...), for taut.apply or taut.finetune."
            )
    choices = []
    free = [layer for layer in net.layers if layer.skip is None]
    for layer in track(free, "decomposing"):
        group = Group((layer,))
        options = [Option(None, layer.cost, 0.0, layer_ops(layer) if timed else None)]
        for method in methods:
            if method.refuses(group) is None and (factors := _factors(stats, group, method)) is not None:
                options += [
                    Option(
                        candidate,
                        candidate.cost(group),
                        stats.damage(group, candidate),
                        built_ops(group, candidate) if timed else None,
                    )
                    for candidate in method.candidates(group, factors)
                    if aligned(candidate, align)
                ]
        if len(options) > 1:
            choices.append(Choice(group, tuple(pareto(options))))
    return choices


def _factors(stats: Statistics, group: Group, method: Method) -> Any:
    """The decomposition; None, and a warning, where the layer's values leave the range of floats."""
    try:
        return stats.factors(group, method)
    except (torch.linalg.LinAlgError, ModelError) as error:  # type: ignore[attr-defined]
        warnings.warn(f"Layer '{group.layer.name}' is not decomposed by {method.name}: {one_line(error)}", stacklevel=2)
        return None


def aligned(method: Method, align: int) -> bool:
    """Whether every rank of a resolved method is a multiple of `align`."""
    ranks = [value for key, value in settings(method).items() if key.startswith("rank") and isinstance(value, int)]
    return all(rank % align == 0 for rank in ranks)


def pareto(options: Sequence[Option]) -> list[Option]:
    """The options that none beats in params, MACs, what is done when they run, and damage; the first one stays."""
    table = np.array([[o.damage, o.cost.macs, o.cost.params, *_moved(o)] for o in options], dtype=float)
    order = np.lexsort(table.T[::-1])
    kept: list[int] = []
    for index in order:
        if not kept or not (table[kept] <= table[index]).all(1).any():
            kept.append(int(index))
    return [options[i] for i in sorted({0, *kept})]


def _moved(option: Option) -> Sequence[float]:
    """MACs of wide kernels and of others, values and calls, where they are known: times are sums of them."""
    return (0.0,) if option.ops is None else tuple(work(option.ops, 1))


def amount(net: Network, key: str, pace: Pace | None = None) -> float:
    """What a network costs by a key of a budget; its time is predicted, as a share of the original's."""
    if key != "latency":
        return float(getattr(net.cost, key))
    return 1.0 if pace is None else pace.total(net)


def solve(net: Network, choices: Sequence[Choice], limits: Limits, pace: Pace | None = None) -> list[int] | None:
    """The index of the chosen option per choice, or None where the limits cannot be met."""
    aims = dict(limits)
    for _ in range(4):  # the solver tolerates an excess of 1e-6 of a limit, a budget does not
        picks = _least_damage(net, choices, aims, pace)
        if picks is None:
            return None
        over = {key: excess for key in limits if (excess := _total(net, choices, picks, key, pace) - limits[key]) > 0}
        if not over:
            return picks
        aims = {key: aim - max(2 * over[key], 2e-6 * limits[key]) if key in over else aim for key, aim in aims.items()}
    return None


def _total(net: Network, choices: Sequence[Choice], picks: Sequence[int], key: str, pace: Pace | None) -> float:
    changes = (_of(c.options[i], key, pace) - _of(c.options[0], key, pace) for c, i in zip(choices, picks, strict=True))
    return amount(net, key, pace) + sum(changes)


def _least_damage(net: Network, choices: Sequence[Choice], limits: Limits, pace: Pace | None) -> list[int] | None:
    table = _Table(net, choices, limits, pace)
    picks = table.minimize(1.0)
    if picks is None:
        return None
    total = sum(choice.options[i].damage for choice, i in zip(choices, picks, strict=True))
    if total < 1e-12:  # rounding noise ranks nothing
        return picks
    again = table.minimize(1.0 / total)  # the objective near 1: HiGHS has absolute tolerances
    return picks if again is None else again


def closest(net: Network, choices: Sequence[Choice], limits: Limits, pace: Pace | None = None) -> list[int]:
    """The choice whose worst ratio of cost to limit is lowest, for when the limits cannot be met."""
    return _Table(net, choices, limits, pace).shrink()


def least(net: Network, choices: Sequence[Choice], limits: Limits, pace: Pace | None = None) -> dict[str, float]:
    """What the closest choice costs by every key."""
    picks = closest(net, choices, limits, pace)
    return {key: _total(net, choices, picks, key, pace) for key in limits}


class _Table:
    """The integer program: variables are options, grouped by layer; costs are fractions of the limits."""

    def __init__(self, net: Network, choices: Sequence[Choice], limits: Limits, pace: Pace | None) -> None:
        self.choices = choices
        limits = {key: limit if key == "latency" else max(limit, 0.5) for key, limit in limits.items()}
        options = [option for choice in choices for option in choice.options]
        self.damage = np.array([option.damage for option in options])
        sizes = [len(choice.options) for choice in choices]
        rows = np.repeat(np.arange(len(choices)), sizes)
        self.one = csr_matrix((np.ones(len(options)), (rows, np.arange(len(options)))), (len(choices), len(options)))
        before = [choice.options[0] for choice in choices]
        self.cost = np.array([[_of(o, key, pace) / limit for o in options] for key, limit in limits.items()])
        fixed = [amount(net, key, pace) - sum(_of(option, key, pace) for option in before) for key in limits]
        self.room = np.array([1 - f / limit for f, limit in zip(fixed, limits.values(), strict=True)])
        self.starts = np.cumsum([0, *sizes])

    def minimize(self, scale: float) -> list[int] | None:
        """Least damage within the limits."""
        n = len(self.damage)
        if not n:
            return [] if (self.room >= 0).all() else None
        thrift = 1e-6 * self.cost.mean(0)  # of two equal plans the cheaper
        found = milp(
            self.damage * scale + thrift,
            constraints=[LinearConstraint(self.one, 1, 1), LinearConstraint(self.cost, -np.inf, self.room)],
            integrality=np.ones(n),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 1e-4},
        )
        return None if found.x is None else self._picks(found.x)

    def shrink(self) -> list[int]:
        """Least worst ratio: minimize t with cost + fixed <= t limit."""
        n = len(self.damage)
        if not n:
            return []
        padded = csr_matrix(np.hstack([self.cost, -np.ones((len(self.cost), 1))]))
        one = csr_matrix((self.one.data, self.one.indices, self.one.indptr), (self.one.shape[0], n + 1))
        found = milp(
            np.append(1e-9 * self.damage / max(self.damage.max(), 1e-300), 1.0),
            constraints=[LinearConstraint(one, 1, 1), LinearConstraint(padded, -np.inf, self.room - 1)],
            integrality=np.append(np.ones(n), 0),
            bounds=Bounds(0, np.append(np.ones(n), np.inf)),
        )
        return self._picks(found.x[:n])

    def _picks(self, x: np.ndarray) -> list[int]:
        return [int(np.argmax(x[a:b])) for a, b in zip(self.starts, self.starts[1:], strict=False)]


def _of(option: Option, key: str, pace: Pace | None) -> float:
    if key == "latency":
        return 0.0 if pace is None or option.ops is None else pace.of(option.ops)
    value = float(getattr(option.cost, key))
    return value + 2 * HEADER_BYTES if key == "bytes" and option.method is not None else value


def unmet(net: Network, choices: Sequence[Choice], limits: Limits) -> str:
    """Why the limits cannot be met: the least that every key can reach."""
    parts = []
    for key, limit in limits.items():
        saved = sum(_of(c.options[0], key, None) - min(_of(o, key, None) for o in c.options) for c in choices)
        least = getattr(net.cost, key) - saved
        parts.append(
            f"{key} <= {count(limit)} (the candidates alone reach {count(least)} of {count(getattr(net.cost, key))})"
        )
    skipped = sum(layer.skip is not None and layer.params > 0 for layer in net.layers)
    return (
        f"No plan meets the budget {' and '.join(parts)}. Ask for less, or add methods; "
        f"{skipped} layers are skipped, taut inspect says why."
    )


def describe(
    net: Network, stats: Statistics, choices: Sequence[Choice], picks: Sequence[int], *, met: bool = True
) -> Plan:
    """The picked options as a plan, with reasons; `met` says whether they meet the budget that was asked for."""
    total = sum(choice.options[i].damage for choice, i in zip(choices, picks, strict=True))
    steps: list[Step] = []
    kept = [
        Kept(layer.name, layer.skip or "no candidate makes it smaller", layer.cost)
        for layer in net.layers
        if layer.name not in {choice.group.layer.name for choice in choices} and (len(layer.weight) > 1 or layer.macs)
    ]
    after = net.cost
    for choice, index in zip(choices, picks, strict=True):
        option = choice.options[index]
        if option.method is None:
            kept.append(Kept(choice.group.layer.name, _keep_reason(choice, total, met=met), option.cost))
            continue
        after = after - (choice.options[0].cost - option.cost)
        steps.append(_step(choice, option, total))
    order = {layer.name: position for position, layer in enumerate(net.layers)}
    kept.sort(key=lambda k: order[k.layer])
    return Plan(tuple(steps), tuple(kept), net.cost, after, stats.unit)


def _step(choice: Choice, option: Option, total: float) -> Step:
    if option.method is None:
        raise CallError("Keeping a layer is no step.")
    share = option.damage / total if total > 0 else 0.0
    old, new = choice.options[0].cost, option.cost
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


def _keep_reason(choice: Choice, total: float, *, met: bool) -> str:
    gentlest = min((o for o in choice.options[1:]), key=lambda o: o.damage)
    if total <= 0:
        return "the budget is met without it" if met else "no network near the budget works with it changed"
    saved, times = choice.options[0].cost.macs - gentlest.cost.macs, gentlest.damage / total
    worse = f"{times:.1%} of the damage of all changes" if times < 1 else f"{times:.3g} times the damage of all changes"
    return f"the gentlest change would add {worse}, to save {count(saved)} MACs"

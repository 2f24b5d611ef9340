"""Channels and ranks in one plan: how much of a budget each should save is found by what the output loses.

The widths that remain when channels save a share of the way decide what low rank can still save. For every share that
is tried, channels go until the network costs f^t of the original (f the budget's fraction, t the share), the narrower
network is refitted, observed anew, and its ranks are chosen by the integer program within what is left of the budget.
Then all steps are carried out on the original at once, with one refit towards its outputs, and the divergence of the
output on samples that no refit saw decides between the shares.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from taut.core.data import chunks
from taut.core.example import Example
from taut.core.progress import stage
from taut.errors import CallError
from taut.measure import Pace
from taut.measure.counting import count
from taut.measure.latency_model import layer_ops
from taut.methods import settings
from taut.planning.application import apply_plan
from taut.planning.plan import HEADER_BYTES, Choice, amount, describe, solve, survey
from taut.recovery.judging import Judge
from taut.recovery.targets import Noted
from taut.structure.observation import observe
from taut.structure.statistics import Statistics
from taut.structure.surgery import shallow
from taut.structure.tracing import trace
from taut.types import Group, Kept, Method, Plan, Step

Built = tuple[nn.Module, Plan]
Batches = Sequence[tuple[Any, Any]]

FIRST = (0.0, 0.5, 1.0)
"""Shares of the way that channels save, tried first: none, half, all."""

ROUNDS = 5
"""Shares tried at most."""

NOT_COMPARABLE = 1e300
"""Divergence of a plan that holds the limits, where outputs cannot be compared."""

HELD_OUT = 4
"""One sample in so many judges, the others refit."""

JUDGES = 512
"""Samples that judge at most."""

NEARLY = 1.05
"""Divergences that differ by less than this factor are equal: then more channels go, which keep all of the speed."""

ASKED = ("macs", "params", "sparsity", "latency", "rates", "counts", "widths")
"""What a method that takes out channels is asked for: here the budget's."""

LET_OUT = 12
"""Budgets between one that cannot be met and the whole network, to find the closest."""

PIECES = 8
"""The judging samples are as many pieces of the batches, so that their number comes out as meant."""

ALIKE = 1.1
"""Budgets that differ by no more than this factor are served by the same share."""


@dataclass(frozen=True)
class _Narrow:
    """A network after channels went: the step, and what its ranks are chosen from."""

    step: Step
    kept: tuple[Kept, ...]
    stats: Statistics
    choices: tuple[Choice, ...]


class Mixer:
    """Plans of a model with channels and low rank.

    Args:
        base: the model.
        stats: of it, with its traced network.
        choices: what can be done to its layers where no channels go.
        data: calibration batches, or None.
        slim: the methods that take out channels; the first is used.
        lossy: the others.
        align: every rank is a multiple of it.
        timed: whether there are limits of "latency": `pace` has to be set then, and `off` should be, the measured
            over the predicted time of each of the `drafts`.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - a workshop in all its parts
        self,
        base: nn.Module,
        stats: Statistics,
        choices: Sequence[Choice],
        data: Batches | None,
        slim: Sequence[Method],
        lossy: Sequence[Method],
        align: int,
        *,
        timed: bool = False,
    ) -> None:
        """See the class."""
        self.base, self.stats, self.choices, self.data = base, stats, tuple(choices), data
        if len(slim) > 1:
            raise CallError(f"One method can take out channels, not {len(slim)}: give {slim[0].name} once.")
        self.method, self.lossy, self.align, self.timed = slim[0], tuple(lossy), align, timed
        self.pace: Pace | None = None
        self.off: dict[float, float] = {}
        self.fit, held = _divided(stats.network.example, data)
        self.judge = None if held is None else Judge(stats.network.example, base, held, stats.kinds)
        self.found: list[tuple[float, float]] = []
        self.left: set[str] = set()
        self.noted: Noted | None = None
        self.narrow: dict[tuple[float, int, bool], _Narrow | None] = {}

    def within(self, limits: Mapping[str, float]) -> Built | None:
        """The model and plan with the least divergence among those within `limits`; None where there is none."""
        tight = self._tightness(limits)
        share = next((t for t, known in self.found if max(tight / known, known / tight) <= ALIKE), None)
        if share is None:
            share = self._searched(limits)
            if share is None:
                return None
            self.found.append((share, tight))
        return self._built(share, limits, self.data)

    def drafts(self, limits: Mapping[str, float]) -> Iterator[tuple[float, nn.Module]]:
        """The first shares, with models within `limits`: of the shapes they would have, and nothing recovered."""
        self.narrow.clear()
        for share in FIRST if self.lossy else FIRST[-1:]:
            built = self._built(share, limits, self.fit, recovered=False)
            if built is not None:
                yield share, built[0]
        self.narrow.clear()

    def ways(self, limits: Mapping[str, float]) -> Iterator[Built]:
        """Models within `limits` where channels save none, half or all of the way."""
        for share in FIRST if self.lossy else FIRST[-1:]:
            built = self._built(share, limits, self.data)
            if built is not None and self._holds(built[0], limits):
                yield built

    def _aims(self, share: float, limits: Mapping[str, float]) -> Mapping[str, float]:
        """Limits for a share, with regard to how far off the times of its neighbours were predicted."""
        if "latency" not in limits or not self.off:
            return limits
        known = sorted(self.off)
        off = float(np.interp(share, known, [self.off[t] for t in known]))
        return {**limits, "latency": limits["latency"] / off}

    def least(self, limits: Mapping[str, float]) -> dict[str, float]:
        """What channels alone cost at least on the way to limits that cannot be met: let out until they can."""
        aims = dict(limits)
        for step in range(LET_OUT + 1):
            let = step / LET_OUT
            aims = {key: limit ** (1 - let) * self._whole(key) ** let for key, limit in limits.items()}
            if self._narrowed(1.0, aims, None) is not None:
                break
        return aims

    def leave(self, reasons: Mapping[str, str]) -> None:
        """Leave layers alone of which a rewrite failed, for these reasons."""
        self.left |= set(reasons)
        self.stats = replace(self.stats, network=self.stats.network.skipping(reasons))
        self.choices = self._possible(self.choices)
        self.narrow.clear()

    def _possible(self, choices: Iterable[Choice]) -> tuple[Choice, ...]:
        return tuple(choice for choice in choices if not set(choice.group.names) & self.left)

    def _tightness(self, limits: Mapping[str, float]) -> float:
        """How many times less the tightest limit allows than the original costs."""
        return max([1.0, *(self._whole(key) / max(limit, 1e-9) for key, limit in limits.items())])

    def _whole(self, key: str) -> float:
        """What the original costs."""
        return amount(self.stats.network, key, self.pace)

    def _searched(self, limits: Mapping[str, float]) -> float | None:
        """The share of the way that channels should save."""
        if not self.lossy:
            return 1.0
        if self.judge is None:  # nothing to measure with: half each
            return next((t for t in (0.5, 1.0, 0.0) if self._built(t, limits, None) is not None), None)
        losses: dict[float, float] = {}
        self.noted = None if self.fit is None else Noted(self.fit, self.stats.network)
        with stage("mixing channels and ranks", total=ROUNDS) as bar:
            for share in FIRST:
                losses[share] = self._loss(share, limits)
                bar()
            while len(losses) < ROUNDS:
                share = _next(losses)
                losses[share] = self._loss(share, limits)
                bar()
        self.noted = None  # as large as some activations
        least = min(losses.values())
        if least == NOT_COMPARABLE:  # outputs of lengths that depend on values: half each
            return next(t for t in (0.5, 1.0, 0.0) if losses[t] == least)
        return max(t for t, loss in losses.items() if loss <= least * NEARLY) if math.isfinite(least) else None

    def _loss(self, share: float, limits: Mapping[str, float]) -> float:
        """Divergence on held-out samples; infinite where there is no such plan."""
        built = self._built(share, limits, self.fit)
        if built is None or self.judge is None or not self._holds(built[0], limits):
            return math.inf
        return min(self.judge.divergence(built[0]), NOT_COMPARABLE)

    def _holds(self, model: nn.Module, limits: Mapping[str, float]) -> bool:
        """Whether a plan is as small as it was to be: what was rolled back makes it larger, and diverges by nothing."""
        counted = [key for key in limits if key != "latency"]
        cost = count(shallow(model), self.stats.network.example)
        slack = 2 * HEADER_BYTES * len(self.stats.network.layers)
        return all(getattr(cost, key) <= limits[key] + (slack if key == "bytes" else 0) for key in counted)

    def _built(
        self, share: float, limits: Mapping[str, float], data: Batches | None, *, recovered: bool = True
    ) -> Built | None:
        net, limits = self.stats.network, self._aims(share, limits)
        given = self._noted(data) if recovered else None
        if share == 0 or all(limit >= self._whole(key) for key, limit in limits.items()):
            picks = solve(net, self.choices, limits, self.pace)
            if picks is None:
                return None
            plan = describe(net, self.stats, self.choices, picks)
            return apply_plan(self.base, plan, self.stats, given)
        whole = data is self.data
        key = share, round(math.log(self._tightness(limits)) / math.log(ALIKE)), whole
        if key not in self.narrow or share == 1:
            self.narrow[key] = self._narrowed(share, limits, data)
        narrow = self.narrow[key]
        if narrow is None:
            return None
        inner = narrow.stats.network
        picks = [0] * len(narrow.choices) if share == 1 else solve(inner, narrow.choices, limits, self.pace)
        if picks is None:
            return None
        rest = describe(inner, narrow.stats, narrow.choices, picks)
        told = {kept.layer for kept in narrow.kept}  # carrying the step out tells them again
        kept = tuple(k for k in rest.kept if k.layer not in told and inner[k.layer] == net[k.layer])
        plan = replace(rest, steps=(narrow.step, *rest.steps), kept=kept, before=net.cost)
        return apply_plan(self.base, plan, self.stats, given)

    def _noted(self, data: Batches | None) -> Batches | Noted | None:
        """Batches, with what the original gives on those that all plans are refitted on while they are compared."""
        return self.noted if self.noted is not None and data is self.fit else data

    def _narrowed(self, share: float, limits: Mapping[str, float], data: Batches | None) -> _Narrow | None:
        """The network from which channels went until it costs f^share; None where these cannot go so far."""
        net = self.stats.network
        layers = tuple(layer for layer in net.layers if self.method.refuses(Group((layer,))) is None)
        group = Group(layers)
        asked = {key: self._kept_share(group, key, limit, share) for key, limit in limits.items()}
        if any(value <= 0 for value in asked.values()):
            return None
        keys: dict[str, Any] = {("params" if key == "bytes" else key): min(1.0, value) for key, value in asked.items()}
        if "latency" in keys and self.pace is not None:
            keys["rates"] = [*self.pace.rates, float(self.pace.lanes)]
        step = Step(group.names, self.method.name, {**settings(self.method), **dict.fromkeys(ASKED), **keys}, group)
        try:
            given = None if share == 1 else self._noted(data)
            small, done = apply_plan(self.base, Plan((step,)), self.stats, given)
        except CallError:
            return None  # no widths meet it
        if not done.steps:
            return None
        told = replace(done.steps[0], reason=f"{share:.0%} of the way; least damage per saved cost")
        inner = trace(small, net.example)
        stats = self.stats if share == 1 else observe(inner, small, data)
        choices = () if share == 1 else self._possible(survey(inner, stats, self.lossy, self.align, timed=self.timed))
        return _Narrow(told, done.kept, replace(stats, network=inner), choices)

    def _kept_share(self, group: Group, key: str, limit: float, share: float) -> float:
        """What is left of the layers' cost when the network's falls to the power `share` of its fraction."""
        total = self._whole(key)
        target: float = total * min(1.0, limit / total) ** share
        if key == "latency" and self.pace is not None:
            mine = sum(self.pace.of(layer_ops(layer)) for layer in group.layers)
        elif key == "bytes":
            mine = group.cost.params * total / max(self.stats.network.cost.params, 1)
        else:
            mine = float(getattr(group.cost, key))
        return 1 - (total - target) / mine if mine > 0 else 0.0


def _divided(example: Example, data: Batches | None) -> tuple[Batches | None, list[Any] | None]:
    """Batches to refit on, and inputs to judge with."""
    if data is None:
        return None, None
    total = sum(example.samples.size(inputs) for inputs, _ in data)
    size = min(JUDGES, total // HELD_OUT)
    if not size:
        return data, [inputs for inputs, _ in data]
    pieces = list(chunks(example, data, max(1, size // PIECES)))
    held, seen = len(pieces), 0
    while seen < size and held > 1:
        held -= 1
        seen += example.samples.size(pieces[held][0])
    return pieces[:held], [inputs for inputs, _ in pieces[held:]]


def _next(losses: Mapping[float, float]) -> float:
    """Between the best share and its worse explored neighbour's side: the middle of the more promising gap."""
    known = sorted(losses)
    best = min(known, key=losses.__getitem__)
    at = known.index(best)
    sides = [known[i] for i in (at - 1, at + 1) if 0 <= i < len(known)]
    widest = max(abs(best - side) for side in sides)
    near = [side for side in sides if abs(best - side) == widest]
    return (best + min(near, key=losses.__getitem__)) / 2

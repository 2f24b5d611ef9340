"""The ways to plan that are compared: what counts as damage, and in which metric factors are cut.

uniform    every layer the same share of its MACs, factors by the weights alone
spared     the same, but the first layer and the classifier are kept, as is the custom
frobenius  knapsack on the relative error of the weights
data       knapsack on the relative error of the outputs, factors in the inputs' second moment A
fisher     knapsack on the predicted rise of the loss, factors in A and the gradients' second moment B
default    the same damage, factors in A alone
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

import taut
from taut.planning.candidates import survey
from taut.planning.plan import describe

METHODS = ("svd", "spatial", "tucker")
WAYS = ("uniform", "spared", "frobenius", "data", "fisher", "default")


def methods(metric: str) -> list[Any]:
    """Every factorization, cut in one metric."""
    return [taut.methods.resolve(taut.Step((), name, {"metric": metric})) for name in METHODS]


class Planner:
    """One net and one set of calibration images; decompositions are shared by all budgets."""

    def __init__(self, net: nn.Module, batches: list[Tensor]) -> None:
        """Observe once."""
        self.net, self.batches = net, batches
        self.network = taut.trace(net, batches[0][:1])
        self.seen = taut.observe(self.network, net, batches)
        self.blind = taut.observe(self.network, net)
        outputs_only = {name: replace(found, outputs=None) for name, found in self.seen.layers.items()}
        self.unweighted = replace(self.seen, layers=outputs_only, unit="relative output error", _cache={})

    def plan(self, way: str, times: float) -> tuple[taut.Plan, taut.Statistics]:
        """The plan for `times` fewer MACs, and the statistics it stands on."""
        if way in {"uniform", "spared"}:
            return self.uniform(times, spared=way == "spared"), self.blind
        stats = {"frobenius": self.blind, "data": self.unweighted}.get(way, self.seen)
        metric = {"frobenius": "frobenius", "fisher": "fisher"}.get(way, "data")
        return taut.plan(self.network, stats, taut.Budget(macs=1 / times), methods(metric)), stats

    def uniform(self, times: float, *, spared: bool) -> taut.Plan:
        """In every layer the candidate of least weight error within the same share of its MACs."""
        choices = survey(self.network, self.blind, methods("frobenius"))
        ends = {choices[0].group.layer.name, choices[-1].group.layer.name} if spared else set()
        low, high = 0.0, 1.0
        picks: list[int] = []
        for _ in range(30):
            share = (low + high) / 2
            found = [0 if choice.group.layer.name in ends else _within(choice, share) for choice in choices]
            plan = describe(self.network, self.blind, choices, found)
            if plan.after.macs <= self.network.cost.macs / times:
                low, picks = share, found
            else:
                high = share
        return describe(self.network, self.blind, choices, picks)


def _within(choice: Any, share: float) -> int:
    """The option of least damage within a share of the layer's MACs; the cheapest where none is."""
    whole = choice.options[0].cost.macs
    rated = [(option.damage, place) for place, option in enumerate(choice.options) if option.cost.macs <= share * whole]
    return min(rated)[1] if rated else min(range(len(choice.options)), key=lambda i: choice.options[i].cost.macs)

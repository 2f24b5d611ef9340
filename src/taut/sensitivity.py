"""`sensitivity`: predicted damages replaced by measured ones, one layer compressed at a time.

Where layers interact strongly (deep nets, large ratios) the Kronecker-factored prediction ranks layers wrongly; then a
few measured points per layer and method, interpolated, plan better. On small nets it changes little.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from taut.calls import collect, evaluating, quietly
from taut.errors import CallError
from taut.methods import choose
from taut.progress import track
from taut.recovery.refit import joined
from taut.structure.fisher import choose_kinds, divergence
from taut.structure.statistics import Curve, Statistics
from taut.structure.surgery import shallow, swap
from taut.types import Group, Method, Network

SAMPLES = 128
"""Inputs on which the output is compared."""

POINTS = 5
"""Candidates measured per layer and method, spread evenly over the logarithm of the predicted damage."""


@quietly
def sensitivity(
    net: Network, model: nn.Module, stats: Statistics, data: Any, methods: Iterable[str | Method] | None = None
) -> Statistics:
    """The same statistics with damages measured: output divergence when one layer alone is compressed.

    Args:
        net: what `trace` found.
        model: the traced model; it is not changed.
        stats: what `observe` found.
        data: calibration batches; 128 samples are used.
        methods: names or method objects; None for those marked default.

    Returns:
        Statistics whose plans interpolate the measured curves (log divergence over log prediction), in nats for class
        outputs and half the squared change otherwise.

    Raises:
        CallError: the statistics were made without calibration data.
    """
    if not stats.samples:
        raise CallError("Measured damages start from predicted ones: give taut.observe calibration data first.")
    inputs = joined(collect(net.example, data, SAMPLES))
    copied = shallow(model)
    with evaluating(copied):
        before = net.example.run(copied, inputs)
        kinds = list(stats.kinds) or choose_kinds(before, "auto")

        def measured(group: Group, method: Method) -> float:
            return divergence(kinds, before, _run_changed(net, copied, stats, group, method, inputs))

        curves: dict[tuple[tuple[str, ...], str], Curve] = {}
        for group, method in track(_pairs(net, choose(methods)), "measuring damage"):
            picked = _spread(group, method, stats)
            if picked:
                curves[group.names, method.family()] = Curve(tuple((d, measured(group, c)) for d, c in picked))
    return replace(stats, curves=curves)


def _pairs(net: Network, methods: tuple[Method, ...]) -> list[tuple[Group, Method]]:
    groups = [Group((layer,)) for layer in net.layers if layer.skip is None]
    return [(g, m) for g in groups for m in methods if m.refuses(g) is None]


def _spread(group: Group, method: Method, stats: Statistics) -> list[tuple[float, Method]]:
    """Up to POINTS candidates that no other beats in MACs and predicted damage."""
    factors = stats.factors(group, method)
    rated = [(c.damage(factors) or 0.0, c) for c in method.candidates(group, factors)]
    best: list[tuple[float, Method]] = []
    for damage, candidate in sorted(rated, key=lambda pair: (pair[1].cost(group).macs, pair[0])):
        if damage > 0 and (not best or damage < best[-1][0]):
            best.append((damage, candidate))
    if len(best) <= POINTS:
        return best
    logs = np.log([damage for damage, _ in best])
    wanted = np.linspace(logs[0], logs[-1], POINTS)
    return [best[i] for i in sorted({int(np.abs(logs - w).argmin()) for w in wanted})]


def _run_changed(net: Network, copied: nn.Module, stats: Statistics, group: Group, method: Method, inputs: Any) -> Any:
    """The output with one candidate in place; the copy is put back as it was."""
    modules: Mapping[str, nn.Module] = {name: stats.modules[name] for name in group.names}
    rewrite = method.rewrite(modules, stats.factors(group, method))
    old = {name: copied.get_submodule(name) for name in group.names}
    for name, module in rewrite.modules.items():
        swap(copied, old[name], module.eval())
    try:
        return net.example.run(copied, inputs)
    finally:
        for name, module in rewrite.modules.items():
            swap(copied, module, old[name])

"""`sensitivity`: predicted damages replaced by measured ones, one layer compressed at a time.

Where layers interact strongly (deep nets, large ratios) the Kronecker-factored prediction ranks layers wrongly; then a
few measured points per layer and method, interpolated, plan better. On small nets it changes little.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from taut.core.arguments import expect
from taut.core.data import collect
from taut.core.modes import evaluating, quietly
from taut.core.progress import track
from taut.core.showing import shown
from taut.errors import CallError
from taut.methods import choose
from taut.recovery.samples import joined
from taut.structure.answers import answers_of
from taut.structure.fisher import divergence
from taut.structure.kinds import choose_kinds, look_at
from taut.structure.statistics import Curve, Statistics
from taut.structure.surgery import shallow, swap
from taut.structure.wrappers import unwrapped
from taut.types import Group, Method, Network
from taut.types.method import MethodLike

SAMPLES = 128
"""Inputs on which the output is compared."""

REMEMBERED_BYTES = 1 << 30
"""Layer outputs that are kept, so that measuring a layer does not run what lies before it."""

POINTS = 5
"""Candidates measured per layer and method, spread evenly over the logarithm of the predicted damage."""


@shown
@quietly
def sensitivity(
    net: Network, model: nn.Module, stats: Statistics, data: Any, methods: Iterable[MethodLike] | None = None
) -> Statistics:
    """The same statistics with damages measured: output divergence when one layer alone is compressed.

    Args:
        net: what `trace` found.
        model: the traced model; it is not changed.
        stats: what `observe` found.
        data: calibration batches; 128 samples are used.
        methods: names or method objects, names also with settings; None for those marked default.

    Returns:
        Statistics whose plans interpolate the measured curves (log divergence over log prediction), in nats for class
        outputs and half the squared change otherwise.

    Raises:
        CallError: the statistics were made without calibration data.
    """
    expect(stats, Statistics, "taut.observe(net, model, data)")
    if not stats.samples:
        raise CallError("Measured damages start from predicted ones: give taut.observe calibration data first.")
    model = unwrapped(model)
    example = stats.network.example
    collected = collect(example, data, SAMPLES)
    batches = joined(example, model, [inputs for inputs, _ in collected])
    samples = [example.samples.size(inputs) for inputs in batches]
    copied = shallow(model)
    with evaluating(copied):
        notes = [_noted(net, copied, inputs, REMEMBERED_BYTES // len(batches)) for inputs in batches]
        wanted = [answers_of(example, before, inputs) for inputs, (before, _) in zip(batches, notes, strict=True)]
        kinds = list(stats.kinds) or choose_kinds(wanted[0], "auto", look_at(model, example, *collected[0]))

        def measured(group: Group, method: Method) -> float:
            total = 0.0
            for inputs, size, before, (_, outputs) in zip(batches, samples, wanted, notes, strict=True):
                with _remembered(copied, outputs, group):
                    after = _run_changed(net, copied, stats, group, method, inputs)
                total += size * divergence(kinds, before, answers_of(example, after, inputs))
            return float(total / sum(samples))

        curves: dict[tuple[tuple[str, ...], str], Curve] = {}
        for group, method in track(_pairs(net, choose(methods)), "measuring damage"):
            picked = _spread(group, method, stats)
            if picked:
                curves[group.names, method.family()] = Curve(tuple((d, measured(group, c)) for d, c in picked))
    return replace(stats, curves=curves)


class Remembered(nn.Module):
    """Stands in for a layer whose inputs are unchanged: gives the output that is known already."""

    def __init__(self, output: Tensor) -> None:
        """Keep it."""
        super().__init__()
        self.output = output

    def forward(self, *_: Any, **__: Any) -> Tensor:
        """A copy, for in-place code that follows."""
        return self.output.clone()


def _noted(net: Network, copied: nn.Module, inputs: Any, left: int) -> tuple[Any, dict[str, Tensor]]:
    """The model's output, and those of its first layers in the order in which they run, up to `left` bytes."""
    known: dict[str, Tensor] = {}
    names = [layer.name for layer in net.layers if layer.skip is None and len(layer.calls) == 1]
    names = [name for name in names if not copied.get_submodule(name)._forward_hooks]  # a user's may change the output

    def hook(name: str) -> Any:
        def note(_module: nn.Module, _args: Any, output: Tensor) -> None:
            nonlocal left
            left -= output.numel() * output.element_size()
            if left >= 0:
                known[name] = output.clone()

        return note

    handles = [copied.get_submodule(name).register_forward_hook(hook(name), prepend=True) for name in names]
    before = net.example.run(copied, inputs)
    for handle in handles:
        handle.remove()
    return before, known


@contextmanager
def _remembered(copied: nn.Module, known: Mapping[str, Tensor], group: Group) -> Iterator[None]:
    """Layers that ran before the group's are not run again: nothing upstream of it changes."""
    order = list(known)
    places = [order.index(name) for name in group.names if name in known]
    first = min(places) if places else 0
    swapped = {name: (copied.get_submodule(name), Remembered(known[name])) for name in order[:first]}
    for old, new in swapped.values():
        swap(copied, old, new)
    try:
        yield
    finally:
        for old, new in swapped.values():
            swap(copied, new, old)


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

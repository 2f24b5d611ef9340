"""What layers cost in time on this machine, for this model: variants of it are made, run beside it, and compared.

How much faster fewer channels and lower ranks are depends on the machine, the runtime, the batch and the layer; a
table of somebody else's machine does not tell. A dozen variants of the model at hand, unrecovered, tell enough.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import nn

from taut.core.progress import stage
from taut.errors import CallError, ModelError
from taut.measure import LatencyMeter, LatencyModel
from taut.measure.latency_model import LayerOps, model_ops
from taut.planning.application import apply_plan
from taut.planning.candidates import Choice
from taut.planning.plan import describe, narrowing_step
from taut.structure.statistics import Statistics
from taut.types import Method, Plan

NARROW = ((0.6, True), (0.5, False), (0.3, True), (0.2, False), (0.12, True), (0.04, True))
"""Shares of the MACs that variants with fewer channels keep, and whether every group loses the same share.

Even widths shrink what layers read and write in step with the MACs' root, the others do not: together they tell both
rates apart.
"""

FACTORIZED = (0.4, 0.7, 1.0, 1.0)
"""Shares of the layers that variants with low rank factorize, at random ranks."""


ROUNDS = 2
"""Times that the plans which the rates lead to are timed, too, and the rates fitted anew."""

COUNTS = 3
"""How many times a plan counts that the rates led to: there they have to be right."""


def fit_latency_model(
    base: nn.Module,
    variants: Iterable[nn.Module],
    meter: LatencyMeter,
    candidates: Callable[[LatencyModel], Iterable[tuple[float, nn.Module]]],
) -> tuple[LatencyModel, dict[float, float]]:
    """Rates fitted to variants of a model, each timed in turns with the original.

    A plan that is made for its predicted time seeks out where the prediction is too low. So plans are timed as well.

    Args:
        base: the model.
        variants: of it (`shape_variants`).
        meter: the original in its fastest runtime.
        candidates: models that the budget leads to under a latency model, with a number for each.

    Returns:
        Beside it the measured over the predicted time of the last candidates, by their numbers.
    """
    example = meter.example
    ops, times = [model_ops(base, example)], [meter.relative_time(base)]
    with stage("timing variants") as bar:
        for model in variants:
            if (time := _time(meter, model)) is not None:
                ops.append(model_ops(model, example))
                times.append(time)
            bar()
        fitted = LatencyModel.fit(ops, times, meter.runtime.name)
        for _ in range(ROUNDS):
            timed: dict[float, tuple[LayerOps, float]] = {}
            for number, model in candidates(fitted):
                if (time := _time(meter, model)) is not None:
                    timed[number] = model_ops(model, example), time
                    ops += [timed[number][0]] * COUNTS
                    times += [time] * COUNTS
                bar()
            fitted = LatencyModel.fit(ops, times, meter.runtime.name)
    return fitted, {number: time / (fitted.rest + fitted.of(each)) for number, (each, time) in timed.items()}


def _time(meter: LatencyMeter, model: nn.Module) -> float | None:
    """What a variant takes; None where the runtime cannot run this one, which nobody asked for."""
    try:
        return meter.relative_time(model)
    except ModelError:
        return None


def shape_variants(
    base: nn.Module, stats: Statistics, choices: Sequence[Choice], narrowing: Method | None
) -> Iterator[nn.Module]:
    """Models with fewer channels, and with random ranks: as the weights give them, for nobody looks at outputs.

    Args:
        base: the model.
        stats: of it.
        choices: what can be done to its layers.
        narrowing: the method that takes out channels, if any.
    """
    if narrowing is not None:
        yield from _narrower(base, stats, narrowing)
    dice = random.Random(0)  # noqa: S311 - ranks, no secrets
    for share in FACTORIZED if choices else ():
        picks = [dice.randrange(1, len(c.options)) if dice.random() < share else 0 for c in choices]
        yield apply_plan(base, describe(stats.network, stats, choices, picks), stats)[0]


def _narrower(base: nn.Module, stats: Statistics, narrowing: Method) -> Iterator[nn.Module]:
    for macs, even in NARROW:
        step = narrowing_step(stats.network, narrowing, macs=macs, even=even)
        try:
            yield apply_plan(base, Plan((step,)), stats)[0]
        except CallError:  # its channels cannot go so far
            continue

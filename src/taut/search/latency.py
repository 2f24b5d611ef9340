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
from taut.measure import Pace, Stopwatch
from taut.measure.latency_model import Ops, model_ops
from taut.methods import settings
from taut.planning.application import apply_plan
from taut.planning.plan import Choice, describe
from taut.search.joint import ASKED
from taut.structure.statistics import Statistics
from taut.types import Group, Method, Plan, Step

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


def find_pace(
    base: nn.Module,
    stats: Statistics,
    choices: Sequence[Choice],
    slim: Sequence[Method],
    watch: Stopwatch,
    drafts: Callable[[Pace], Iterable[tuple[float, nn.Module]]],
) -> tuple[Pace, dict[float, float]]:
    """Rates fitted to variants of a model, each timed in turns with the original.

    A plan that is made for its predicted time seeks out where the prediction is too low. So plans are timed as well.

    Args:
        base: the model.
        stats: of it.
        choices: what can be done to its layers.
        slim: methods that take out channels; the first is used.
        watch: the original in its fastest runtime.
        drafts: models that the budget leads to at some pace, with a number for each.

    Returns:
        Beside it the measured over the predicted time of the last drafts, by their numbers.
    """
    example = stats.network.example
    ops, shares = [model_ops(base, example)], [watch.share(base)]
    with stage("timing variants") as bar:
        for model in variants(base, stats, choices, slim):
            if (share := _share(watch, model)) is not None:
                ops.append(model_ops(model, example))
                shares.append(share)
            bar()
        pace = Pace.fit(ops, shares, watch.runtime.name)
        for _ in range(ROUNDS):
            found: dict[float, tuple[Ops, float]] = {}
            for number, model in drafts(pace):
                if (share := _share(watch, model)) is not None:
                    found[number] = model_ops(model, example), share
                    ops += [found[number][0]] * COUNTS
                    shares += [share] * COUNTS
                bar()
            pace = Pace.fit(ops, shares, watch.runtime.name)
    return pace, {number: share / (pace.rest + pace.of(each)) for number, (each, share) in found.items()}


def _share(watch: Stopwatch, model: nn.Module) -> float | None:
    """What a variant takes; None where the runtime cannot run this one, which nobody asked for."""
    try:
        return watch.share(model)
    except ModelError:
        return None


def variants(
    base: nn.Module, stats: Statistics, choices: Sequence[Choice], slim: Sequence[Method]
) -> Iterator[nn.Module]:
    """Models with fewer channels, and with random ranks: as the weights give them, for nobody looks at outputs."""
    net = stats.network
    for macs, even in NARROW if slim else ():
        method = slim[0]
        layers = tuple(layer for layer in net.layers if method.refuses(Group((layer,))) is None)
        group = Group(layers)
        asked = {**dict.fromkeys(ASKED), "macs": macs, "even": even}
        step = Step(group.names, method.name, {**settings(method), **asked}, group)
        try:
            yield apply_plan(base, Plan((step,)), stats)[0]
        except CallError:  # its channels cannot go so far
            continue
    dice = random.Random(0)  # noqa: S311 - ranks, no secrets
    for share in FACTORIZED if choices else ():
        picks = [dice.randrange(1, len(c.options)) if dice.random() < share else 0 for c in choices]
        yield apply_plan(base, describe(net, stats, choices, picks), stats)[0]

"""Small knapsacks, and the least damage of all combinations written out."""

from itertools import product

import taut
from cases import case
from taut import Network
from taut.methods.low_rank.svd import SVD
from taut.planning.candidates import Choice, Option
from taut.planning.knapsack import HEADER_BYTES
from taut.types import Cost, Group, Layer


def option(rank, params, macs, damage):
    """A thing that can be done; rank 0 keeps the layer."""
    return Option(SVD(rank=rank) if rank else None, Cost(params, params, macs, 4 * params), damage)


def problem(tables, fixed=(0, 0)):
    """A network and choices from tables of (params, macs, damage), the first row of each the layer as it is."""
    choices = []
    for i, rows in enumerate(tables):
        params, macs, _ = rows[0]
        layer = Layer(f"l{i}", "Linear", (1, 1), macs=macs, params=params)
        choices.append(Choice(Group((layer,)), tuple(option(r, *row) for r, row in enumerate(rows))))
    total = sum((c.options[0].cost for c in choices), Cost(fixed[0], fixed[0], fixed[1], 4 * fixed[0]))
    return Network(tuple(c.group.layer for c in choices), total), choices


def cost_of(net, choices, picks, key):
    """What a combination costs in one key, the estimate of file headers included."""
    total = getattr(net.cost, key)
    for choice, i in zip(choices, picks, strict=True):
        chosen = choice.options[i]
        total += getattr(chosen.cost, key) - getattr(choice.options[0].cost, key)
        total += 2 * HEADER_BYTES * (key == "bytes" and chosen.method is not None)
    return total


def damage_of(choices, picks):
    return sum(choice.options[i].damage for choice, i in zip(choices, picks, strict=True))


def capped(net, choices, limits):
    """The limits, with no more multiply-accumulates than before where a budget of parameters could raise them."""
    rows = [(option, choice.options[0]) for choice in choices for option in choice.options]
    raised = any(option.cost.macs > before.cost.macs for option, before in rows)
    return limits if not raised or "macs" in limits else {**limits, "macs": net.cost.macs}


def best(net, choices, limits):
    """The least damage over all combinations within the limits, or None."""
    limits = capped(net, choices, limits)
    fits = [
        damage_of(choices, picks)
        for picks in product(*(range(len(c.options)) for c in choices))
        if all(cost_of(net, choices, picks, key) <= limit for key, limit in limits.items())
    ]
    return min(fits, default=None)


def observed(name):
    model, example = case(name).make()
    net = taut.trace(model, example)
    return net, taut.observe(net, model, case(name).data())

"""Blocks among the candidates: each goes with all of its layers, at the damage that was measured without it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from taut.core.data import collect
from taut.core.progress import track
from taut.errors import ModelError
from taut.measure.latency_model import LayerOps, layer_ops
from taut.methods.blocks import Blocks
from taut.planning.candidates import Choice, Option, survey
from taut.recovery.judging import Judge
from taut.structure.blocks import departs_without, without
from taut.structure.statistics import Statistics
from taut.structure.surgery import shallow
from taut.types import Cost, Group, Layer, Method, Network

SAMPLES = 128
"""Inputs on which the output without a block is compared."""


def survey_all(  # noqa: PLR0913 - what a session knows
    net: Network,
    model: nn.Module,
    stats: Statistics,
    data: Sequence[tuple[Any, Any]] | None,
    methods: Sequence[Method],
    align: int = 1,
    *,
    timed: bool = False,
    before: Sequence[Choice] = (),
) -> tuple[Choice, ...]:
    """What can become of every layer, and of blocks, where `blocks` is among the methods.

    Args:
        net: what `trace` found.
        model: the traced model; it is not changed.
        stats: what `observe` found.
        data: calibration batches, on which the damage of blocks is measured: without any, none is offered.
        methods: all that are wished for.
        align: every rank is a multiple of it.
        timed: whether times are to be predicted.
        before: choices of the network before its channels went, whose blocks do as much harm here.
    """
    choices = survey(net, stats, [method for method in methods if not isinstance(method, Blocks)], align, timed=timed)
    if data is None or not any(isinstance(method, Blocks) for method in methods):
        return tuple(choices)
    known = _known_blocks(net, before)
    return with_blocks(net, choices, known or measured_blocks(net, model, stats, data), timed=timed)


def _known_blocks(net: Network, choices: Sequence[Choice]) -> list[tuple[Layer, Blocks, float]]:
    """The blocks of a network that others of the same names were measured for."""
    options = [(choice.name, o) for choice in choices if choice.block is not None for o in choice.options]
    found = {name: (o.method, o.damage) for name, o in options if isinstance(o.method, Blocks)}
    return [(block, *found[block.name]) for block in net.blocks if block.name in found]


def measured_blocks(
    net: Network, model: nn.Module, stats: Statistics, data: Sequence[tuple[Any, Any]]
) -> list[tuple[Layer, Blocks, float]]:
    """The blocks that may go, each with the way that does less harm, and how far the output moves without it.

    Args:
        net: what `trace` found; blocks with a layer inside that the user wants kept stay.
        model: the traced model; it is not changed.
        stats: say how outputs are read.
        data: calibration batches.
    """
    example, copied = net.example, shallow(model)
    quick = Judge(example, copied, [example.value], stats.kinds)
    judge = Judge(example, copied, [inputs for inputs, _ in collect(example, data, SAMPLES)], stats.kinds)

    def damage(judge: Judge, block: Layer, method: Blocks) -> float:
        try:
            with without(copied, block, method.way):
                return judge.divergence(copied)
        except (AttributeError, TypeError, ModelError):  # other code uses something in it
            return math.inf

    wanted = net.kept | set(net.floors)
    free = [block for block in net.blocks if block.block is not None and wanted.isdisjoint(block.block.layers)]
    measured = []
    for block in track(free, "measuring blocks") if free else ():
        method = min(Blocks().candidates(Group((block,)), None), key=lambda method: damage(quick, block, method))
        moved = damage(judge, block, method)
        if math.isfinite(moved) and departs_without(copied, example, block, method.way) is None:
            measured.append((block, method, moved))
    return measured


def with_blocks(
    net: Network, choices: Sequence[Choice], blocks: Sequence[tuple[Layer, Blocks, float]], *, timed: bool = False
) -> tuple[Choice, ...]:
    """The choices with one for every block, and with the option for all that is inside to go with it.

    A block's own choice bears the cost of what is in it and has no choice of its own, such as norms and attention.

    Args:
        net: the network.
        choices: for its layers.
        blocks: what may go, and at which damage.
        timed: whether times are to be predicted.
    """
    inside = {block.name: set(block.block.layers) for block, *_ in blocks if block.block is not None}
    nested = {name: [other for other in inside if other.startswith(f"{name}.")] for name in inside}
    choices = [choice for choice in choices if not _divided(choice, inside)]
    chosen = {choice.name: choice.options[0].cost for choice in choices}
    behind = {name for choice in choices for name in choice.group.names[1:]}
    own: dict[str, Cost] = {}
    all_choices = []
    for block, method, damage in sorted(blocks, key=lambda found: len(found[0].name.split(".")), reverse=True):
        held = sum((cost for name, cost in chosen.items() if name in inside[block.name]), Cost())
        held = sum((own[name] for name in nested[block.name]), held)
        own[block.name] = block.cost - held
        deeper = {name for inner in nested[block.name] for name in inside[inner]}
        rest = [la for la in net.layers if la.name in inside[block.name] - set(chosen) - behind - deeper]
        ops = _ops(rest) if timed else None
        options = (Option(None, own[block.name], 0.0, ops), Option(method, Cost(), damage, _ops([]) if timed else None))
        all_choices.append(Choice(Group((block,)), options))
    whole = (*all_choices, *choices)
    return tuple(replace(choice, options=(*choice.options, *_going(choice, inside, timed=timed))) for choice in whole)


def _divided(choice: Choice, inside: dict[str, set[str]]) -> bool:
    """Whether layers of one weight stand inside and outside of a block: if it went, some of them would stay."""
    return any(0 < len(layers & set(choice.group.names)) < len(choice.group.names) for layers in inside.values())


def _going(choice: Choice, inside: dict[str, set[str]], *, timed: bool) -> list[Option]:
    """The options to go with each of the blocks in which a layer, or another block, stands."""
    name, block = choice.name, choice.block
    around = [
        outer for outer, layers in inside.items() if (name in layers if block is None else name.startswith(f"{outer}."))
    ]
    return [Option(None, Cost(), 0.0, _ops([]) if timed else None, outer) for outer in around]


def _ops(layers: Sequence[Layer]) -> LayerOps:
    """What layers do when they run."""
    rows = [layer_ops(layer) for layer in layers]
    return np.concatenate(rows) if rows else np.zeros((0, 4))

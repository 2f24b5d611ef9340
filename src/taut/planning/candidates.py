"""Candidates: what each layer could become, at which cost and damage, less what another option beats in all."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from taut.core.files import one_line
from taut.core.progress import track
from taut.errors import CallError, ModelError
from taut.measure.latency_model import LayerOps, built_ops, features, layer_ops
from taut.methods import settings
from taut.structure.statistics import Statistics
from taut.types import Block, Cost, Group, Looking, Method, Network, shrinks
from taut.types.method import costs_by_layer


@dataclass(frozen=True)
class Option:
    """One thing that can be done to a layer: a resolved method, or None to keep it.

    Attributes:
        ops: what it does when it runs, where times are to be predicted.
        block: the block with which the layer goes; "" where it stays or is changed for itself.
    """

    method: Method | None
    cost: Cost
    damage: float
    ops: LayerOps | None = field(default=None, compare=False)
    block: str = ""


@dataclass(frozen=True)
class Choice:
    """A layer, or layers of one weight, with everything that can be done to it; the first option keeps it."""

    group: Group
    options: tuple[Option, ...]

    @property
    def name(self) -> str:
        """Of the first of the layers, by which the choice goes."""
        return self.group.names[0]

    @property
    def block(self) -> Block | None:
        """What stands in it, where it is a block."""
        return self.group.layers[0].block


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
    own = tuple(reason for method in methods for reason in getattr(method, "of_their_own", ()))
    free = [la for la in net.layers if la.skip is None or (la.skip in own and la.name in stats.asides)]
    tied = [group for group in net.tied if all(name in stats.asides for name in group.names)]
    for group in track([*(Group((layer,)) for layer in free), *tied], "decomposing"):
        ops = np.concatenate([layer_ops(layer) for layer in group.layers]) if timed else None
        options = [Option(None, group.cost, 0.0, ops)]
        for method in methods:
            if method.refuses(group) is None and (factors := _factors(stats, group, method)) is not None:
                options += [
                    Option(
                        candidate,
                        candidate.cost(group),
                        stats.damage(group, candidate),
                        built_ops(group, candidate) if timed else None,
                    )
                    for candidate in _offered(method, group, factors)
                    if aligned(candidate, align)
                ]
        options = [options[0], *(option for option in options[1:] if _allowed(net, group, option))]
        if len(options) > 1:
            choices.append(Choice(group, tuple(pareto(options))))
    return choices


def _offered(method: Method, group: Group, factors: Any) -> Sequence[Method]:
    """The candidates of a method; with the ranks that it was asked for with, where there are some."""
    candidates = method.candidates(group, factors)
    given = {key: rank for key in method.rank_settings if (rank := getattr(method, key, None)) is not None}
    if not given:
        return candidates
    found: list[Method] = []
    for candidate in candidates:
        one: Method = replace(candidate, **given)  # type: ignore[type-var]
        if one not in found and _fits(one, group):
            found.append(one)
    return found


def _fits(method: Method, group: Group) -> bool:
    """Whether ranks are such as the layers may have, and make something smaller."""
    try:
        return shrinks(method, group)
    except CallError:
        return False


def _allowed(net: Network, group: Group, option: Option) -> bool:
    """Whether an option leaves of every layer what the user wants to stay."""
    if option.method is None or not net.floors.keys() & set(group.names):
        return True
    return all(net.allows(name, cost) for name, cost in costs_by_layer(option.method, group).items())


def _factors(stats: Statistics, group: Group, method: Method) -> Any:
    """The decomposition; None, and a warning, where the layer's values leave the range of floats."""
    try:
        return stats.factors(group, method)
    except (torch.linalg.LinAlgError, ModelError) as error:  # type: ignore[attr-defined]
        warnings.warn(
            f"Layer '{', '.join(group.names)}' is not decomposed by {method.name}: {one_line(error)}", stacklevel=2
        )
        return None


def aligned(method: Method, align: int) -> bool:
    """Whether every rank of a resolved method is a multiple of `align`."""
    ranks = [value for key, value in settings(method).items() if key in method.rank_settings]
    return all(rank % align == 0 for rank in ranks if isinstance(rank, int))


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
    return (0.0,) if option.ops is None else tuple(features(option.ops, 1))


def scaled(choices: Sequence[Choice], before: Network, after: Network) -> tuple[Choice, ...]:
    """The choices for layers that became narrower, as far as those of the whole ones tell: nothing is decomposed.

    What a rank costs falls as the layer's own cost does, and its damage stays: as if the spectrum were as steep as it
    was. Of blocks, and of layers that are left alone now, there are none.

    Args:
        choices: for the layers as they were.
        before: the network that these belong to.
        after: the narrower one.
    """
    free = {layer.name for layer in after.layers if layer.skip is None or before[layer.name].skip is not None}
    return tuple(
        _scaled(choice, before, after) for choice in choices if choice.block is None and free >= set(choice.group.names)
    )


def _scaled(choice: Choice, before: Network, after: Network) -> Choice:
    group = after.group(choice.group.names)
    was, now = before.group(choice.group.names).cost, group.cost
    shares = [n / max(w, 1) for n, w in zip(now.values(), was.values(), strict=True)]

    def cost(option: Option) -> Cost:
        return Cost(*(round(c * share) for c, share in zip(option.cost.values(), shares, strict=True)))

    options = [replace(o, cost=cost(o), ops=None) for o in choice.options[1:] if not o.block]
    return Choice(group, (Option(None, now, 0.0), *options))

"""The knapsack: one option per layer, damages add up, every budget key is one linear constraint.

Solved to optimality (gap 1e-4) as an integer program.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from taut.measure.latency_model import LatencyModel
from taut.planning.candidates import Choice, Option
from taut.types import Network

HEADER_BYTES = 96
"""Upper estimate of what one more tensor adds to the header of a safetensors file."""

Limits = Mapping[str, float]

ONE_AT_A_TIME = threading.Lock()
"""A process has one standard output."""


def network_cost(net: Network, key: str, latency: LatencyModel | None = None) -> float:
    """What a network costs by a key of a budget; its time is predicted, as a share of the original's."""
    if key != "latency":
        return float(getattr(net.cost, key))
    return 1.0 if latency is None else latency.total(net)


def solve(
    net: Network, choices: Sequence[Choice], limits: Limits, latency: LatencyModel | None = None
) -> list[int] | None:
    """The index of the chosen option per choice, or None where the limits cannot be met."""
    limits = _at_most_the_whole(net, choices, limits)
    aims = dict(limits)
    for _ in range(4):  # the solver tolerates an excess of 1e-6 of a limit, a budget does not
        picks = _least_damage(net, choices, aims, latency)
        if picks is None:
            return None
        over = {
            key: excess for key in limits if (excess := _total(net, choices, picks, key, latency) - limits[key]) > 0
        }
        if not over:
            return picks
        aims = {key: aim - max(2 * over[key], 2e-6 * limits[key]) if key in over else aim for key, aim in aims.items()}
    return None


def _total(
    net: Network, choices: Sequence[Choice], picks: Sequence[int], key: str, latency: LatencyModel | None
) -> float:
    changes = (
        option_cost(c.options[i], key, latency) - option_cost(c.options[0], key, latency)
        for c, i in zip(choices, picks, strict=True)
    )
    return network_cost(net, key, latency) + sum(changes)


def _least_damage(
    net: Network, choices: Sequence[Choice], limits: Limits, latency: LatencyModel | None
) -> list[int] | None:
    table = Knapsack(net, choices, limits, latency)
    picks = table.minimize(1.0)
    if picks is None:
        return None
    total = sum(choice.options[i].damage for choice, i in zip(choices, picks, strict=True))
    if total < 1e-12:  # rounding noise ranks nothing
        return picks
    again = table.minimize(1.0 / total)  # the objective near 1: HiGHS has absolute tolerances
    return picks if again is None else again


def closest(net: Network, choices: Sequence[Choice], limits: Limits, latency: LatencyModel | None = None) -> list[int]:
    """The choice whose worst ratio of cost to limit is lowest, for when the limits cannot be met."""
    return Knapsack(net, choices, _at_most_the_whole(net, choices, limits), latency).shrink(tuple(limits))


def _at_most_the_whole(net: Network, choices: Sequence[Choice], limits: Limits) -> Limits:
    """The limits, and where options trade multiply-accumulates for parameters, that there are no more of these."""
    dearer = any(option.cost.macs > choice.options[0].cost.macs for choice in choices for option in choice.options)
    return {"macs": float(net.cost.macs), **limits} if dearer else limits


def least(
    net: Network, choices: Sequence[Choice], limits: Limits, latency: LatencyModel | None = None
) -> dict[str, float]:
    """What the closest choice costs by every key."""
    picks = closest(net, choices, limits, latency)
    return {key: _total(net, choices, picks, key, latency) for key in limits}


class Knapsack:
    """The integer program: variables are options, grouped by layer; costs are fractions of the limits."""

    def __init__(self, net: Network, choices: Sequence[Choice], limits: Limits, latency: LatencyModel | None) -> None:
        """Scale costs to the limits."""
        self.choices, self.keys = choices, tuple(limits)
        limits = {key: limit if key == "latency" else max(limit, 0.5) for key, limit in limits.items()}
        options = [option for choice in choices for option in choice.options]
        self.damage = np.array([option.damage for option in options])
        sizes = [len(choice.options) for choice in choices]
        rows = np.repeat(np.arange(len(choices)), sizes)
        self.one = csr_matrix((np.ones(len(options)), (rows, np.arange(len(options)))), (len(choices), len(options)))
        before = [choice.options[0] for choice in choices]
        self.cost = np.array([[option_cost(o, key, latency) / limit for o in options] for key, limit in limits.items()])
        fixed = [
            network_cost(net, key, latency) - sum(option_cost(option, key, latency) for option in before)
            for key in limits
        ]
        self.room = np.array([1 - f / limit for f, limit in zip(fixed, limits.values(), strict=True)])
        self.starts = np.cumsum([0, *sizes])
        self.coupled = self._coupled(options)

    def minimize(self, scale: float) -> list[int] | None:
        """Least damage within the limits."""
        n = len(self.damage)
        if not n:
            return [] if (self.room >= 0).all() else None
        thrift = 1e-6 * self.cost.mean(0)  # of two equal plans the cheaper
        found = _solved(
            self.damage * scale + thrift,
            constraints=[
                LinearConstraint(self.one, 1, 1),
                LinearConstraint(self.cost, -np.inf, self.room),
                *([LinearConstraint(self.coupled, 0, 0)] if self.coupled.shape[0] else []),
            ],
            integrality=np.ones(n),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 1e-4},
        )
        return None if found.x is None else self._picks(found.x)

    def shrink(self, wanted: Sequence[str]) -> list[int]:
        """Least worst ratio of the wanted keys: minimize t with cost + fixed <= t limit, the others within theirs."""
        n = len(self.damage)
        if not n:
            return []
        asked = np.array([key in wanted for key in self.keys], dtype=float)
        padded = csr_matrix(np.hstack([self.cost, -asked[:, None]]))
        one, coupled = (
            csr_matrix((rows.data, rows.indices, rows.indptr), (rows.shape[0], n + 1))
            for rows in (self.one, self.coupled)
        )
        found = _solved(
            np.append(1e-9 * self.damage / max(self.damage.max(), 1e-300), 1.0),
            constraints=[
                LinearConstraint(one, 1, 1),
                LinearConstraint(padded, -np.inf, self.room - asked),
                *([LinearConstraint(coupled, 0, 0)] if coupled.shape[0] else []),
            ],
            integrality=np.append(np.ones(n), 0),
            bounds=Bounds(0, np.append(np.ones(n), np.inf)),
        )
        return self._picks(found.x[:n])

    def _coupled(self, options: Sequence[Option]) -> csr_matrix:
        """A row for every option of a layer to go with a block: it is chosen if and only if the block goes."""
        going = {
            choice.name: int(start) + 1
            for choice, start in zip(self.choices, self.starts, strict=False)
            if choice.block is not None
        }
        pairs = [(place, going[option.block]) for place, option in enumerate(options) if option.block]
        rows = np.repeat(np.arange(len(pairs)), 2)
        columns = np.array(pairs, dtype=int).reshape(-1)
        return csr_matrix((np.tile([1.0, -1.0], len(pairs)), (rows, columns)), (len(pairs), len(options)))

    def _picks(self, x: np.ndarray) -> list[int]:
        return [int(np.argmax(x[a:b])) for a, b in zip(self.starts, self.starts[1:], strict=False)]


def option_cost(option: Option, key: str, latency: LatencyModel | None = None) -> float:
    """What an option costs by a key of a budget."""
    if key == "latency":
        return 0.0 if latency is None or option.ops is None else latency.of(option.ops)
    value = float(getattr(option.cost, key))
    return value + 2 * HEADER_BYTES if key == "bytes" and option.method is not None else value


def _solved(*objective: Any, **program: Any) -> Any:
    """What scipy's `milp` finds."""
    with ONE_AT_A_TIME, _beside_the_output():
        return milp(*objective, **program)


@contextmanager
def _beside_the_output() -> Iterator[None]:
    """What C code prints meanwhile goes to standard error.

    HiGHS as of scipy 1.17 tells of some of its steps whatever it is told of logging; what reads a command's JSON must
    not meet that.
    """
    with suppress(TypeError, OSError):  # what was printed before belongs to the output
        ctypes.CDLL(None).fflush(None)
    try:
        kept = os.dup(1)
    except OSError:  # there is no standard output
        yield
        return
    try:
        os.dup2(2, 1)
        yield
    finally:
        with suppress(TypeError, OSError):  # what C holds back is written now, and not once 1 is the output again
            ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)

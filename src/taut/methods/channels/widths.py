"""How many channels every coupled group keeps: least damage for the cost that is saved.

The cost of a layer is a product of the widths on its two sides, so groups are not independent and no knapsack fits.
Instead widths fall one move at a time, each the move with the least damage per cost that it saves at the network as it
is by then; the last moves that turn out not to be needed are taken back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from taut.measure.latency_model import filled, layer_ops
from taut.methods.narrow_layers import sizes_of
from taut.structure.channels.groups import ChannelGroup
from taut.types import Layer

KEYS = ("macs", "params", "channels", "latency")


def width_grid(size: int, align: int | None = None) -> list[int]:
    """The widths on offer: multiples that kernels like, and `size` itself.

    Args:
        size: channels of the group.
        align: all are multiples of it; None: 1 up to 8, then 2, 4, and 8 above 32 (16 above 256).
    """
    if align is not None:
        return sorted({*range(align, size, align), size})
    steps = ((8, 1), (16, 2), (32, 4), (256, 8), (1 << 62, 16))
    grid: list[int] = []
    width = 0
    while True:
        width += next(step for limit, step in steps if width < limit)
        if width >= size:
            return [*grid, size]
        grid.append(width)


@dataclass
class Costs:
    """The cost of a network as a function of how many channels each group has lost.

    Attributes:
        layers: all that a step may narrow. groups: of their channels.
        rates: of their time, and lanes (`taut.measure.LatencyModel`), for the key "latency".
        floors: weights that every layer keeps at least; None: any.
    """

    layers: Sequence[Layer]
    groups: Sequence[ChannelGroup]
    rates: Sequence[float] = (0.0, 0.0, 0.0, 0.0, 1.0)
    floors: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Sides, and what each lost channel takes from them."""
        place = {layer.name: i for i, layer in enumerate(self.layers)}
        shape = len(self.layers), len(self.groups)
        rows, columns = np.zeros(shape), np.zeros(shape)
        out, into = np.ones(shape[0]), np.ones(shape[0])
        for g, group in enumerate(self.groups):
            for member in group.members:
                i = place[member.layer]
                if member.end == "in":
                    into[i], columns[i, g] = member.width, member.index.shape[1]
                else:
                    out[i], rows[i, g] = member.width, member.index.shape[1]
        self.rows, self.columns = rows / out[:, None], columns / into[:, None]
        bias = np.array([sizes_of(layer)[0] if layer.bias else 0 for layer in self.layers], dtype=float)
        self.macs = np.array([layer.macs for layer in self.layers], dtype=float)
        self.params = np.array([layer.params for layer in self.layers], dtype=float) - bias
        self.bias = bias
        self._time([layer.groups > 1 for layer in self.layers])
        self.touched = [((rows[:, g] > 0) | (columns[:, g] > 0)).nonzero()[0] for g in range(len(self.groups))]

    def allowed(self, lost: np.ndarray) -> np.ndarray:
        """Whether every layer keeps as many weights as its floor says: (states,) for lost channels (states, groups)."""
        if self.floors is None:
            return np.ones(len(lost), dtype=bool)
        weights = np.array([math.prod(layer.weight) if layer.weight else 0 for layer in self.layers], dtype=float)
        left = (1 - lost @ self.rows.T) * (1 - lost @ self.columns.T) * weights
        allowed: np.ndarray = (left >= np.minimum(self.floors, weights) - 1e-6).all(1)
        return allowed

    def narrowest(self) -> np.ndarray:
        """Channels that the groups can lose at most, one group after the other."""
        lost = np.zeros(len(self.groups))
        for g, group in enumerate(self.groups):
            states = np.repeat(lost[None], group.size, 0)
            states[:, g] = np.arange(group.size)
            lost[g] = self.allowed(states).nonzero()[0][-1]
        return lost

    def _time(self, grouped: Sequence[bool]) -> None:
        """Terms of the time: what falls with both widths, with the outputs, with the inputs, and what stays."""
        kernel, point, value, call, lanes = self.rates
        ops = [layer_ops(layer) for layer in self.layers]
        wide = np.array([len(rows) > 0 and rows[0, 2] > 0 for rows in ops])
        through = np.array(grouped)  # of grouped layers as many inputs go as outputs
        self.time = np.array([rows[:, 0].sum() for rows in ops]) * np.where(wide, kernel, point)
        shares = np.array([_read_and_written(layer) for layer in self.layers]) * value
        self.written = shares[:, 1] + shares[:, 0] * through
        self.read = shares[:, 0] * ~through
        self.calls = np.array([float(len(rows)) for rows in ops]) * call
        self.outputs = np.array([rows[0, 3] if len(rows) else 0.0 for rows in ops])
        self.lanes = int(lanes)

    def of(self, lost: np.ndarray, keys: Mapping[str, float], layers: np.ndarray | None = None) -> np.ndarray:
        """Cost in units of the keys' limits, summed: (states,) for lost channels (states, groups).

        Args:
            lost: channels that every group has lost.
            keys: of KEYS, with what each is divided by.
            layers: places of the layers to count; None: all.
        """
        some = slice(None) if layers is None else layers
        out, into = 1 - lost @ self.rows[some].T, 1 - lost @ self.columns[some].T
        both = out * into
        found = np.zeros(len(lost))
        if "macs" in keys:
            found += both @ self.macs[some] / keys["macs"]
        if "params" in keys:
            found += (both @ self.params[some] + out @ self.bias[some]) / keys["params"]
        if "latency" in keys:
            moved = out @ self.written[some] + into @ self.read[some]
            full = both * filled(out * self.outputs[some], self.lanes)
            found += (full @ self.time[some] + moved + self.calls[some].sum()) / keys["latency"]
        if "channels" in keys:
            sizes = np.array([group.size for group in self.groups], dtype=float)
            found += (sizes.sum() - lost.sum(1)) / keys["channels"]
        return found


def _read_and_written(layer: Layer) -> tuple[float, float]:
    """Values per sample that a layer whose time is known reads and writes."""
    if not len(layer_ops(layer)):
        return 0.0, 0.0
    read = sum(math.prod(call.input) for call in layer.calls) / layer.batch
    return read, sum(math.prod(call.output) for call in layer.calls) / layer.batch


@dataclass(frozen=True)
class Curve:
    """A group's order of removal, and the damage of every width.

    Attributes:
        order: channels, the one that goes first in front.
        damages: (n + 1,), of losing 0, 1, ... n channels.
        comparable: whether these are in the unit of all methods, and count all that reads the channels.
    """

    order: np.ndarray
    damages: np.ndarray
    comparable: bool = False


def damage_of(groups: Sequence[ChannelGroup], curves: Sequence[Curve], counts: Sequence[int]) -> float | None:
    """Of the channels that go; None where it is not in the unit of all methods."""
    lost = [(c, g.size - n) for g, c, n in zip(groups, curves, counts, strict=True) if n < g.size]
    return sum(float(c.damages[n]) for c, n in lost) if all(c.comparable for c, _ in lost) else None


def choose_widths(
    costs: Costs, curves: Sequence[Curve], limits: Mapping[str, float], align: int | None = None
) -> list[int] | None:
    """Channels that every group keeps, so that all limits hold; None where they cannot.

    Args:
        costs: of the network.
        curves: of every group.
        limits: key of KEYS -> what it may be at most, absolute.
        align: see `width_grid`.
    """
    sizes = [group.size for group in costs.groups]
    grids = [np.array([n - w for w in reversed(width_grid(n, align))]) for n in sizes]  # lost channels, rising
    lost = np.zeros(len(sizes), dtype=np.int64)
    while over := _over(costs, lost, limits):
        best, move = np.inf, None
        for g, grid in enumerate(grids):
            further = _within_floors(costs, lost, g, grid[grid > lost[g]])
            if len(further):
                slope, place = _steepest(costs, curves[g], lost, g, further, over)
                if slope < best:
                    best, move = slope, (g, int(further[place]))
        if move is None:
            return None
        lost[move[0]] = move[1]
    _give_back(costs, curves, lost, grids, limits)
    return [int(n - gone) for n, gone in zip(sizes, lost, strict=True)]


def _within_floors(costs: Costs, lost: np.ndarray, g: int, further: np.ndarray) -> np.ndarray:
    """Those of the numbers of channels that a group may lose with regard to what layers have to keep."""
    states = np.repeat(lost[None].astype(float), len(further), 0)
    states[:, g] = further
    within: np.ndarray = further[costs.allowed(states)]
    return within


def _over(costs: Costs, lost: np.ndarray, limits: Mapping[str, float]) -> dict[str, float]:
    """The limits that do not hold yet."""
    state = lost[None].astype(float)
    least = {"latency": 1e-9}
    return {
        key: max(limit, least.get(key, 0.5))
        for key, limit in limits.items()
        if float(costs.of(state, {key: 1.0})[0]) > limit
    }


def _steepest(
    costs: Costs, curve: Curve, lost: np.ndarray, g: int, further: np.ndarray, keys: Mapping[str, float]
) -> tuple[float, int]:
    """The least damage per saved cost that narrowing one group has to offer."""
    states = np.repeat(lost[None].astype(float), len(further) + 1, 0)
    states[1:, g] = further
    layers = costs.touched[g]
    cost = costs.of(states, keys, layers)
    saved = cost[0] - cost[1:]
    rise = curve.damages[further] - curve.damages[lost[g]]
    with np.errstate(divide="ignore", invalid="ignore"):
        slopes = np.where(saved > 0, (rise + 1e-300) / saved, np.inf)
    place = int(slopes.argmin())
    return float(slopes[place]), place


def _give_back(
    costs: Costs, curves: Sequence[Curve], lost: np.ndarray, grids: Sequence[np.ndarray], limits: Mapping[str, float]
) -> None:
    """Widen groups again, in place, as long as the limits hold: first where that heals most."""
    while True:
        best, move = 0.0, None
        for g, grid in enumerate(grids):
            less = grid[grid < lost[g]]
            if not len(less):
                continue
            state = lost.copy()
            state[g] = less[-1]
            healed = float(curves[g].damages[lost[g]] - curves[g].damages[less[-1]])
            if healed > best and not _over(costs, state, limits):
                best, move = healed, (g, int(less[-1]))
        if move is None:
            return
        lost[move[0]] = move[1]


def even_widths(costs: Costs, limits: Mapping[str, float], align: int | None = None) -> list[int] | None:
    """The same share of every group, the largest for which the limits hold; None where there is none.

    Groups that would leave less of a layer than its floor says lose fewer channels.
    """
    sizes = [group.size for group in costs.groups]
    for percent in range(1000, 0, -1):
        widths = [min(width_grid(n, align), key=lambda w: abs(w - n * percent / 1000)) for n in sizes]
        lost = np.array([n - w for n, w in zip(sizes, widths, strict=True)])
        _raise_to_floors(costs, lost, align)
        if not _over(costs, lost, limits):
            return [int(n - gone) for n, gone in zip(sizes, lost, strict=True)]
    return None


def _raise_to_floors(costs: Costs, lost: np.ndarray, align: int | None) -> None:
    """Give groups channels back, in place, until no layer is below its floor: first the one that lost most of them."""
    sizes = np.array([group.size for group in costs.groups], dtype=float)
    while not costs.allowed(lost[None].astype(float))[0]:
        g = int((lost / sizes).argmax())
        size = costs.groups[g].size
        lost[g] = size - next(width for width in width_grid(size, align) if width > size - lost[g])


def least_within(costs: Costs, limits: Mapping[str, float]) -> str:
    """How far narrowing goes, in words."""
    none = np.zeros((1, len(costs.groups)))
    most = costs.narrowest()[None]
    shares = []
    for key in limits:
        left, whole = (float(costs.of(state, {key: 1.0})[0]) for state in (most, none))
        shares.append(f"{left / max(whole, 1e-12):.3g} of the {key}")
    least = "one channel a group, the least," if costs.floors is None else "the least that the floors allow"
    return f"{least} still leaves {' and '.join(shares)}"

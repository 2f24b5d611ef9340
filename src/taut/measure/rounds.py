"""Calls timed in rounds of random order: low quantiles, and how far they can be trusted.

Other processes make a call longer, often most calls, and never shorter. A low quantile is what the call takes when it
is left alone; the median tells of the others. What is timed is prepared several times: where its data lie in memory and
where its threads run makes a difference, too. Each copy is timed once in every round, at a random place of the order;
what copies of the SAME call differ by is what two different calls may differ by for no reason.
"""

from __future__ import annotations

import gc
import math
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from taut.core.progress import stage
from taut.errors import CallError

Call = Callable[[], object]
"""It returns when its work is done: a device must be waited for inside."""

COPIES = 4
"""How often what is timed is prepared."""

LOW = 0.2
"""The quantile that counts as the time of a call."""

CONFIDENCE = 0.99
"""Of the intervals: sentences are drawn from them."""

LEAST_WIDTH = 1.01
"""A factor by which copies differ at another time, however well they agree in these rounds."""

TYPICAL_ROUNDS, MOST_ROUNDS, LEAST_ROUNDS = 60, 300, 3
"""Rounds of most calls, of the fastest and of the slowest."""

SHORTEST = 1e-3
"""Seconds: a faster call is repeated until it takes this long, for the clock and the loop to weigh nothing."""

WARM_UP_CALLS, WARM_UP_SECONDS = 3, 0.5
"""Calls of each copy before the first round; fewer where they take longer than this."""

BUSY = 1.1
"""Where copies of the same call differ by more than this factor in the same rounds, the machine is busy; where a time
is uncertain by more, it may be."""

EXTRA_TRIES = 2
"""How often a busy machine is given another chance."""


@dataclass(frozen=True)
class Effort:
    """How long to go on.

    Attributes:
        rounds: exactly so many; None: TYPICAL_ROUNDS, more of fast calls, fewer of slow ones.
        least: seconds to fill at least, but with at most MOST_ROUNDS.
        most: seconds after which LEAST_ROUNDS are enough.
    """

    rounds: int | None = None
    least: float = 1.0
    most: float = 3.0

    def __post_init__(self) -> None:
        """Refuse to measure nothing.

        Raises:
            CallError: fewer than 1 round.
        """
        if self.rounds is not None and self.rounds < 1:
            raise CallError(f"The number of rounds must be at least 1. Got {self.rounds} instead.")

    def is_enough(self, rounds: int, seconds: float) -> bool:
        """Whether so many rounds, which took so long, are enough."""
        if self.rounds is not None:
            return rounds >= self.rounds
        if rounds >= MOST_ROUNDS:
            return True
        if seconds >= self.most:
            return rounds >= LEAST_ROUNDS
        return rounds >= TYPICAL_ROUNDS and seconds >= self.least


@dataclass(frozen=True)
class Estimate:
    """A measured number with its interval.

    Attributes:
        value: the number.
        low, high: its 99 % interval.
        apart: by what factor the first and the last copies of the same call differ, at least 1.
    """

    value: float
    low: float
    high: float
    apart: float

    @property
    def busy(self) -> bool:
        """Whether the machine was too busy for any conclusion."""
        return self.apart > BUSY


@dataclass(frozen=True)
class Rounds:
    """Seconds of some calls, by name: (rounds, copies)."""

    seconds: Mapping[str, np.ndarray]

    def time(self, call: str) -> Estimate:
        """Seconds that a call takes."""
        return self._estimate(_low(self.seconds[call]), call)

    def ratio(self, over: str, under: str) -> Estimate:
        """The time of one call divided by that of another."""
        return self._estimate(_low(self.seconds[over]) / _low(self.seconds[under]), over, under)

    @property
    def noise(self) -> float:
        """The largest factor by which copies of the same call differ, or by which the time of a call is uncertain."""
        times = [self.time(call) for call in self.seconds]
        return max(max(time.apart, time.high / time.value) for time in times)

    def and_then(self, others: Rounds) -> Rounds:
        """These rounds and later ones."""
        return Rounds({call: np.concatenate([each, others.seconds[call]]) for call, each in self.seconds.items()})

    def _apart(self, call: str) -> float:
        first, last = (_low(half) for half in np.array_split(self.seconds[call], 2, axis=1))
        return max(first, last) / min(first, last)

    def _estimate(self, value: float, *calls: str) -> Estimate:
        """Student's interval of logarithms: what the copies of each call differ by among themselves is the noise."""
        logs = [np.log(np.quantile(self.seconds[call], LOW, axis=0)) for call in calls]
        freedom = sum(len(each) - 1 for each in logs)
        variance = sum(((each - each.mean()) ** 2).sum() for each in logs) / freedom
        error = math.sqrt(variance * sum(1 / len(each) for each in logs))
        factor = max(math.exp(stdtrit(freedom, (1 + CONFIDENCE) / 2) * error), LEAST_WIDTH)
        return Estimate(value, value / factor, value * factor, max(self._apart(call) for call in calls))


def interleave(runs: Mapping[str, Call], rounds: int = 15, warmup: int = WARM_UP_CALLS) -> dict[str, float]:
    """Milliseconds of each call, all of them called in every round. Deprecated: gives no interval.

    Raises:
        CallError: nothing to run, or fewer than 1 round or warm-up call.
    """
    warnings.warn(
        "taut.measure.interleave gives no interval: taut.measure.latencies and taut.compare do.",
        DeprecationWarning,
        stacklevel=2,
    )
    for key, value in (("warmup", warmup), ("number of runs", len(runs))):
        if value < 1:
            raise CallError(f"The {key} must be at least 1. Got {value} instead.")
    timed = _timed({name: [run] for name, run in runs.items()}, Effort(rounds))
    return {name: 1e3 * _low(seconds) for name, seconds in timed.seconds.items()}


def time_calls(calls: Mapping[str, Sequence[Call]], effort: Effort = Effort()) -> Rounds:
    """Time calls in turns; once more, and once more again, where the machine is too busy.

    Drift of the machine (clock, other processes) hits all calls alike, and what one leaves in the caches is met by any
    other as often as by itself.

    Args:
        calls: by name, COPIES of each.
        effort: how long to go on each time.

    Raises:
        CallError: there is nothing to time.
    """
    if not calls:
        raise CallError("There is nothing to time.")
    rounds = _timed(calls, effort)
    for _ in range(EXTRA_TRIES):
        if rounds.noise <= BUSY:
            break
        with stage("the machine is busy: timing once more"):
            rounds = rounds.and_then(_timed(calls, effort))
    return rounds


def _timed(calls: Mapping[str, Sequence[Call]], effort: Effort) -> Rounds:
    turns = {(name, copy): call for name, copies in calls.items() for copy, call in enumerate(copies)}
    repeats = {turn: _repeats(call) for turn, call in turns.items()}
    order, dice = list(turns), random.Random(0)  # noqa: S311 - an order, no secret
    table: list[dict[tuple[str, int], float]] = []
    with _no_collection():
        start = time.perf_counter()
        while not effort.is_enough(len(table), time.perf_counter() - start):
            dice.shuffle(order)
            table.append({turn: _seconds(turns[turn], repeats[turn]) for turn in order})
    return Rounds(
        {
            name: np.array([[row[name, copy] for copy in range(len(copies))] for row in table])
            for name, copies in calls.items()
        }
    )


def _repeats(call: Call) -> int:
    """How often to call in one measurement, judged by the fastest warm-up call."""
    start, fastest = time.perf_counter(), math.inf
    for _ in range(WARM_UP_CALLS):
        fastest = min(fastest, _seconds(call, 1))
        if time.perf_counter() - start > WARM_UP_SECONDS:
            break
    return max(1, math.ceil(SHORTEST / fastest))


def _seconds(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return max(time.perf_counter() - start, 1e-7) / repeats  # a clock may stand still


def _low(seconds: np.ndarray) -> float:
    return float(np.quantile(seconds, LOW))


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection in the middle of a measurement."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

"""Timing on a clock that only moves when told: order, rounds, quantiles, intervals. No real time."""

import gc
import itertools
import math
import random
import statistics
import time
from collections import Counter

import numpy as np
import pytest

from taut.core.progress import reporting
from taut.errors import CallError
from taut.measure import rounds
from taut.measure.rounds import BUSY, COPIES, LEAST_WIDTH, Effort, Rounds, interleave, time_calls


@pytest.fixture(autouse=True)
def _as_shipped(monkeypatch):
    """The other tests measure less."""
    monkeypatch.setattr(rounds, "MOST_ROUNDS", 300)
    monkeypatch.setattr(rounds, "EXTRA_TRIES", 2)
    monkeypatch.setattr(rounds, "SHORTEST", 1e-3)
    monkeypatch.setattr(rounds, "WARM_UP_CALLS", 3)


class Clock:
    """A clock that only moves when told."""

    def __init__(self, monkeypatch):
        self.now, self.log = 0.0, []
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def copies(self, name, seconds):
        """Copies of a call that takes what `seconds` says of each: a number, or a function without arguments."""

        def call(copy, took):
            def run():
                self.log.append((name, copy))
                self.now += took() if callable(took) else took

            return run

        each = seconds if isinstance(seconds, list) else [seconds] * COPIES
        return [call(copy, took) for copy, took in enumerate(each)]


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_every_copy_is_timed_once_a_round_at_random_places(clock):
    calls = {name: clock.copies(name, 2.0**-8) for name in "ab"}
    time_calls(calls, Effort(rounds=40))
    assert len(clock.log) == 2 * COPIES * (3 + 40)
    played = [clock.log[i : i + 2 * COPIES] for i in range(2 * COPIES * 3, len(clock.log), 2 * COPIES)]
    assert all(Counter(each) == Counter((name, copy) for name in "ab" for copy in range(COPIES)) for each in played)
    assert len({tuple(each) for each in played}) > 35
    for entry in played[0]:  # nobody has a place of its own
        assert len({each.index(entry) for each in played}) == 2 * COPIES


def test_the_order_is_the_same_every_time_and_nobody_elses_dice_are_touched(clock):
    state = random.getstate()
    for _ in range(2):
        time_calls({name: clock.copies(name, 0.5) for name in "ab"}, Effort(rounds=5))
    half = len(clock.log) // 2
    assert clock.log[:half] == clock.log[half:]
    assert random.getstate() == state


def test_fast_calls_are_repeated_to_a_millisecond(clock):
    calls = {"fast": clock.copies("fast", 2.0**-12), "slow": clock.copies("slow", 2.0**-8)}
    times = time_calls(calls, Effort(rounds=2))
    assert [times.time(name).value for name in calls] == [2.0**-12, 2.0**-8]
    assert Counter(name for name, _ in clock.log) == {"fast": COPIES * (3 + 2 * 5), "slow": COPIES * (3 + 2)}


@pytest.mark.parametrize(
    ("seconds", "effort", "count"),
    [
        (2.0**-8, Effort(), 60),
        (2.0**-9, Effort(), 64),  # a second is filled
        (2.0**-14, Effort(least=8.0), 300),
        (2.0**-4, Effort(), 6),  # three seconds are enough
        (1.0, Effort(), 3),
        (1.0, Effort(rounds=7), 7),
    ],
)
def test_fast_calls_get_more_rounds_and_slow_ones_fewer(clock, seconds, effort, count):
    times = time_calls({name: clock.copies(name, seconds) for name in "ab"}, effort)
    assert len(times.seconds["a"]) == count


def test_slow_calls_are_warmed_up_once(clock):
    time_calls({"a": clock.copies("a", 1.0)}, Effort(rounds=1))
    assert len(clock.log) == 2 * COPIES


def test_the_lower_quintile_is_the_time(clock):
    durations = itertools.chain([1.0] * COPIES, itertools.count(1.0))
    times = time_calls({"a": clock.copies("a", lambda: next(durations))}, Effort(rounds=11))
    assert times.time("a").value == pytest.approx(np.quantile(range(1, times.seconds["a"].size + 1), 0.2))


def load(seed, share=0.6):
    """A busy machine: most calls take longer, some much longer."""
    dice = random.Random(seed)
    return lambda seconds: seconds * (1 + 0.002 * dice.random() + (dice.random() < share) * dice.uniform(0.2, 8))


@pytest.mark.parametrize("seed", range(20))
def test_a_call_against_itself_on_a_busy_machine(clock, seed):
    """Where medians of fifteen rounds are out by more than ten per cent: see below."""
    noise = load(seed)
    ratio = time_calls({name: clock.copies(name, lambda: noise(0.0625)) for name in "ab"}, Effort(60)).ratio("a", "b")
    assert 0.9 < ratio.value < 1.1
    assert ratio.low < 1 < ratio.high


def test_medians_of_few_rounds_would_not_do():
    noises = [load(seed) for seed in range(20)]
    medians = [[statistics.median(noise(1.0) for _ in range(15)) for _ in "ab"] for noise in noises]
    assert sum(abs(math.log(a / b)) > math.log(1.1) for a, b in medians) > 10


@pytest.mark.parametrize("seed", range(5))
def test_a_real_difference_is_seen_through_the_noise(clock, seed):
    noise = load(seed)
    calls = {"a": clock.copies("a", lambda: noise(0.0625)), "b": clock.copies("b", lambda: noise(0.046875))}
    ratio = time_calls(calls, Effort(60)).ratio("a", "b")
    assert 1 < ratio.low < 4 / 3 < ratio.high


def test_one_second_calls_in_noise_have_wide_intervals(clock):
    noise = load(0)
    ratio = time_calls({name: clock.copies(name, lambda: noise(1.0)) for name in "ab"}).ratio("a", "b")
    assert ratio.high / ratio.low > 1.5
    assert ratio.low < 1 < ratio.high


def test_the_interval_is_students_of_the_copies():
    a, b = np.log([1.0, 1.01, 1.02, 1.01]), np.log([1.0, 1.03, 1.0, 1.01])
    ratio = Rounds({"a": np.exp(a)[None], "b": np.exp(b)[None]}).ratio("a", "b")
    error = math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 4)
    assert math.log(ratio.high / ratio.value) == pytest.approx(3.7074 * error, rel=1e-4)  # t, 6 degrees, 99 %
    assert math.log(ratio.value / ratio.low) == pytest.approx(3.7074 * error, rel=1e-4)
    alone = Rounds({"a": np.exp(a)[None]}).time("a")
    assert math.log(alone.high / alone.value) == pytest.approx(5.8409 * a.std(ddof=1) / 2, rel=1e-4)  # 3 degrees


def test_copies_that_agree_by_chance_promise_no_more_than_a_per_cent():
    times = Rounds({"a": np.ones((5, COPIES)), "b": np.ones((5, COPIES))})
    ratio = times.ratio("a", "b")
    assert (ratio.value, ratio.low, ratio.high, ratio.apart) == (1.0, 1 / LEAST_WIDTH, LEAST_WIDTH, 1.0)


def test_copies_that_differ_make_no_verdict(clock):
    """Where the same call takes now this, now that, according to where it lies, no two calls can be told apart."""
    calls = {"a": clock.copies("a", [1.0, 1.0, 1.3, 1.0]), "b": clock.copies("b", [1.3, 1.3, 1.0, 1.3])}
    ratio = time_calls(calls, Effort(20)).ratio("a", "b")
    assert ratio.low < 1 < ratio.high


class Words:
    """A reporter that keeps what it hears."""

    def __init__(self):
        self.heard = []

    def start(self, description, total):
        self.heard.append(description)
        return len(self.heard)

    def advance(self, stage, amount):
        pass

    def note(self, stage, text):
        pass

    def end(self, stage):
        pass


def test_a_busy_machine_gets_two_more_chances(clock):
    words = Words()
    with reporting(words):
        times = time_calls({"a": clock.copies("a", [1.0, 1.0, 1.5, 1.5]), "b": clock.copies("b", 1.0)}, Effort(4))
    assert words.heard == ["the machine is busy: timing once more"] * 2
    assert len(times.seconds["a"]) == 12
    assert times.noise >= 1.5
    assert times.ratio("a", "b").busy
    assert times.time("a").busy
    assert not times.time("b").busy


def test_a_machine_that_calms_down_is_believed(clock):
    def took(copy):
        return lambda: 1.0 + 0.5 * (copy > 1 and clock.now < 60)

    words = Words()
    with reporting(words):
        times = time_calls({"a": clock.copies("a", [took(copy) for copy in range(COPIES)])}, Effort(8))
    assert len(words.heard) in {1, 2}
    assert times.noise <= BUSY
    assert times.time("a").value == 1.0


def test_an_uncertain_time_is_measured_again_though_the_halves_agree(clock):
    words = Words()
    with reporting(words):
        times = time_calls({"a": clock.copies("a", [1.0, 1.5, 1.0, 1.5])}, Effort(4))
    assert len(words.heard) == 2
    assert not times.time("a").busy
    assert times.time("a").high > BUSY


def test_a_quiet_machine_is_asked_once(clock):
    words = Words()
    with reporting(words):
        assert len(time_calls({"a": clock.copies("a", 1.0)}, Effort(4)).seconds["a"]) == 4
    assert not words.heard


@pytest.mark.parametrize("number", [0, -1])
def test_nothing_to_measure(number):
    with pytest.raises(CallError, match=rf"rounds must be at least 1\. Got {number} instead"):
        Effort(number)
    with pytest.raises(CallError, match="nothing to time"):
        time_calls({})


def test_garbage_collection_comes_back():
    def fail():
        raise RuntimeError

    assert gc.isenabled()
    time_calls({"a": [lambda: None] * COPIES}, Effort(1))
    assert gc.isenabled()
    with pytest.raises(RuntimeError):
        time_calls({"a": [lambda: None, fail]}, Effort(1))
    assert gc.isenabled()
    gc.disable()
    try:
        time_calls({"a": [lambda: None] * COPIES}, Effort(1))
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_the_former_name_gives_milliseconds_and_warns():
    with pytest.warns(DeprecationWarning, match="interval"):
        found = interleave({"a": lambda: time.sleep(0.001)}, rounds=3, warmup=1)
    assert found["a"] >= 1
    for wrong in ({"rounds": 0}, {"warmup": 0}, {"runs": {}}):
        with pytest.warns(DeprecationWarning, match="interval"), pytest.raises(CallError, match="at least 1"):
            interleave(**({"runs": {"a": lambda: None}} | wrong))

"""Runs that meet: every point is served once, with all that come to it; errors end all of them."""

import threading
import time

import pytest
import torch

from taut.recovery.lockstep import Lockstep


def routes(paths, order="abcd"):
    """What was served, with whom, and in which order the runs went on."""
    served, trace = [], []
    lockstep = Lockstep(
        lambda point, brought: served.append((point, sorted(brought))), {p: i for i, p in enumerate(order)}
    )

    def run(number, path):
        for point in path:
            lockstep.wait(point, number)
            trace.append((number, point))

    lockstep.run([lambda n=number, p=path: run(n, p) for number, path in enumerate(paths)])
    return served, trace


def test_all_runs_meet_at_every_point():
    served, trace = routes(["abc"] * 3)
    assert served == [("a", [0, 1, 2]), ("b", [0, 1, 2]), ("c", [0, 1, 2])]
    assert len(trace) == 9


def test_a_single_run_needs_no_thread():
    before = threading.active_count()
    counts = []
    lockstep = Lockstep(lambda point, brought: counts.append(threading.active_count()), {})
    lockstep.run([lambda: lockstep.wait("a", None)])
    assert counts == [before]


def test_runs_of_other_ways_wait_for_those_that_come_later():
    served, _ = routes(["abd", "acd", "d"])
    assert served == [("a", [0, 1]), ("b", [0]), ("c", [1]), ("d", [0, 1, 2])]


def test_a_point_that_was_served_is_passed():
    served, trace = routes(["aab", "ba"], order="ab")
    assert served == [("a", [0]), ("b", [0, 1])]
    assert len(trace) == 5


@pytest.mark.parametrize("where", ["run", "meeting"])
def test_an_error_ends_all_runs(where):
    ended = []

    def meeting(point, brought):
        if where == "meeting":
            raise ValueError("no")

    lockstep = Lockstep(meeting, {})

    def run(number):
        try:
            lockstep.wait("a", number)
            if where == "run" and number == 1:
                raise ValueError("no")
            lockstep.wait("b", number)
        finally:
            ended.append(number)

    before = threading.active_count()
    with pytest.raises(ValueError, match="no"):
        lockstep.run([lambda n=n: run(n) for n in range(3)])
    assert sorted(ended) == [0, 1, 2]
    assert threading.active_count() == before


def test_an_interrupt_while_a_run_works_ends_all_runs(monkeypatch):
    lockstep, ended = Lockstep(lambda *_: None, {}), []
    acquire, calls = lockstep._back.acquire, []

    def interrupted():
        calls.append(1)
        if len(calls) == 2:  # the second run works meanwhile, and goes on to its next point
            raise KeyboardInterrupt
        return acquire()

    monkeypatch.setattr(lockstep._back, "acquire", interrupted)

    def run(number):
        try:
            for point in "abc":
                time.sleep(0.01)
                lockstep.wait(point, number)
        finally:
            ended.append(number)

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        lockstep.run([lambda n=n: run(n) for n in range(3)])
    assert sorted(ended) == [0, 1]  # the third was never begun
    assert threading.active_count() == before


def test_runs_have_the_settings_of_the_caller():
    seen = []
    lockstep = Lockstep(lambda *_: None, {})

    def run():
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))

    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        lockstep.run([run, run])
    assert seen == [(False, True)] * 2

"""Who does the work: whatever executor, the same results; what is lost is done again; errors and closing."""

from __future__ import annotations

import sys
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from functools import partial

import pytest
import torch

from taut.core.workers import check_jobs, finished
from taut.errors import BudgetError, CallError, DataError

ITEMS = [{"a": a} for a in range(4)]


class Lossy(Executor):
    """Answers the last one handed over first, after the wanted losses."""

    def __init__(self, losses=0, error=None):
        self.losses, self.error, self.handed, self.attempts = losses, error, [], []

    def submit(self, function, *arguments):
        future = Future()
        self.attempts.append(arguments[-1])
        if self.losses:
            self.losses -= 1
            future.set_exception(self.error or RuntimeError("the worker is gone"))
        else:
            future.set_result(function(*arguments))
        self.handed.append(future)
        return future


def doubled(item):
    return {"double": 2 * item["a"], "threads": torch.get_num_threads()}


def failing(at, item):
    if item["a"] == at:
        raise BudgetError("too small", best=lambda: "cannot travel")
    return item["a"]


@pytest.mark.parametrize("executor", [Lossy, partial(ThreadPoolExecutor, 3)])
def test_any_executor_gives_the_same_with_one_thread(executor):
    before = torch.get_num_threads()
    with executor() as jobs:
        found = dict(finished(doubled, ITEMS, jobs))
    assert found == {place: {"double": 2 * place, "threads": 1} for place in range(4)}
    assert torch.get_num_threads() == before


def test_what_is_lost_is_done_again_and_told_apart():
    executor = Lossy(losses=2)
    assert len(dict(finished(doubled, ITEMS, executor))) == 4
    assert sorted(executor.attempts) == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("item", [{"a": 7}])
def test_what_is_lost_again_and_again_is_named(item):
    executor = Lossy(losses=99)
    with pytest.raises(DataError, match=r"lost the run \{'a': 7\} 3 times: RuntimeError: the worker is gone\. What is"):
        list(finished(doubled, [item], executor))
    assert executor.attempts == [0, 1, 2]


def test_a_broken_executor_is_not_asked_again():
    executor = Lossy(losses=99, error=BrokenExecutor("a process died"))
    with pytest.raises(DataError, match=r"BrokenExecutor: a process died.*the same call goes on"):
        list(finished(doubled, ITEMS, executor))
    assert executor.attempts == [0, 0, 0, 0]
    closed = ThreadPoolExecutor(1)
    closed.shutdown()
    with pytest.raises(DataError, match=r"lost the run \{'a': 0\}: RuntimeError: cannot schedule"):
        list(finished(doubled, ITEMS, closed))


def test_an_error_of_the_work_comes_as_it_is_after_what_is_finished():
    found = []
    with pytest.raises(BudgetError, match="too small") as caught:
        found.extend(place for place, _ in finished(partial(failing, 1), ITEMS, Lossy()))
    assert sorted(found) == [0, 2, 3]
    assert "In a process of its own" in caught.value.__notes__[0]
    assert caught.value.best is None


def test_closing_takes_back_what_is_not_begun():
    class Slow(Lossy):
        def submit(self, function, *arguments):
            if not self.handed:
                return super().submit(function, *arguments)
            self.handed.append(Future())
            return self.handed[-1]

    executor = Slow()
    results = finished(doubled, ITEMS, executor)
    assert next(results)[0] == 0
    results.close()
    assert [future.cancelled() for future in executor.handed] == [False, True, True, True]


def test_lambdas_go_where_cloudpickle_is_installed_and_else_the_remedy_is_said(monkeypatch):
    pytest.importorskip("cloudpickle")
    assert dict(finished(lambda item: item["a"] + 1, ITEMS, Lossy())) == {0: 1, 1: 2, 2: 3, 3: 4}
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    for jobs in (Lossy(), 2):
        with pytest.raises(CallError, match=r"cannot be sent to other processes: .*top level of a module.*cloudpickle"):
            list(finished(lambda item: item["a"], ITEMS, jobs))


def test_a_result_that_cannot_travel_is_an_error_of_its_run():
    def unsendable(item):
        return sys._getframe() if item["a"] else 0

    pytest.importorskip("cloudpickle")
    with pytest.raises((TypeError, DataError), match="pickle"):
        list(finished(unsendable, ITEMS, Lossy()))


@pytest.mark.parametrize("jobs", [0, -1, 1.5, "2", None, object()])
def test_what_does_no_work_is_refused(jobs):
    with pytest.raises(CallError, match=r"'jobs' of a thing must be .* client\.get_executor\(\)"):
        check_jobs(jobs, " of a thing")

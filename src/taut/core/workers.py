"""Who does independent work: this process, processes of our own, or any `concurrent.futures.Executor`."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Executor, Future, wait
from contextlib import contextmanager
from functools import partial
from typing import Any

from taut.core.files import one_line
from taut.core.parcels import Item, Work, answered, opened, parcel
from taut.core.processes import AGAIN, Processes
from taut.core.text import brief
from taut.errors import CallError, DataError

__all__ = ["Item", "Jobs", "Results", "Work", "check_jobs", "crew", "finished"]

Jobs = int | Executor
"""How many processes work, 1 being this one; or who does in their place."""


def check_jobs(jobs: object, of: str = "") -> None:
    """Refuse what does no work.

    Raises:
        CallError: it is neither a positive number nor an executor.
    """
    if not isinstance(jobs, Executor) and (not isinstance(jobs, int) or jobs < 1):
        raise CallError(
            f"The 'jobs'{of} must be a whole number, at least 1, or a concurrent.futures.Executor (of Dask: "
            f"client.get_executor()). Got {brief(jobs)} instead."
        )


Results = Callable[[Sequence[Item]], Iterator[tuple[int, Any]]]
"""Of a lot of items: the place and the result of each, in the order in which they are finished."""


def finished(work: Work, items: Sequence[Item], jobs: Jobs) -> Generator[tuple[int, Any]]:
    """The place and the result of each item, in the order in which they are finished.

    Closing the generator, or an error, ends our own processes at once, and takes back from an executor what it has not
    begun. The work of a lost worker is done again, `AGAIN` times at most.

    Args:
        work: called with one item. With 1 job it stays in this process; else see `taut.core.parcels.REMEDY`.
        items: plain data.
        jobs: who works. All workers use one thread each, so that their number changes no bit.

    Raises:
        CallError: `work` cannot be sent.
        DataError: a worker was lost; the message says with which item.
        Exception: what `work` raised; results that other workers had finished by then come first.
    """
    with crew(work, jobs) as results:
        yield from results(items)


@contextmanager
def crew(work: Work, jobs: Jobs) -> Iterator[Results]:
    """Workers who stay for several lots of items, one lot after the other; arguments and errors as of `finished`."""
    if jobs == 1:
        yield lambda items: enumerate(map(work, items))
        return
    if isinstance(jobs, Executor):
        yield partial(_through, jobs, parcel(work, ours=False))
        return
    processes = Processes(parcel(work, ours=True), jobs)
    try:
        yield processes.results
    finally:
        processes.end()


class _Handed:
    """What an executor has been handed, and how often it lost it."""

    def __init__(self, executor: Executor, work: bytes, items: Sequence[Item]) -> None:
        self.executor, self.work, self.items = executor, work, items
        self.places: dict[Future[bytes], int] = {}
        self.lost = Counter[int]()

    def hand(self, place: int) -> None:
        """Hand over an item."""
        try:
            future = self.executor.submit(answered, self.work, pickle.dumps(self.items[place]), self.lost[place])
        except Exception as error:
            raise self.failure(place, error) from error
        self.places[future] = place

    def results(self) -> Iterator[tuple[int, Any]]:
        """Those that have come in; lost work is handed over again."""
        failure: BaseException | None = None
        for future in wait(self.places, return_when=FIRST_COMPLETED).done:
            place = self.places.pop(future)
            try:
                good, value = opened(future.result())
            except Exception as error:
                self.lost[place] += 1
                if isinstance(error, CancelledError | BrokenExecutor) or self.lost[place] > AGAIN:
                    failure = failure or self.failure(place, error)
                else:
                    self.hand(place)
                continue
            if good:
                yield place, value
            else:
                failure = failure or value
        if failure is not None:
            raise failure

    def failure(self, place: int, error: Exception) -> DataError:
        """In words."""
        times = f" {self.lost[place]} times" if self.lost[place] > 1 else ""
        return DataError(
            f"The executor lost the run {self.items[place]}{times}: {type(error).__name__}: {one_line(error)}. What is "
            "finished is kept: the same call goes on, with an executor that works, or with jobs=2 or more."
        )


def _through(executor: Executor, work: bytes, items: Sequence[Item]) -> Generator[tuple[int, Any]]:
    """The results of an executor."""
    handed = _Handed(executor, work, items)
    try:
        for place in range(len(items)):
            handed.hand(place)
        while handed.places:
            yield from handed.results()
    finally:
        for future in handed.places:
            future.cancel()

"""Processes of our own: each result as it arrives; the work of one that is killed is done again by another.

Processes are spawned, never forked: a fork copies the locks of other runtimes' threads and hangs or crashes.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections import Counter
from collections.abc import Generator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, cast

from taut.core.parcels import Item, answered, opened
from taut.errors import DataError

AGAIN = 2
"""How often work is done again whose worker was lost."""


class Processes:
    """Processes of one thread each; they also end when this process does."""

    def __init__(self, work: bytes, count: int) -> None:
        """None is started yet.

        Args:
            work: from `taut.core.parcels.parcel`.
            count: processes at most.
        """
        self.work, self.count = work, count
        self.workers: list[_Worker] = []

    def results(self, items: Sequence[Item]) -> Generator[tuple[int, Any]]:
        """The place and the result of each item, in the order in which they are finished.

        Closing the generator, or an error, ends all workers at once.

        Args:
            items: plain data.

        Raises:
            DataError: a worker died: by itself, or was killed more than `AGAIN` times over the same item.
            Exception: what the work raised; results that other workers had finished by then come first.
        """
        waiting, lost = iter(range(len(items))), Counter[int]()
        try:
            while len(self.workers) < min(self.count, len(items)):
                self.workers.append(_Worker(self.work))
            for worker in self.workers:
                worker.start(next(waiting, None), items)
            while busy := {worker.pipe: worker for worker in self.workers if worker.place is not None}:
                failure: BaseException | None = None
                for pipe in wait(list(busy)):
                    worker = busy[cast(Connection, pipe)]
                    place, answer = cast(int, worker.place), worker.answer()
                    good, value = (False, None) if answer is None else opened(answer)
                    if good:
                        worker.start(next(waiting, None), items)
                        yield place, value
                    elif answer is not None:
                        failure = failure or value
                    elif worker.killed and lost[place] < AGAIN:
                        lost[place] += 1
                        self.workers[self.workers.index(worker)] = replacement = _Worker(self.work)
                        replacement.start(place, items)
                    else:
                        failure = failure or DataError(_obituary(worker.exit, items[place], lost[place] + 1))
                if failure is not None:
                    raise failure
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """End all, whatever they do."""
        for worker in self.workers:
            worker.end()
        self.workers = []


class _Worker:
    """One process, the pipe to it, and the place of the item that it works on."""

    def __init__(self, work: bytes) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.place: int | None = None
        # no daemon: the work may have processes of its own, such as those of a data loader
        self.process = context.Process(target=_serve, args=(theirs, work), daemon=False)
        self.process.start()
        theirs.close()  # else its end would not be seen here

    @property
    def exit(self) -> int:
        """Of a process that is dead: negative is the signal that killed it."""
        self.process.join()
        return cast(int, self.process.exitcode)

    @property
    def killed(self) -> bool:
        """Whether it died by no deed of its own."""
        return self.exit < 0

    def start(self, place: int | None, items: Sequence[Item]) -> None:
        """Hand over an item, or none."""
        self.place = place
        if place is None:
            return
        try:
            self.pipe.send_bytes(pickle.dumps(items[place]))
        except OSError:
            return  # it is dead: `answer` says so

    def answer(self) -> bytes | None:
        """What became of its item; None: the process died."""
        try:
            return self.pipe.recv_bytes()
        except (EOFError, OSError):
            self.pipe.close()
            return None

    def end(self) -> None:
        """End the process whatever it does."""
        self.pipe.close()
        self.process.terminate()
        self.process.join()


def _obituary(code: int, item: Item, times: int) -> str:
    cause = f"exit code {code}"
    if code < 0:
        cause = f"signal {-code}" + (", as when memory runs out" if -code == signal.SIGKILL else "")
    cause += f", {times} times" if times > 1 else ""
    return f"The process of the run {item} died ({cause}). What is finished is kept; fewer jobs take less memory."


def _serve(pipe: Connection, work: bytes) -> None:
    """A worker's life: items in, answers out, until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which decides
    threading.Thread(target=_follow, daemon=True).start()
    while True:
        try:
            item = pipe.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            answer = answered(work, item)
        except KeyboardInterrupt:  # the work listens itself, as a training does; the parent has heard it, too
            return
        pipe.send_bytes(answer)


def _follow() -> None:
    """A worker whose parent was killed must not go on writing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)

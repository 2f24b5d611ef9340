"""Work in several processes: each result as it arrives, and a worker that dies is said with what it was doing.

Processes are spawned, never forked: a fork copies the locks of other runtimes' threads and hangs or crashes.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import torch

from taut.core.files import one_line
from taut.errors import CallError, DataError, TautError

Item = dict[str, Any]
Work = Callable[[Item], Any]

REMEDY = (
    "With several jobs the work must be a function at the top level of a module that other processes can import, or "
    "functools.partial of one with plain arguments: no lambda, no inner function, and nothing of a study's run.py "
    "itself (put it into a module beside it). Or run with jobs=1."
)


def finished(work: Work, items: Sequence[Item], jobs: int) -> Generator[tuple[int, Any]]:
    """The place and the result of each item, in the order in which they are finished.

    Closing the generator, or an error, ends all workers at once; they also end when this process does.

    Args:
        work: called with one item; see `REMEDY`.
        items: plain data.
        jobs: processes; the threads that torch may use here are shared out among them. 1 stays in this process.

    Raises:
        CallError: `work` cannot be sent to other processes.
        DataError: a worker died, for example because memory ran out.
        Exception: what `work` raised; results that other workers had finished by then come first.
    """
    if jobs == 1:
        yield from enumerate(map(work, items))
        return
    try:
        packed = pickle.dumps(work)
    except Exception as error:
        raise CallError(f"The work cannot be sent to other processes: {one_line(error)}. {REMEDY}") from None
    threads = max(1, torch.get_num_threads() // jobs)
    waiting = iter(range(len(items)))
    workers: list[_Worker] = []
    try:
        workers.extend(_Worker(packed, threads) for _ in range(min(jobs, len(items))))
        for worker in workers:
            worker.start(next(waiting), items)
        while busy := {worker.pipe: worker for worker in workers if worker.place is not None}:
            failure: BaseException | None = None
            for pipe in wait(list(busy)):
                worker = busy[cast(Connection, pipe)]
                place, (good, value) = worker.answer(items)
                if good:
                    worker.start(next(waiting, None), items)
                    yield place, value
                else:
                    failure = failure or value
            if failure is not None:
                raise failure
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """One process, the pipe to it, and the place of the item that it works on."""

    def __init__(self, packed: bytes, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.place: int | None = None
        # no daemon: the work may have processes of its own, such as those of a data loader
        self.process = context.Process(target=_serve, args=(theirs, packed, threads), daemon=False)
        self.process.start()
        theirs.close()  # else its end would not be seen here

    def start(self, place: int | None, items: Sequence[Item]) -> None:
        """Hand over an item, or none."""
        self.place = place
        if place is None:
            return
        try:
            self.pipe.send_bytes(pickle.dumps(items[place]))
        except OSError:
            return  # it is dead: `answer` says so

    def answer(self, items: Sequence[Item]) -> tuple[int, tuple[bool, Any]]:
        """The place and what became of it: (True, result) or (False, error)."""
        place = cast(int, self.place)
        try:
            return place, pickle.loads(self.pipe.recv_bytes())  # noqa: S301 - from our own child
        except (EOFError, OSError):
            self.process.join()
            return place, (False, DataError(_obituary(self.process.exitcode, items[place])))

    def end(self) -> None:
        """End the process whatever it does."""
        self.pipe.close()
        self.process.terminate()
        self.process.join()


def _obituary(code: int | None, item: Item) -> str:
    cause = f"exit code {code}"
    if code is not None and code < 0:
        cause = f"signal {-code}" + (", as when memory runs out" if -code == signal.SIGKILL else "")
    return f"The process of the run {item} died ({cause}). What is finished is kept; fewer jobs take less memory."


def _serve(pipe: Connection, packed: bytes, threads: int) -> None:
    """A worker's life: items in, (True, result) or (False, error) out, until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which decides
    threading.Thread(target=_follow, daemon=True).start()
    torch.set_num_threads(threads)
    work: Work | None = None
    while True:
        try:
            item = pickle.loads(pipe.recv_bytes())  # noqa: S301 - from our own parent
        except (EOFError, OSError):
            return
        try:
            work = work or _unpacked(packed)
            answer = pickle.dumps((True, work(item)))
        except Exception as error:
            answer = pickle.dumps((False, _portable(error)))
        except KeyboardInterrupt:  # the work listens itself, as a training does; the parent has heard it, too
            return
        pipe.send_bytes(answer)


def _follow() -> None:
    """A worker whose parent was killed must not go on writing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _unpacked(packed: bytes) -> Work:
    try:
        return cast(Work, pickle.loads(packed))  # noqa: S301 - from our own parent
    except Exception as error:
        raise CallError(f"The work cannot be imported in another process: {one_line(error)}. {REMEDY}") from None


def _portable(error: Exception) -> Exception:
    """The error without what cannot or should not travel, such as the best model of a BudgetError."""
    told = "".join(traceback.format_exception(error))
    try:
        copied: Exception = type(error)(str(error)) if isinstance(error, TautError) else error
        pickle.loads(pickle.dumps(copied))  # noqa: S301 - our own
    except Exception:
        copied = DataError(f"A run raised {type(error).__name__}: {one_line(error)}")
    copied.add_note(f"In a process of its own:\n{told}")
    return copied

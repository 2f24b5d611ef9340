"""Runs of one model over several batches that wait for each other, until all of them stand at the same layer.

A model that takes batches of one size, or inputs of many sizes, cannot see all calibration data in one run. To solve a
layer on all of it, every batch has to stand in front of that layer at the same time. Each run has a thread of its own,
of which only one works at a time; in front of a meeting point it stops until all others have come as far.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from typing import Any

import torch

from taut.calls import TautControl

PATIENCE = 0.02
"""Seconds between two looks at whether a run has ended."""

Meeting = Callable[[str, dict[int, Any]], None]
"""A point, and what every run that came to it brings, by the run's number."""


class Lockstep:
    """Runs that meet.

    Attributes:
        current: number of the run that works.
    """

    def __init__(self, meeting: Meeting, order: Mapping[str, int]) -> None:
        """Nothing runs yet.

        Args:
            meeting: called once for every point, with what the runs that wait there brought.
            order: point -> its place; of several points at which runs wait the first is served.
        """
        self.meeting, self.order = meeting, order
        self.current = 0
        self._served: set[str] = set()
        self._alone = True
        self._aborted = False
        self._waiting: dict[int, tuple[str, Any]] = {}
        self._errors: dict[int, BaseException] = {}
        self._go: list[threading.Semaphore] = []
        self._back = threading.Semaphore(0)

    def wait(self, point: str, brought: Any) -> None:
        """Called inside of a run: go on after the meeting at `point`; at once where that is over."""
        if point in self._served:
            return
        if self._alone:
            self._serve(point, {self.current: brought})
            return
        if self._aborted:
            raise Aborted
        number = self.current
        self._waiting[number] = point, brought
        self._back.release()
        self._go[number].acquire()
        if self._aborted:
            raise Aborted

    def run(self, runs: Sequence[Callable[[], object]]) -> None:
        """Carry all runs out.

        Raises:
            Exception: what a run or a meeting raised first.
        """
        self._alone = len(runs) == 1
        if self._alone:
            runs[0]()
            return
        self._go = [threading.Semaphore(0) for _ in runs]
        settings = _settings()
        threads = [
            threading.Thread(target=copy_context().run, args=(self._work, number, run, settings), daemon=True)
            for number, run in enumerate(runs)
        ]
        try:
            for number, thread in enumerate(threads):
                thread.start()
                self._resume(number)
            while self._waiting:
                self._meet()
        finally:
            self._aborted = True
            for go, thread in zip(self._go, threads, strict=True):
                while thread.is_alive():  # an interrupt may have come while it worked: it ends where it next waits
                    go.release()
                    thread.join(PATIENCE)

    def _meet(self) -> None:
        """Serve the first point at which runs wait, and let these go on to their next."""
        point = min((point for point, _ in self._waiting.values()), key=lambda p: self.order.get(p, len(self.order)))
        present = {number: brought for number, (at, brought) in self._waiting.items() if at == point}
        self._serve(point, present)
        for number in sorted(present):
            self._resume(number)

    def _serve(self, point: str, present: dict[int, Any]) -> None:
        self._served.add(point)
        self.meeting(point, present)

    def _resume(self, number: int) -> None:
        """Let one run work until it waits again, or ends."""
        self._waiting.pop(number, None)
        self.current = number
        self._go[number].release()
        self._back.acquire()
        if number in self._errors:
            raise self._errors.pop(number)

    def _work(self, number: int, run: Callable[[], object], settings: Callable[[], Any]) -> None:
        self._go[number].acquire()
        try:
            with settings():
                if not self._aborted:
                    run()
        except Aborted:
            pass
        except BaseException as error:
            self._errors[number] = error
        finally:
            self._waiting.pop(number, None)
            self._back.release()


class Aborted(TautControl):
    """Another run failed: this one ends where it waits."""


def _settings() -> Callable[[], Any]:
    """The calling thread's settings of torch, which no other thread inherits."""
    casts = [
        (device, torch.get_autocast_dtype(device)) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)
    ]
    grad = torch.is_grad_enabled()

    @contextmanager
    def as_called() -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(mode=False))
            stack.enter_context(torch.set_grad_enabled(grad))
            for device, dtype in casts:
                stack.enter_context(torch.autocast(device, dtype=dtype))
            yield

    return as_called

"""How long work tells how far it is: heard where a caller installs a reporter, as `taut.core.showing` does.

for batch in track(batches, "Observing"):
    ...
with stage("Training", total=epochs) as step:
    step()                  # one more is done; step(3) for three, step.note("loss 0.12") to show a word beside it

with reporting(my_reporter):
    taut.compress(...)      # the reporter hears of every stage
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Protocol, Self, TypeVar

T = TypeVar("T")


class Reporter(Protocol):
    """Who shows progress: the command line's bar, a notebook's widget, a test's list."""

    def start(self, description: str, total: float | None) -> int:
        """A stage begins; `total` is None where its length is unknown. The number names it in the other calls."""

    def advance(self, stage: int, amount: float) -> None:
        """`amount` more of the stage is done."""

    def note(self, stage: int, text: str) -> None:
        """A word to show beside the stage, such as the loss."""

    def end(self, stage: int) -> None:
        """The stage is over, finished or broken off."""


_REPORTER: ContextVar[Reporter | None] = ContextVar("taut_reporter", default=None)


def reporter() -> Reporter | None:
    """Who hears of the progress in this context."""
    return _REPORTER.get()


@contextmanager
def reporting(reporter: Reporter | None) -> Iterator[None]:
    """Send the progress of all work inside the block to `reporter`; None: to nobody."""
    token = _REPORTER.set(reporter)
    try:
        yield
    finally:
        _REPORTER.reset(token)


class Stage:
    """One piece of long work, as a context manager; call it whenever a part is done."""

    def __init__(self, description: str, total: float | None = None) -> None:
        """Remember what to announce on entry."""
        self._description, self._total = description, total
        self._reporter: Reporter | None = None
        self._id = 0

    def __enter__(self) -> Self:
        """Announce the stage to the reporter of this context, if there is one."""
        self._reporter = _REPORTER.get()
        if self._reporter is not None:
            self._id = self._reporter.start(self._description, self._total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Say that it is over, also after an error."""
        if self._reporter is not None:
            self._reporter.end(self._id)

    def __call__(self, amount: float = 1) -> None:
        """`amount` more is done."""
        if self._reporter is not None:
            self._reporter.advance(self._id, amount)

    advance = __call__

    def note(self, text: str) -> None:
        """Show a word beside the stage."""
        if self._reporter is not None:
            self._reporter.note(self._id, text)


def stage(description: str, total: float | None = None) -> Stage:
    """Announce a piece of long work, and count its parts: `with ... as step: step()`."""
    return Stage(description, total)


def track(iterable: Iterable[T], description: str, total: float | None = None) -> Iterator[T]:
    """The items of `iterable`, each counted as done when the next one is asked for."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with stage(description, total) as step:
        for item in iterable:
            yield item
            step()

"""Progress on stderr: a bar on a terminal, one line that changes in a notebook, a line for every stage in a pipe.

with showing(progress):     # None: a bar on a terminal or in a notebook, once the work takes long, and else silence
    ...
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from types import TracebackType
from typing import ParamSpec, Protocol, Self, TextIO, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from taut.core.progress import Reporter, reporter, reporting
from taut.core.text import brief
from taut.errors import CallError

P = ParamSpec("P")
R = TypeVar("R")

PATIENCE = 2.0
"""Seconds of work before progress that nobody asked for is shown."""

SHORT = 1.0
"""Seconds below which a stage that was shown before gets no line of its own in a pipe."""

UNNOTICED = 0.1
"""Seconds below which a stage gets no line that nobody asked for."""

HEARTBEAT = 20.0
"""Seconds without a line in a pipe after which one says how far the work is."""

REDRAWN = 0.25
"""Seconds between two states of a notebook's line."""


class Display(Reporter, Protocol):
    """A reporter that takes away at the end what it showed."""

    def __enter__(self) -> Self:
        """Show nothing yet."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Clear what is shown, also after an error."""


class Bar:
    """On a terminal: one line with the time left for every running stage, gone when it ends."""

    def __init__(self) -> None:
        """Prepare the lines; nothing is shown before the first stage."""
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}"),
            console=Console(file=sys.stderr),
            transient=True,
            refresh_per_second=4,  # latency is measured while it runs
        )
        self._running = 0

    def __enter__(self) -> Self:
        """Nothing yet."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Clear the lines, also after an error."""
        self._progress.stop()

    def start(self, description: str, total: float | None) -> int:
        """Show a line for the stage."""
        if self._running == 0:
            self._progress.start()
        self._running += 1
        return int(self._progress.add_task(description, total=total, note=""))

    def advance(self, stage: int, amount: float) -> None:
        """Move its bar."""
        self._progress.advance(TaskID(stage), amount)

    def note(self, stage: int, text: str) -> None:
        """Show a word at its end."""
        self._progress.update(TaskID(stage), note=text)

    def end(self, stage: int) -> None:
        """Take its line away; with the last one the terminal is as before."""
        self._progress.remove_task(TaskID(stage))
        self._running -= 1
        if self._running == 0:
            self._progress.stop()


@dataclass
class Running:
    """A stage that runs: what it does, how far it is, since when."""

    description: str
    total: float | None
    since: float
    done: float = 0.0
    word: str = ""

    def __str__(self) -> str:
        """As "observing: 3 of 16, 2.1 s, loss 0.12"."""
        amount = f"{self.done:g} of {self.total:g}" if self.total is not None else f"{self.done:g}" if self.done else ""
        parts = [amount, f"{time.monotonic() - self.since:.1f} s", self.word]
        return f"{self.description}: {', '.join(part for part in parts if part)}"


class Written:
    """What reporters that write text have in common: the stages that run."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """Nothing runs yet."""
        self.stream = stream or sys.stderr
        self.running: dict[int, Running] = {}
        self._count = 0

    def __enter__(self) -> Self:
        """Nothing yet."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Nothing is left to clear."""

    def start(self, description: str, total: float | None) -> int:
        """Note the stage."""
        self._count += 1
        self.running[self._count] = Running(description, total, time.monotonic())
        self.changed()
        return self._count

    def advance(self, stage: int, amount: float) -> None:
        """Count what is done."""
        self.running[stage].done += amount
        self.changed()

    def note(self, stage: int, text: str) -> None:
        """Keep the word."""
        self.running[stage].word = text
        self.changed()

    def end(self, stage: int) -> None:
        """Forget the stage, and let it be shown a last time."""
        self.ended(self.running.pop(stage))

    def changed(self) -> None:
        """Show that something moved."""

    def ended(self, stage: Running) -> None:
        """Show that a stage is over."""


class Lines(Written):
    """In a pipe: a line when a stage ends, and one now and then while it runs; no escape codes.

    Args:
        stream: stderr, if it is not given.
        patience: seconds of work before the first line, which then brings those that were kept.
    """

    def __init__(self, stream: TextIO | None = None, patience: float = 0.0) -> None:
        """Nothing is written yet."""
        super().__init__(stream)
        self._shown: set[str] = set()
        self._kept: list[str] = []
        self._last = time.monotonic()
        self._from, self._least = self._last + patience, UNNOTICED if patience else 0.0

    def changed(self) -> None:
        """Say how far the work is where nothing was said for long."""
        if time.monotonic() - self._last >= HEARTBEAT:
            self._write("... " + "; ".join(map(str, self.running.values())))

    def ended(self, stage: Running) -> None:
        """Write the stage with its time; of short ones that come again only the first."""
        seconds = time.monotonic() - stage.since
        if seconds < (SHORT if stage.description in self._shown else self._least):
            return
        if stage.total is not None and stage.done < stage.total and sys.exc_info()[0] is None:
            stage.done, stage.total = 0.0, None  # it needed no more than that: it is over, and not at "0 of 4"
        self._shown.add(stage.description)
        self._write(str(stage))

    def _write(self, line: str) -> None:
        self._kept.append(line)
        if time.monotonic() >= self._from:
            print("\n".join(self._kept), file=self.stream, flush=True)
            self._kept, self._last = [], time.monotonic()


class NotebookLine(Written):
    """In a notebook: one line that is written over, and empty at the end."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """Nothing is written yet."""
        super().__init__(stream)
        self._width, self._last = 0, 0.0

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Clear the line."""
        if self._width:
            self._write("")
            self._write("")

    def changed(self) -> None:
        """Write what runs, a few times a second."""
        if time.monotonic() - self._last >= REDRAWN:
            self._write("; ".join(map(str, self.running.values())))

    def _write(self, line: str) -> None:
        self.stream.write("\r" + line.ljust(self._width) + ("\r" if not line else ""))
        self.stream.flush()
        self._width, self._last = len(line), time.monotonic()


class Late:
    """Another display, from when the work has taken `PATIENCE` seconds."""

    def __init__(self, display: Callable[[], Display]) -> None:
        """Remember what to show."""
        self._make, self._since = display, time.monotonic()
        self._display: Display | None = None
        self._waiting: dict[int, Running] = {}
        self._numbers: dict[int, int] = {}
        self._count = 0

    def __enter__(self) -> Self:
        """Nothing yet."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Clear what is shown."""
        if self._display is not None:
            self._display.__exit__(kind, error, at)

    def start(self, description: str, total: float | None) -> int:
        """Note the stage, or show it."""
        self._count += 1
        if self._shown() is None:
            self._waiting[self._count] = Running(description, total, time.monotonic())
        else:
            self._pass_on(self._count, Running(description, total, 0.0))
        return self._count

    def advance(self, stage: int, amount: float) -> None:
        """Count what is done, or show it."""
        display = self._shown()
        if display is None:
            self._waiting[stage].done += amount
        else:
            display.advance(self._numbers[stage], amount)

    def note(self, stage: int, text: str) -> None:
        """Keep the word, or show it."""
        display = self._shown()
        if display is None:
            self._waiting[stage].word = text
        else:
            display.note(self._numbers[stage], text)

    def end(self, stage: int) -> None:
        """Forget the stage, or end it."""
        if self._display is None:
            del self._waiting[stage]
        else:
            self._display.end(self._numbers.pop(stage))

    def _shown(self) -> Display | None:
        """The display, begun with what runs as soon as it is time."""
        if self._display is None and time.monotonic() - self._since >= PATIENCE:
            self._display = self._make().__enter__()
            for number, stage in self._waiting.items():
                self._pass_on(number, stage)
        return self._display

    def _pass_on(self, number: int, stage: Running) -> None:
        if self._display is None:
            return
        self._numbers[number] = self._display.start(stage.description, stage.total)
        if stage.done:
            self._display.advance(self._numbers[number], stage.done)
        if stage.word:
            self._display.note(self._numbers[number], stage.word)


@contextmanager
def showing(progress: bool | None = None, *, piped: bool = False) -> Iterator[None]:
    """Show the progress of all work inside the block.

    Args:
        progress: True: at once, in lines where stderr is neither a terminal nor a notebook; False: not at all; None: as
            whoever called says, else on a terminal or in a notebook, once the work takes long.
        piped: with None also in lines, once the work takes long.

    Raises:
        CallError: it is something else.
    """
    if progress is not None and not isinstance(progress, bool):
        raise CallError(f"The 'progress' must be True, False or None (automatic). Got {brief(progress)} instead.")
    if progress is False:
        with reporting(None):
            yield
        return
    display = _display(progress is True, piped)
    if reporter() is not None or display is None:
        yield
        return
    with display, reporting(display):
        yield


def shown(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator of the verbs that may take long: show what their argument `progress` asks for."""

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with showing(kwargs.get("progress")):  # type: ignore[arg-type] # checked there
            return function(*args, **kwargs)

    return wrapper


def _display(at_once: bool, piped: bool) -> Display | None:
    """What fits stderr."""
    if in_notebook() or _is_terminal():
        fitting: Callable[[], Display] = NotebookLine if in_notebook() else Bar
        return fitting() if at_once else Late(fitting)
    if at_once or piped:
        return Lines(patience=0.0 if at_once else PATIENCE)
    return None


def in_notebook() -> bool:
    """Whether this process is a notebook's."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()

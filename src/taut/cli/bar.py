"""Progress on stderr: a bar with the time left on a terminal, nothing in a pipe."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

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


class Bar:
    """A `taut.core.progress.Reporter` on the terminal: one line for every running stage, gone when it ends."""

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
            disable=not sys.stderr.isatty(),
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

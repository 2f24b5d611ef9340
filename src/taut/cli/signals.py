"""Ctrl-C and SIGTERM from the first moment on: one line and the exit code, also while packages are imported.

An import that is interrupted may say anything; nothing has been begun by then, so that the process just ends. From
`work_begins` on both are a `KeyboardInterrupt`, which puts everything in order on its way out.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

INTERRUPTED, TERMINATED = 130, 143

_received: list[int] = []
_advice: list[str] = []


def watch() -> None:
    """From now on a signal ends the process with one line."""
    _received.clear()
    _install(_end)


def work_begins() -> None:
    """From now on a signal is a `KeyboardInterrupt`, if `watch` was called before."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is _end:
        _install(_interrupt)


def exit_code() -> int:
    """What the command line returns after an interrupt."""
    return TERMINATED if _received and _received[0] == signal.SIGTERM else INTERRUPTED


def message() -> str:
    """What is said after an interrupt."""
    word = "terminated" if exit_code() == TERMINATED else "interrupted"
    advice, _advice[:] = list(_advice), []
    return " ".join([f"error: {word}; nothing was left half-written.", *advice])


def advise(how_to_go_on: str) -> None:
    """Say it, too, after the interrupt that is on its way out."""
    _advice[:] = [how_to_go_on]


def _install(handler: Any) -> None:
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handler)


def _end(number: int, _frame: Any) -> None:
    """Say so, and end at once: what is being imported may catch or garble an exception."""
    _received.append(number)
    shown = b"\x1b[?25h" if os.isatty(2) else b""  # a bar may have hidden the cursor
    os.write(2, shown + message().encode() + b"\n")
    os._exit(exit_code())


def _interrupt(number: int, _frame: Any) -> None:
    _received.append(number)
    raise KeyboardInterrupt


def over() -> None:
    """The command is done: a signal that meets the interpreter's end says nothing."""
    if signal.getsignal(signal.SIGINT) in {_end, _interrupt}:
        _install(signal.SIG_IGN)

"""What went wrong, as one line on stderr and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from taut.cli import signals
from taut.cli.output import one_line, say
from taut.errors import TautError

WRONG_CALL = 2
BAD_DATA = 4


def guarded(action: Callable[[], object]) -> int:
    """Run `action` and return the exit code; TAUT_DEBUG=1 lets errors through with their traceback."""
    try:
        result = action()
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # typer's way to say so
            return _told(error.__context__)
        # out of the user's code: ours returns a number
        say(f"error: the command was ended by sys.exit({error.code!r}) before it was done.")
        return BAD_DATA
    except Exception as error:
        if os.environ.get("TAUT_DEBUG", "0") not in {"", "0"}:
            raise
        return _told(error)
    # typer itself turns Ctrl-C inside a command into this return value
    return _interrupted() if result == signals.INTERRUPTED else result if isinstance(result, int) else 0


def _interrupted() -> int:
    say(signals.message())
    return signals.exit_code()


def _told(error: Exception) -> int:
    if isinstance(error, typer.Abort):
        return _interrupted()
    if isinstance(error, BrokenPipeError):  # the reader (such as `head`) has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - until the interpreter flushes it at exit
        return 0
    if hasattr(error, "format_message"):  # typer's own exceptions, whose base is private to it
        return _misused(error)
    if isinstance(error, TautError):
        say(f"error: {one_line(str(error))}")
        return error.exit_code
    if isinstance(error, OSError):
        say(f"error: {one_line(str(error))}")
        return BAD_DATA
    say(f"error: {type(error).__name__}: {one_line(str(error))} (TAUT_DEBUG=1 shows where)")
    return BAD_DATA


def _misused(error: Any) -> int:
    """A command line that typer refused; without a message it was empty, and the help is shown already."""
    message = one_line(error.format_message())
    if message:
        command = error.ctx.command_path if getattr(error, "ctx", None) is not None else "taut"
        say(f"error: {message} Try `{command} --help`.")
    return WRONG_CALL

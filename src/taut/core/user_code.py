"""Functions and data of the user's: what goes wrong in them is said to be theirs, with their error as the cause."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from taut.errors import DataError, TautError

T = TypeVar("T")


@contextmanager
def named(what: str, kind: type[TautError] = DataError) -> Iterator[None]:
    """Raise what the block raises as an error that names it: `evaluate raised ValueError: ...`.

    Args:
        what: whose code runs in the block.
        kind: the error that is raised.

    Raises:
        TautError: of that kind, with the original error as its cause; errors of taut's own pass.
    """
    try:
        yield
    except TautError:
        raise
    except SystemExit as error:
        raise kind(
            f"{what} ended the program by sys.exit({'' if error.code is None else repr(error.code)})."
        ) from error
    except Exception as error:
        raise kind(f"{what} raised {described(error)}") from error


def described(error: BaseException) -> str:
    """Kind and message of an error on one line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def call(what: str, function: Callable[..., T], *arguments: Any) -> T:
    """What a function of the user's returns.

    Raises:
        DataError: it raised.
    """
    with named(what):
        return function(*arguments)


def batches_of(data: Iterable[Any], what: str) -> Iterator[Any]:
    """The batches of a loader of the user's.

    Args:
        data: gives batches.
        what: names it in messages, as "the calibration data".

    Raises:
        DataError: it raised; the message says at which batch.
    """
    with named(what):
        iterator = iter(data)
    number = 0
    while True:
        with named(f"{what}, asked for batch {number},"):
            try:
                batch = next(iterator)
            except StopIteration:
                return
        yield batch
        number += 1

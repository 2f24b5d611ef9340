"""Every call into the system fails, or is the last one before a kill: what writes files is run at each of them."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

AUDITED = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.listdir")
CALLS = ("open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "link", "symlink", "chmod")

Work = Callable[[], object]


def in_child(work: Work) -> int:
    """Run `work` in a forked child and return how it ended."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_before(number: int, work: Work) -> bool:
    """Whether a child that does `work` came to its call number `number` into the system, and died before it."""
    left = number

    def hook(event: str, _: object) -> None:
        nonlocal left
        if event in AUDITED:
            left -= 1
            if not left:
                die()

    def hooked() -> None:
        sys.addaudithook(hook)
        work()

    return os.WIFSIGNALED(in_child(hooked))


def kills(work: Work) -> Iterator[int]:
    """Kill a child that does `work` before each of its calls in turn; the last time it ends by itself."""
    for number in range(1, 300):
        died = killed_before(number, work)
        yield number
        if not died:
            return
    raise AssertionError("it never ended")


class Killed(BaseException):
    """In the place of a kill: no error handler undoes it, for nothing that touches the disk works any more."""


def stops(work: Work) -> Iterator[int]:
    """As `kills`, without a process for each, which takes a hundred times as long."""
    for number in range(1, 300):
        with failing(number, "from", Killed()) as met, suppress(Killed):
            work()
        yield number
        if not met:
            return
    raise AssertionError("it never ended")


def failures(work: Work, code: int = errno.EIO) -> Iterator[str]:
    """Let each call in turn fail: before it did anything, after it did all, and with all later ones (a disk is gone).

    Yields:
        Which of these, the number of the call, and its name.
    """
    for how in ("before", "after", "from"):
        for number in range(1, 300):
            with failing(number, how, OSError(code, os.strerror(code))) as met:
                work()
            yield f"{how} {number} {met[0] if met else 'none'}"
            if not met:
                break
        else:
            raise AssertionError("it never ended")


@contextmanager
def failing(number: int, how: str, error: BaseException) -> Iterator[list[str]]:
    """Inside the block call number `number` fails; what it was is in the list."""
    met: list[str] = []
    count = 0

    def wrapped(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            if count < number or (count > number and how != "from"):
                return real(*args, **kwargs)
            met.append(name)
            if how == "after":
                real(*args, **kwargs)
            raise error

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, wrapped(name, getattr(os, name)))
        yield met

"""Work that is sent to workers: packed here, done there, and what came of it packed again.

Nothing but bytes and one function of taut's travels, so that every engine carries it alike.
"""

from __future__ import annotations

import pickle
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, cast

import torch

from taut.core.files import one_line
from taut.errors import CallError, DataError, TautError

Item = dict[str, Any]
Work = Callable[[Item], Any]

REMEDY = (
    "What is sent to workers (functions, classes of models, data) must stand at the top level of a module that they "
    "can import, or be functools.partial of such a function with plain arguments: no lambda, no inner function, and "
    "nothing of a study's run.py itself (put it into a module beside it). Where cloudpickle is installed, these may "
    "go, too. Or run with jobs=1."
)

_one_at_a_time = threading.RLock()


def packed(value: Any, *, by_name: bool) -> bytes:
    """The value as bytes, to be sent.

    Args:
        value: work, or what came of it.
        by_name: whether what the first process itself defines (`__main__`) is looked up there by its name, as our own
            processes can, which import its file; else cloudpickle sends the definition, if it is installed.
    """
    try:
        import cloudpickle  # noqa: PLC0415 - no dependency: scikit-learn, Dask and Ray bring it
    except ImportError:
        return pickle.dumps(value)
    if not by_name:
        return cast(bytes, cloudpickle.dumps(value))
    try:
        return pickle.dumps(value)
    except Exception:  # whatever a __reduce__ raises
        return cast(bytes, cloudpickle.dumps(value))


def parcel(work: Work, *, ours: bool) -> bytes:
    """Work that is ready to be sent.

    Args:
        work: called with one item.
        ours: whether it goes to processes of our own.

    Raises:
        CallError: it cannot be sent.
    """
    main = sys.modules.get("__main__")
    try:
        return packed(work, by_name=ours and getattr(main, "__file__", None) is not None)
    except Exception as error:
        raise CallError(f"The work cannot be sent to other processes: {one_line(error)}. {REMEDY}") from None


def answered(work: bytes, item: bytes, attempt: int = 0) -> bytes:
    """A worker's side: (True, result) or (False, error), packed; with one thread, and one after the other.

    Args:
        work: from `parcel`; a worker keeps the last one, with what it remembers.
        item: plain data, pickled.
        attempt: the same work once more: some engines would answer from memory.
    """
    del attempt
    with _one_at_a_time, _one_thread():  # random states and modes belong to the process
        try:
            return packed((True, _opened(work)(pickle.loads(item))), by_name=True)  # noqa: S301 - from our own parent
        except Exception as error:
            return packed((False, _portable(error)), by_name=True)


def opened(answer: bytes) -> tuple[bool, Any]:
    """What `answered` packed."""
    good, value = pickle.loads(answer)  # noqa: S301 - from a worker of ours
    return good, value


@contextmanager
def _one_thread() -> Iterator[None]:
    """With other numbers of threads torch rounds sums otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@lru_cache(maxsize=1)
def _opened(work: bytes) -> Work:
    try:
        return cast(Work, pickle.loads(work))  # noqa: S301 - from our own parent
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

"""Errors out of the user's code are named as such, with the original as the cause."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import NoReturn

import pytest

from taut import CallError, DataError, ModelError
from taut.core.user_code import batches_of, call, named


def fail(error: BaseException) -> NoReturn:
    raise error


def test_an_error_is_named_and_kept_as_the_cause() -> None:
    with pytest.raises(DataError, match=r"^loss raised ValueError: two lines$") as caught:
        call("loss", fail, ValueError("two\n lines"))
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(ModelError, match=r"^the factory raised KeyError: 'a'$"), named("the factory", ModelError):
        fail(KeyError("a"))
    with pytest.raises(DataError, match=r"^loss raised AssertionError$"):
        call("loss", fail, AssertionError())


def test_an_exit_is_no_success() -> None:
    with pytest.raises(DataError, match=r"evaluate ended the program by sys\.exit\(0\)"):
        call("evaluate", sys.exit, 0)


def test_our_own_errors_and_interrupts_pass() -> None:
    for error in (CallError("ours"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught:
            call("evaluate", fail, error)
        assert caught.value is error


def test_a_loader_says_at_which_batch() -> None:
    def loader() -> Iterator[int]:
        yield 1
        raise OSError("gone")

    read = batches_of(loader(), "the training data")
    assert next(read) == 1
    with pytest.raises(DataError, match="the training data, asked for batch 1, raised OSError: gone"):
        next(read)
    assert list(batches_of([1, 2], "the data")) == [1, 2]
    with pytest.raises(DataError, match="the data raised TypeError"):
        next(batches_of(3, "the data"))  # type: ignore[arg-type]

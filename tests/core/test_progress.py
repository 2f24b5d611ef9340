"""Progress is silent by default, reaches the reporter of its context, and ends with the work, also a failed one."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import pytest

from taut.core.progress import reporting, stage, track


@dataclass
class Listener:
    heard: list[tuple[object, ...]] = field(default_factory=list)

    def start(self, description: str, total: float | None) -> int:
        self.heard.append(("start", description, total))
        return len(self.heard)

    def advance(self, stage: int, amount: float) -> None:
        self.heard.append(("advance", stage, amount))

    def note(self, stage: int, text: str) -> None:
        self.heard.append(("note", stage, text))

    def end(self, stage: int) -> None:
        self.heard.append(("end", stage))


def test_without_a_reporter_nothing_happens(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track([1, 2], "counting")) == [1, 2]
    with stage("working") as step:
        step()
        step.note("loss")
    assert capsys.readouterr() == ("", "")


def test_track_counts_every_item() -> None:
    listener = Listener()
    with reporting(listener):
        assert list(track([1, 2], "counting")) == [1, 2]
        assert list(track(iter([1]), "guessing", 3)) == [1]
    first = [("start", "counting", 2), ("advance", 1, 1), ("advance", 1, 1), ("end", 1)]
    assert listener.heard == [*first, ("start", "guessing", 3), ("advance", 5, 1), ("end", 5)]


def test_stages_nest_and_end_after_an_error() -> None:
    listener = Listener()

    def fail() -> None:
        with stage("outer", 2) as outer:
            outer(0.5)
            with stage("inner") as inner:
                inner.note("almost")
                raise ZeroDivisionError

    with reporting(listener), pytest.raises(ZeroDivisionError):
        fail()
    kinds = [event[0] for event in listener.heard]
    assert kinds == ["start", "advance", "start", "note", "end", "end"]
    assert listener.heard[-1] == ("end", 1)


def test_a_reporter_belongs_to_its_context() -> None:
    listener = Listener()
    with reporting(listener):
        other = threading.Thread(target=lambda: list(track([1], "elsewhere")))
        other.start()
        other.join()
    list(track([1], "afterwards"))
    assert listener.heard == []


def test_an_abandoned_loop_ends_its_stage() -> None:
    listener = Listener()
    with reporting(listener):
        for _ in track([1, 2, 3], "searching"):
            break
    assert listener.heard[-1][0] == "end"

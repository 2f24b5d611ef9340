"""Progress as it is shown: a bar on a terminal, a line in a notebook, lines in a pipe; silence where it is short."""

from __future__ import annotations

import io
import sys
import types

import pytest

from taut import CallError
from taut.core import showing as module
from taut.core.progress import reporter, stage, track
from taut.core.showing import Bar, Late, Lines, NotebookLine, showing


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module, "PATIENCE", 2.0)
    return clock


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_for_every_stage_in_a_pipe(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with showing(progress=True):
        with stage("exploring", total=2) as points:
            for seconds in (0.5, 2.0, 0.25):
                with stage("refitting", total=3) as layers:
                    clock.now += seconds
                    layers(3)
            points(2)
        with stage("comparing") as comparing:
            comparing.note("eager")
    assert capsys.readouterr() == (
        "",
        "refitting: 3 of 3, 0.5 s\nrefitting: 3 of 3, 2.0 s\nexploring: 2 of 2, 2.8 s\ncomparing: 0.0 s, eager\n",
    )


def test_a_long_stage_says_now_and_then_how_far_it_is(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with showing(progress=True), stage("training", total=100) as epochs:
        for _ in range(100):
            clock.now += 1
            epochs()
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["... training: 20 of 100, 20.0 s", "... training: 40 of 100, 40.0 s"]
    assert len(lines) == 6


def test_the_command_line_is_silent_in_a_pipe_until_it_takes_long(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with showing(piped=True):
        list(track([1], "tracing"))
        with stage("observing", 1) as step:
            clock.now += 0.5
            step()
        assert capsys.readouterr().err == ""
        with stage("refitting", 1) as step:
            clock.now += 2
            step()
    assert capsys.readouterr().err == "observing: 1 of 1, 0.5 s\nrefitting: 1 of 1, 2.0 s\n"


def test_in_python_a_pipe_hears_nothing_unasked(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with showing():
        clock.now = 60.0
        list(track([1], "observing"))
        assert reporter() is None
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_a_bar_comes_when_the_work_takes_long(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    with showing(), stage("observing", total=4) as step:
        assert isinstance(reporter(), Late)
        step(2)
        step.note("half")
        assert screen.getvalue() == ""
        clock.now = 2.5
        step()
        assert "observing" in screen.getvalue()
    with showing(progress=True), stage("at once"):
        assert isinstance(reporter(), Bar)


def test_in_a_notebook_one_line_is_written_over(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    shell = types.SimpleNamespace(get_ipython=lambda: types.SimpleNamespace(kernel=object()))
    monkeypatch.setitem(sys.modules, "IPython", shell)
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with showing(progress=True), stage("observing", total=4) as step:
        assert isinstance(reporter(), NotebookLine)
        clock.now = 1.0
        step()
        clock.now = 1.1
        step()
    shown = stream.getvalue()
    assert shown.startswith("\robserving: 1 of 4, 1.0 s")
    assert "2 of 4" not in shown
    assert shown.endswith("\r")
    assert "\n" not in shown
    assert "\x1b" not in shown


def test_false_is_silence_and_an_outer_display_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    with showing(progress=True):
        outer = reporter()
        assert isinstance(outer, Lines)
        with showing(), stage("inner"):
            assert reporter() is outer
        with showing(progress=False), stage("hidden"):
            assert reporter() is None
    assert [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()] == ["inner"]


@pytest.mark.parametrize("value", [1, "yes", 0.5])
def test_other_values_are_refused(value: object) -> None:
    with pytest.raises(CallError, match="'progress' must be True, False or None"), showing(value):  # type: ignore[arg-type]
        pass


def test_a_stage_that_is_over_early_does_not_end_at_none_of_several(capsys: pytest.CaptureFixture[str]) -> None:
    with showing(progress=True), stage("searching", total=4):
        pass
    assert "searching: 0.0 s" in capsys.readouterr().err

    def broken() -> None:
        with showing(progress=True), stage("observing", total=4) as step:
            step()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    assert "observing: 1 of 4" in capsys.readouterr().err

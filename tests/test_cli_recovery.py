"""Every command finds what a killed write set aside, and says before its work what would make its end impossible."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import taut
from faults import stops
from taut.artifact.checkpoint import load_plan
from taut.cli import models, unfinished
from taut.core.files import OLD
from taut.recipe import Recipe
from test_cli import Outcome, Place, place

__all__ = ["place"]

SMALL, ASIDE = Path("small"), Path(f"{OLD}small")
BROKEN = "\n\ndef calibration():\n    raise OSError('the data is gone')\n"


@pytest.fixture
def saved(place: Place) -> dict[str, bytes]:
    """A saved folder with a file of the user's, and its content."""
    taut.save(built(place), taut.Plan(()), SMALL)
    (SMALL / "notes").write_text("the user's")
    return content()


def built(place: Place) -> nn.Module:
    return models.load(f"{place.module}:build")


def content() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(SMALL.iterdir()) if path.is_file()}


def assert_back(saved: dict[str, bytes]) -> None:
    assert content() == saved
    assert not [path for path in Path().iterdir() if path.name.startswith(".taut")]


READ = {
    "inspect": ["inspect", "small", "--base", "NETS:build"],
    "evaluate": ["evaluate", "small", "--base", "NETS:build"],
    "benchmark": ["benchmark", "small", "--base", "NETS:build", "--rounds", "1"],
    "benchmark against": ["benchmark", "NETS:build", "--against", "small", "--rounds", "1"],
    "export": ["export", "small", "small.onnx", "--base", "NETS:build"],
    "explore": ["explore", "small", "--base", "NETS:build", "--methods", "dead_units"],
    "study": ["study", "small", "--base", "NETS:build", "--methods", "magnitude", "--sizes", "0.5", "--out", "o"],
    "compress": ["compress", "small", "--base", "NETS:build", "--budget", "params=0.5", "--out", "other"],
}
"""The folder is the MODEL."""

WRITTEN = {
    "export into it": ["export", "NETS:build", "small/model.onnx"],
    "explore into it": ["explore", "NETS:build", "--methods", "dead_units", "--out", "small/front"],
    "plot into it": ["explore", "NETS:build", "--methods", "dead_units", "--plot", "small/front.svg"],
    "study into it": ["study", "NETS:build", "--methods", "magnitude", "--sizes", "0.5", "--out", "small/study"],
    "compress into it": ["compress", "NETS:build", "--budget", "params=0.5", "--out", "small/inner"],
}
"""What is written lies in the folder: it must not be made anew, and so hide the old one."""


@pytest.mark.parametrize("name", [*READ, *WRITTEN])
def test_every_command_finds_what_was_set_aside(
    place: Place, saved: dict[str, bytes], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taut.studies.studying.find_spec", lambda name: None)  # no picture, and
    monkeypatch.setattr("taut.artifact.exporting.to_onnx", lambda model, example, path: path.write_text("graph"))
    monkeypatch.setattr("taut.artifact.exporting.check", lambda *_: [])  # neither torch's converter: they take seconds
    SMALL.rename(ASIDE)
    done = place(*(READ | WRITTEN)[name])
    assert done.code == 0, done.err
    assert content().items() >= saved.items()
    assert not ASIDE.exists()


def test_loading_finds_what_was_set_aside(place: Place, saved: dict[str, bytes]) -> None:
    for read in (load_plan, lambda folder: taut.load(folder, built(place))):
        SMALL.rename(ASIDE)
        read(SMALL)
        assert_back(saved)


def test_a_compression_that_fails_does_not_hide_what_was_set_aside(place: Place, saved: dict[str, bytes]) -> None:
    words = ("compress", "NETS:build", "--budget", "params=0.5", "--out", "small")
    SMALL.rename(ASIDE)
    assert place(*words, task=place.task("broken.py", BROKEN)).is_one_line_error("the data is gone")
    assert_back(saved)
    SMALL.rename(ASIDE)
    assert place(*words).code == 0
    assert place("inspect", "small", "--base", "NETS:build").code == 0
    assert (SMALL / "notes").read_text() == "the user's"
    assert not ASIDE.exists()


def test_a_run_that_was_set_aside_with_its_folder_is_resumed(place: Place, saved: dict[str, bytes]) -> None:
    unfinished.begin(SMALL, Recipe(budget=taut.Budget(params=0.5)), overwrite=False)
    for with_new in (False, True):
        SMALL.rename(ASIDE)
        if with_new:  # killed after the swap, before what else was there moved along
            SMALL.mkdir()
            for name in ("model.safetensors", "manifest.json"):
                (SMALL / name).write_bytes(saved[name])
        assert unfinished.requested(SMALL).budget == taut.Budget(params=0.5)
        assert_back(saved)
    SMALL.rename(ASIDE)
    assert place("resume", "NETS:build", "--out", "small").code == 0
    assert not (SMALL / unfinished.UNFINISHED).exists()
    assert (SMALL / "notes").exists()


def test_a_training_that_was_set_aside_is_neither_dropped_nor_overwritten(place: Place) -> None:
    state = unfinished.begin(SMALL, Recipe(budget=taut.Budget(params=0.5)), overwrite=False)
    state.mkdir()
    (state / "training.json").write_text("hours of work")
    aside = state.with_name(f"{OLD}{state.name}")
    for budget, said in (("params=0.25", "unfinished run of other settings"), ("params=0.5", "the data is gone")):
        state.rename(aside)
        words = ("compress", "NETS:build", "--budget", budget, "--out", "small")
        assert place(*words, task=place.task("broken.py", BROKEN)).is_one_line_error(said)
        assert (state / "training.json").read_text() == "hours of work"


def test_the_users_files_in_a_folder_that_was_set_aside_are_found(place: Place, saved: dict[str, bytes]) -> None:
    torch.save(built(place).state_dict(), SMALL / "w.pt")
    (SMALL / "task.py").write_text(Path("tasks.py").read_text())
    for words in (["--weights", "small/w.pt", "--task", "tasks.py"], ["--task", "small/task.py"]):
        SMALL.rename(ASIDE)
        assert place("inspect", "NETS:build", *words, task=None).code == 0
        assert content().items() >= saved.items()


def test_dropping_an_unfinished_run_is_all_or_nothing(place: Place) -> None:
    recipes = [Recipe(budget=taut.Budget(params=share)) for share in (0.5, 0.25)]

    def begun(recipe: Recipe) -> None:
        (unfinished.begin(SMALL, recipe, overwrite=True) / "state").mkdir(parents=True)

    begun(recipes[0])
    seen = set()
    for _ in stops(lambda: unfinished.begin(SMALL, recipes[1], overwrite=True)):
        folder = SMALL / unfinished.UNFINISHED
        state = (folder / unfinished.REQUEST).exists(), (folder / unfinished.TRAINING).exists()
        assert state in {(True, True), (True, False), (False, False)}
        if state[0]:
            share = unfinished.requested(SMALL).budget
            assert share == recipes[0 if state[1] else 1].budget, "a training goes with its own request"
        seen.add(state)
        begun(recipes[0])
    assert len(seen) == 3
    unfinished.end(SMALL)
    assert list(SMALL.iterdir()) == []


IMPOSSIBLE = {
    "compress": ["compress", "NETS:build", "--budget", "params=0.5", "--out"],
    "demo": ["demo", "--out"],
}
WITHIN = {
    "explore": ["explore", "NETS:build", "--out"],
    "study": ["study", "NETS:build", "--out"],
    "reproduce": ["reproduce", "tiny", "--experiments", "studies", "--out"],
}
WORK = "\n\ndef evaluate(model):\n    raise ValueError('the work was begun')\n"
NEVER = "\n\nraise ValueError('the work was begun')\n"
STUDY = "def main(data, out, paper, quick, seeds):\n    raise ValueError('the work was begun')\n"


def busy(name: str) -> Callable[[str | Path, str | Path], None]:
    """A rename that answers as for a mount point where `name` is to be renamed."""
    real = os.rename

    def rename(source: str | Path, to: str | Path) -> None:
        if Path(source).name == name:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), os.fspath(source))
        real(source, to)

    return rename


def tried(place: Place, words: list[str], out: str) -> Outcome:
    Path("studies/tiny").mkdir(parents=True, exist_ok=True)
    Path("studies/tiny/run.py").write_text(STUDY)
    task = place.task("never.py", WORK)
    return place(*words, out, task=None if words[0] in {"demo", "reproduce"} else task)


@pytest.mark.parametrize("name", [*IMPOSSIBLE, *WITHIN])
def test_what_makes_the_end_impossible_is_said_before_the_work(place: Place, name: str) -> None:
    words = (IMPOSSIBLE | WITHIN)[name]
    Path("file").write_text("x")
    before = sorted(Path().iterdir())
    for out, said in (("x" * 256, "too long"), ("file", "is a file"), ("file/deep", "file")):
        found = tried(place, words, out)
        assert found.is_one_line_error(said)
        assert "begun" not in found.err
    Path("studies/tiny/run.py").unlink()
    beside = {"studies", "never.py", "__pycache__"}
    assert [path for path in sorted(Path().iterdir()) if path.name not in beside] == before


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_mount_point_and_a_long_name_are_said_before_the_work(
    place: Place, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tried(place, IMPOSSIBLE[name], "x" * 250).is_one_line_error("too long", "shorter")
    Path("volume").mkdir()
    monkeypatch.setattr(os, "rename", busy("volume"))
    found = tried(place, IMPOSSIBLE[name], "volume")
    assert found.code == 2
    assert found.is_one_line_error("mount point", "Give a folder inside of it", "volume/small")
    for words in WITHIN.values():  # which write files into it, and leave it where it is
        assert "begun" in tried(place, words, "volume").err


def test_resume_rehearses_too(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    unfinished.begin(SMALL, Recipe(budget=taut.Budget(params=0.5)), overwrite=False)
    monkeypatch.setattr(os, "rename", busy("small"))
    found = place("resume", "NETS:build", "--out", "small", task=place.task("never.py", WORK))
    assert found.is_one_line_error("mount point")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["explore", "NETS:build", "--plot", "front.docx"], [".svg, .png or .pdf", ".docx"]),
        (["explore", "NETS:build", "--plot", "front"], [".svg, .png or .pdf"]),
        (["explore", "NETS:build", "--plot", "file/front.svg"], ["is a file"]),
        (["export", "NETS:build", "model.pt"], [".onnx or .xml"]),
        (["export", "NETS:build", "file/model.onnx"], ["is a file"]),
        (["export", "NETS:build", f"{'x' * 240}.onnx"], ["too long"]),
        (["export", "NETS:build", "folder.onnx"], ["is a folder"]),
    ],
)
def test_a_file_that_cannot_be_written_is_said_before_the_work(place: Place, words: list[str], said: list[str]) -> None:
    Path("file").write_text("x")
    Path("folder.onnx").mkdir()
    found = place(*words, task=place.task("never.py", NEVER) if words[0] == "export" else "tasks.py")
    assert found.code == 2
    assert found.is_one_line_error(*said)

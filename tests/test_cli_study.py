"""The command that runs a grid on one model: in several processes, killed, interrupted, and badly called."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from test_cli import Place, place

__all__ = ["place"]

WORDS = ("study", "NETS:build", "--methods", "magnitude,svd", "--sizes", "0.5,0.25")

HELD = """
import time
from pathlib import Path

CALLS = []

def calibration():
    CALLS.append(1)
    while len(CALLS) > 2 and Path("hold").exists():
        time.sleep(0.01)
    return list(torch.split(INPUTS, 50))
"""


def sheet(folder: str) -> list[dict[str, str]]:
    """Without the times, which no two runs share."""
    rows = csv.DictReader(Path(folder, "study.csv").read_text().splitlines())
    return [{key: row[key] for key in row if key not in {"ms", "speedup", "seconds"}} for row in rows]


def test_a_killed_study_goes_on_in_several_processes_and_ends_in_the_same_rows(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taut.studies.studying.find_spec", lambda name: None)
    task = place.task("held.py", HELD)
    whole = place(*WORDS, "--out", "whole", task=task)
    assert (whole.code, whole.err) == (0, "All runs are in whole; a picture needs pip install 'taut[report]'.\n")
    command = [word.replace("NETS:", f"{place.module}:") for word in WORDS]
    script = Path(sys.executable).with_name("taut")
    Path("hold").touch()  # the second compression waits
    runs = Path("broken/runs.jsonl")
    process = subprocess.Popen([script, *command, "--task", task, "--out", "broken"], stderr=subprocess.DEVNULL)
    while process.poll() is None and not (runs.exists() and runs.read_text().count("\n") == 2):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = runs.read_text()
    Path("hold").unlink()
    assert not Path("broken/study.csv").exists()
    assert place(*WORDS, "--out", "broken", "--jobs", "2", task=task).code == 0
    assert runs.read_text().startswith(before)
    assert sheet("broken") == sheet("whole")
    assert [row["method"] for row in sheet("whole")] == ["original", *["magnitude"] * 2, *["svd"] * 2]


def test_explore_in_several_processes_goes_on_after_sigterm(place: Place) -> None:
    words = ("--compare", "none", "--methods", "svd")
    command = ["explore", f"{place.module}:build", "--task", "tasks.py", *words]
    script = Path(sys.executable).with_name("taut")
    process = subprocess.Popen([script, *command, "--out", "o", "--jobs", "2"], stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(Path("o").glob("point-*.json")):
        time.sleep(0.01)
    process.terminate()
    _, said = process.communicate()
    assert process.returncode == 143
    assert "error: terminated; nothing was left half-written. The same command goes on: the points" in said
    first = {path.name: path.read_bytes() for path in Path("o").iterdir()}
    assert first
    found = place("explore", "NETS:build", *words, "--out", "o")
    assert found.code == 0
    assert {name: Path("o", name).read_bytes() for name in first} == first
    assert place("explore", "NETS:build", *words).out == found.out


def test_ctrl_c_says_how_to_go_on(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("taut.studies.studying.study", interrupted)
    found = place("study", "NETS:build", "--out", "o")
    assert found.code == 130
    goes_on = "The same command goes on: finished runs are kept in o."
    assert found.err == f"error: interrupted; nothing was left half-written. {goes_on}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--methods", "nonsense"), "Unknown method 'nonsense'"),
        (("--methods", "svd(rank=)"), "key=value"),
        (("--sizes", "half"), "fractions such as 0.5,25%"),
        (("--sizes", "4"), "fraction kept"),
        (("--seeds", "0"), "--seeds"),
        (("--jobs", "0"), "--jobs"),
        (("--task", "gone.py"), "no task file 'gone.py'"),
        (("--task", "bare.py"), "needs evaluate(model)"),
        (("--task", "blind.py", "--epochs", "1"), "train_loader()"),
    ],
)
def test_a_wrong_call_is_one_line_and_runs_nothing(place: Place, words: tuple[str, ...], message: str) -> None:
    example = "import torch\n\ndef example():\n    return torch.randn(8, 16)\n"
    (place.folder / "bare.py").write_text(example)
    (place.folder / "blind.py").write_text(f"{example}\ndef evaluate(model):\n    return 1.0\n")
    task = None if "--task" in words else "tasks.py"
    found = place("study", "NETS:build", "--out", "o", *words, task=task)
    assert found.code == 2
    assert found.is_one_line_error(message)
    assert not Path("o").exists()


def test_sizes_reach_channels_and_a_study_without_a_model_is_no_success(place: Place) -> None:
    words = ("--methods", "channels,shared,svd,mfbp", "--sizes", "0.6", "--keep", "0=0.5")
    assert place("study", "NETS:build", "--out", "o", *words).code == 0
    rows = sheet("o")
    assert [(row["method"], row["reason"]) for row in rows[1:]] == [
        (n, "") for n in ("channels", "shared", "svd", "mfbp")
    ]
    for row in rows[1:]:
        assert int(row["nonzero" if row["method"] == "mfbp" else "params"]) <= 0.62 * int(rows[0]["params"])
    found = place(
        "study", "NETS:build", "--out", "o", "--methods", "channels,magnitude", "--sizes", "0.6", "--keep", "*"
    )
    assert found.code != 0
    assert "No run of the study made a model. channels: " in found.err

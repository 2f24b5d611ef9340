"""The command line: every command on a small net, and every bad call as one line with its exit code.

`run` is called rather than typer's runner, because turning errors into lines and codes is what is tested.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import taut
from taut.cli import compressing, unfinished
from taut.cli.app import run
from taut.recipe import Recipe

NUMBERS = itertools.count()

NETS = """
import torch
from torch import nn

NOT_A_FUNCTION = 3


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 4))


def build():
    torch.manual_seed(0)
    return Net()


ready = build()


def nothing():
    return None


def broken():
    raise RuntimeError("no such disk")


def nan():
    net = build()
    with torch.no_grad():
        net[2].weight[0, :3] = float("nan")
    return net
"""

TASK = """
import torch
import taut

INPUTS = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))


def example():
    return INPUTS[:8]


def calibration():
    return list(torch.split(INPUTS, 50))


def evaluate(model):
    with torch.no_grad():
        return taut.Metric(float((model(INPUTS).argmax(1) < 2).float().mean()), 200)
"""


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    def is_one_line_error(self, *words: str) -> bool:
        assert self.err.startswith("error: "), self.err
        assert self.err.count("\n") == 1, self.err
        assert "Traceback" not in self.err
        missing = [word for word in words if word not in self.err]
        assert not missing, (missing, self.err)
        return True


Call = Callable[..., Outcome]


@dataclass
class Place:
    """A user's folder with a module of nets under a fresh name, and a task file."""

    folder: Path
    module: str
    capture: pytest.CaptureFixture[str]

    def __call__(self, *words: str, task: str | None = "tasks.py") -> Outcome:
        self.capture.readouterr()
        arguments = [word.replace("NETS:", f"{self.module}:") for word in words]
        code = run([*arguments, *(["--task", task] if task else [])])
        out, err = self.capture.readouterr()
        return Outcome(code, out, err)

    def task(self, name: str, body: str) -> str:
        (self.folder / name).write_text(TASK + body)
        return name


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    module = f"users_nets_{next(NUMBERS)}"
    (tmp_path / f"{module}.py").write_text(NETS)
    (tmp_path / "tasks.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("TAUT_DEBUG", raising=False)
    return Place(tmp_path, module, capsys)


# What works


def test_inspect_lists_layers_and_reasons(place: Place) -> None:
    found = place("inspect", "NETS:build")
    assert (found.code, found.err) == (0, "")
    assert "48x48" in found.out
    assert "total" in found.out


def test_a_class_and_a_ready_network_are_models_too(place: Place) -> None:
    assert place("inspect", "NETS:Net").code == 0
    assert place("inspect", "NETS:ready").code == 0


def test_compress_saves_a_folder_that_the_other_commands_take(place: Place) -> None:
    found = place("compress", "NETS:build", "--budget", "params=0.5", "--out", "small")
    assert (found.code, found.err) == (0, "")
    assert "whole model" in found.out
    assert "Saved in small" in found.out
    assert {path.name for path in Path("small").iterdir()} == {"model.safetensors", "manifest.json", "comparison.json"}
    base = ("--base", "NETS:build")
    assert place("inspect", "small", *base).code == 0
    metric = place("evaluate", "small", *base)
    assert metric.code == 0
    assert "n = 200" in metric.out
    timed = place("benchmark", "NETS:build", "--against", "small", "--rounds", "2")
    assert timed.code == 0
    assert "best against best" in timed.out


def test_compress_without_a_budget_shows_the_front_and_writes_nothing(place: Place) -> None:
    before = sorted(place.folder.rglob("*"))
    found = place("compress", "NETS:build")
    assert found.code == 0
    assert "4x" in found.out
    assert "nothing was changed" in found.err
    assert [p for p in sorted(place.folder.rglob("*")) if "__pycache__" not in str(p)] == before


def test_explore_keeps_its_points_and_plots(place: Place) -> None:
    found = place("explore", "NETS:build", "--out", "front", "--plot", "front.svg")
    assert found.code == 0
    assert list(Path("front").glob("point-*.json"))
    assert Path("front.svg").read_text().startswith("<?xml")
    assert place("explore", "NETS:build", "--out", "front").out == found.out  # not one was measured again


def test_benchmark_of_one_model(place: Place) -> None:
    found = place("benchmark", "NETS:build", "--rounds", "2")
    assert found.code == 0
    assert "eager" in found.out
    assert "samples per second" in found.out


def test_benchmark_against_another_does_not_say_that_there_is_no_evaluate(place: Place) -> None:
    found = place("benchmark", "NETS:build", "--against", "NETS:ready", "--rounds", "2")
    assert found.code == 0
    assert "without `evaluate`" not in found.out
    assert "`taut evaluate` asks" in found.out


def test_methods_and_doctor(place: Place) -> None:
    listed = place("methods", task=None)
    assert listed.code == 0
    for name, kind in taut.methods.METHODS.items():
        assert name in listed.out
        assert (kind.__doc__ or "").splitlines()[0].split()[0] in listed.out
    checked = place("doctor", task=None)
    assert checked.code == 0, checked.out
    assert "Everything looks right" in checked.out


def test_options_override_the_recipe(place: Place) -> None:
    Path("r.yaml").write_text("budget: {params: 0.9}\nmethods: [svd]\nseed: 5\n")
    wish = compressing._wish(Path("r.yaml"), None, None, None)
    assert (wish.budget, wish.seed) == (taut.Budget(params=0.9), 5)
    assert compressing._wish(Path("r.yaml"), None, None, None, "none").compare is False
    wish = compressing._wish(Path("r.yaml"), "macs=0.5", "tucker,spatial", 7)
    assert (wish.budget, wish.seed) == (taut.Budget(macs=0.5), 7)
    assert wish.methods is not None
    assert [method.name for method in wish.methods] == ["tucker", "spatial"]
    assert compressing._wish(Path("r.yaml"), None, "low rank", None).methods == taut.methods.choose(None)
    assert place("compress", "NETS:build", "--recipe", "r.yaml", "--out", "small").code == 0


def test_weights_from_safetensors_pt_and_checkpoints(place: Place) -> None:
    torch.manual_seed(1)
    state = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 4)).state_dict()
    safetensors.torch.save_file(state, "w.safetensors")
    torch.save(state, "w.pt")
    torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}, "c.pt")
    said = {place("evaluate", "NETS:build", "--weights", name).out for name in ("w.safetensors", "w.pt", "c.pt")}
    assert len(said) == 1
    assert said != {place("evaluate", "NETS:build").out}


def test_without_evaluate_or_calibration_it_says_what_was_not_checked(place: Place) -> None:
    Path("bare.py").write_text("import torch\n\n\ndef example():\n    return torch.ones(2, 16)\n")
    found = place("compress", "NETS:build", "--budget", "params=0.5", "--out", "small", task="bare.py")
    assert found.code == 0
    assert "no accuracy" in found.err
    assert "weights alone" in found.err
    place("evaluate", "NETS:build", task="bare.py").is_one_line_error("needs evaluate(model)", "bare.py")


def test_train_loader_stands_in_for_calibration(place: Place) -> None:
    name = place.task("loader.py", "\n\ntrain_loader = calibration\ndel calibration\n")
    found = place("compress", "NETS:build", "--budget", "params=0.5", "--out", "small", task=name)
    assert (found.code, found.err) == (0, "")


# The call is wrong: 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["inspect", "NETS:none"], ["has no 'none'"]),
        (["inspect", "no_such_module:net"], ["no module 'no_such_module'"]),
        (["inspect", "NETS:NOT_A_FUNCTION"], ["must be a function or class", "int"]),
        (["inspect", "NETS:nothing"], ["must return a torch.nn.Module", "NoneType"]),
        (["inspect", "no_such_folder"], ["package.module:factory", "no_such_folder"]),
        (["inspect", "NETS:build", "--weights", "none.pt"], ["no weights file 'none.pt'"]),
        (["inspect", "."], ["--base"]),
        (["inspect", ".", "--base", "NETS:build", "--weights", "w.pt"], ["--weights belongs to a factory"]),
        (["inspect", "NETS:build", "--wieghts", "x"], ["No such option", "taut inspect --help"]),
        (["inspect"], ["Missing argument"]),
        (["shrink"], ["No such command"]),
        (["compress", "NETS:build", "--budget", "speed=3"], ["Unknown budget key 'speed'", "params, macs, bytes"]),
        (["compress", "NETS:build", "--budget", "macs=2.0"], ["macs", "(0, 1]"]),
        (["compress", "NETS:build", "--methods", "magic"], ["Unknown method 'magic'", "svd"]),
        (["compress", "NETS:build", "--recipe", "none.yaml"], ["none.yaml", "cannot be read"]),
        (["compress", "NETS:build", "--budget", "macs=0.5", "--seed", "x"], ["--seed"]),
        (["compress", "NETS:build", "--budget", "macs=0.5", "--out", "."], ["did not save", "--overwrite"]),
        (["benchmark", "NETS:build", "--rounds", "0"], ["--rounds"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else str(value),
)
def test_wrong_calls(place: Place, words: list[str], said: list[str]) -> None:
    found = place(*words, task=None if words == ["shrink"] else "tasks.py")
    assert found.code == 2
    assert found.out == ""
    assert found.is_one_line_error(*said)


def test_no_command_shows_the_help(place: Place) -> None:
    found = place(task=None)
    assert found.code == 2
    assert "compress" in found.out + found.err
    assert "error:" not in found.err


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("none.py", None, "no task file"),
        ("empty.py", "", "must define example()"),
        ("number.py", "example = 3", "must be a function"),
        ("notes.txt", "hello", "Python file"),
    ],
)
def test_wrong_task_files(place: Place, file: str, text: str | None, said: str) -> None:
    if text is not None:
        Path(file).write_text(text)
    found = place("inspect", "NETS:build", task=file)
    assert found.code == 2
    assert found.is_one_line_error(file, said)


def test_drop_needs_evaluate(place: Place) -> None:
    name = place.task("blind.py", "\n\ndel evaluate\n")
    found = place("compress", "NETS:build", "--budget", "drop=0.01", "--out", "small", task=name)
    assert found.code == 2
    assert found.is_one_line_error("evaluate")


# The budget cannot be met: 3


def test_an_impossible_budget_saves_the_closest_result(place: Place) -> None:
    found = place("compress", "NETS:build", "--budget", "params=10", "--out", "small")
    assert found.code == 3
    assert "closest result is saved in small" in found.err
    assert "error: " in found.err.splitlines()[-1]
    assert place("inspect", "small", "--base", "NETS:build").code == 0


# The data or the model is bad: 4


class Bomb:
    """Unpickled, it makes a file: what a malicious checkpoint does."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("exploded",)


def test_a_malicious_pickle_is_refused_and_not_run(place: Place) -> None:
    torch.save({"weight": Bomb()}, "evil.pt")
    Path("old.pt").write_bytes(pickle.dumps(Bomb()))
    for name in ("evil.pt", "old.pt"):
        found = place("inspect", "NETS:build", "--weights", name)
        assert found.code == 4
        assert found.is_one_line_error(name, "refused", "safetensors")
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("2.weight"), "lack '2.weight'"),
        (lambda state: state.update({f"extra.{n}": torch.ones(1) for n in range(5)}), "and 2 more"),
        (lambda state: state.update({"2.weight": torch.ones(3, 3)}), "size mismatch for 2.weight"),
    ],
)
def test_weights_that_do_not_fit(place: Place, change: Callable[[dict[str, torch.Tensor]], None], said: str) -> None:
    state = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 4)).state_dict()
    change(state)
    safetensors.torch.save_file(state, "w.safetensors")
    found = place("inspect", "NETS:build", "--weights", "w.safetensors")
    assert found.code == 4
    assert found.is_one_line_error("w.safetensors", "do not fit", said)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_damaged_weights(place: Place, name: str) -> None:
    Path(name).write_bytes(b"\x00" * 100)
    found = place("inspect", "NETS:build", "--weights", name)
    assert found.code == 4
    assert found.is_one_line_error(name)


def test_weights_that_are_no_state_dict(place: Place) -> None:
    torch.save([torch.ones(2)], "list.pt")
    found = place("inspect", "NETS:build", "--weights", "list.pt")
    assert found.code == 4
    assert found.is_one_line_error("no state dict")


@pytest.mark.parametrize("command", ["inspect", "evaluate", "benchmark", "explore"])
def test_nan_weights_are_named(place: Place, command: str) -> None:
    found = place(command, "NETS:nan")
    assert found.code == 4
    assert found.is_one_line_error("2.weight", "3 NaN or Inf")


def test_a_factory_that_raises(place: Place) -> None:
    found = place("inspect", "NETS:broken")
    assert found.code == 4
    assert found.is_one_line_error("broken", "RuntimeError: no such disk")


def test_a_module_that_cannot_be_imported(place: Place) -> None:
    Path("shaky_nets.py").write_text("import a_package_that_is_missing\n")
    found = place("inspect", "shaky_nets:net")
    assert found.code == 4
    assert found.is_one_line_error("shaky_nets", "a_package_that_is_missing")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def evaluate(model):\n    raise KeyError('labels')", "evaluate raised KeyError"),
        ("def evaluate(model):\n    return float('nan')", "nan"),
        ("def evaluate(model):\n    return 'good'", "Return a number"),
        ("def calibration():\n    return []", "gave no batch"),
        ("def calibration():\n    return [torch.ones(4, 2, 2, 2)]", "float32[4, 2, 2, 2]"),
        ("def calibration():\n    return [{'image': torch.ones(4, 16), 'depth': torch.ones(4, 16)}]", "image"),
        ("def calibration():\n    raise OSError('disk full')", "calibration() in the task file"),
        ("def calibration():\n    return [torch.full((64, 16), float('nan'))]", "not finite"),
        ("def example():\n    return torch.ones(2, 5)", "cannot be run"),
        ("def example():\n    return 'text'", "at least one tensor"),
        ("def example():\n    return torch.ones(0, 16)", "at least one tensor"),
        ("raise ValueError('half a task')", "Importing the task file"),
    ],
)
def test_bad_tasks_lose_nothing(place: Place, body: str, said: str) -> None:
    name = place.task(f"bad_{next(NUMBERS)}.py", f"\n\n{body}\n")
    found = place("compress", "NETS:build", "--budget", "params=0.5", "--out", "small", task=name)
    assert found.code == 4
    assert found.is_one_line_error(said)
    assert not Path("small").exists()


def test_a_damaged_folder(place: Place) -> None:
    assert place("compress", "NETS:build", "--budget", "params=0.5", "--out", "small").code == 0
    weights = Path("small/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    found = place("inspect", "small", "--base", "NETS:build")
    assert found.code == 4
    assert found.is_one_line_error()


# The process itself


def test_debug_shows_the_traceback(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAUT_DEBUG", "1")
    with pytest.raises(taut.ModelError):
        place("inspect", "NETS:broken")


def test_an_unforeseen_error_is_one_line_too(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taut, "inspect", lambda *_: 1 / 0)
    found = place("inspect", "NETS:build")
    assert found.code == 4
    assert found.is_one_line_error("ZeroDivisionError", "TAUT_DEBUG=1")


def test_ctrl_c_is_one_line_and_leaves_nothing(place: Place) -> None:
    place.task(
        "slow.py", "\n\ndef evaluate(model):\n    import time\n    print('now', flush=True)\n    time.sleep(60)\n"
    )
    words = ["compress", f"{place.module}:build", "--task", "slow.py", "--budget", "params=0.5", "--out", "small"]
    # as from a terminal: the signal ends the work, and Python must not ignore it
    process = subprocess.Popen(
        [sys.executable, "-c", "from taut.cli import main; main()", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,  # noqa: PLW1509
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "now\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith("error: interrupted")
    assert "`taut resume`" in err
    assert [path.name for path in Path("small").iterdir()] == ["unfinished"]


def test_the_script_is_installed_and_a_closed_pipe_is_no_error(place: Place) -> None:
    script = Path(sys.executable).with_name("taut")
    done = subprocess.run(f"{script} methods | true", shell=True, capture_output=True, text=True, check=False)  # noqa: S602
    assert (done.returncode, done.stderr) == (0, "")
    shown = subprocess.run([script, "--version"], capture_output=True, text=True, check=False)
    assert shown.stdout.startswith("taut 0")


def test_progress_reaches_the_bar(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taut.core.showing.PATIENCE", 1e-9)
    monkeypatch.setattr("taut.core.showing.UNNOTICED", 0.0)
    found = place("compress", "NETS:build", "--budget", "params=0.5", "--out", "small")
    assert found.code == 0
    lines = found.err.splitlines()
    assert all(re.fullmatch(r"[\w .]+: (\d+( of \d+)?, )?[\d.]+ s", line) for line in lines), lines
    assert [line.partition(":")[0] for line in lines if "observing" in line or "refitting" in line]
    assert "\x1b" not in found.err
    assert "\r" not in found.err


def test_kept_layers_are_part_of_what_is_resumed(place: Place) -> None:
    words = ("--budget", "params=0.7", "--methods", "svd", "--compare", "none", "--keep", "2=50%", "--keep", "Tanh")
    found = place("compress", "NETS:build", "--out", "o", *words)
    assert found.is_one_line_error("'Tanh', but the model has no such layer")
    recipe = Path("keep.yaml")
    recipe.write_text("keep: {'2': 1}\nbudget: {params: 0.8}\nmethods: [svd]\ncompare: false\n")
    wish = Recipe.read(recipe)
    unfinished.begin(Path("begun"), wish, overwrite=False)
    assert unfinished.requested(Path("begun")) == wish
    assert place("compress", "NETS:build", "--out", "kept", "--recipe", str(recipe)).code == 0
    plan = json.loads(Path("kept/manifest.json").read_text())["plan"]
    assert [kept["code"] for kept in plan["kept"] if kept["layer"] == "2"] == ["as asked"]

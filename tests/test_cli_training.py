"""The commands that train, resume and export, on a small net."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch

from taut.cli import unfinished
from taut.training import loop
from test_cli import Place, place

__all__ = ["place"]

TRAINING = """

def train_loader():
    torch.manual_seed(1)
    return list(torch.split(torch.randn(400, 16), 50))
"""

WORDS = ("compress", "NETS:build", "--budget", "params=0.4", "--epochs", "3", "--out", "small")


def weights() -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file("small/model.safetensors")


def interrupt_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    asked = 0

    @contextmanager
    def interrupts() -> Iterator[Callable[[], bool]]:
        def noted() -> bool:
            nonlocal asked
            asked += 1
            return asked >= 2 * number

        yield noted

    monkeypatch.setattr(loop, "_interrupts", interrupts)


def test_training_is_interrupted_and_resumed_to_the_same_weights(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    task = place.task("train.py", TRAINING)
    whole = place(*WORDS, task=task)
    assert (whole.code, whole.err) == (0, "")
    expected = weights()
    Path("small").rename("whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 11)
        broken = place(*WORDS, task=task)
    assert broken.code == 130
    assert "`taut resume` with the same MODEL, --task and --out small goes on" in broken.err
    assert [path.name for path in Path("small").iterdir()] == ["unfinished"]
    other = place("compress", "NETS:build", "--budget", "params=0.3", "--out", "small", task=task)
    assert other.code == 2
    assert other.is_one_line_error("unfinished run of other settings", "--overwrite")
    resumed = place("resume", "NETS:build", "--out", "small", task=task)
    assert resumed.code == 0
    assert {path.name for path in Path("small").iterdir()} == {"model.safetensors", "manifest.json", "comparison.json"}
    assert all(torch.equal(t, expected[name]) for name, t in weights().items())


def test_training_changes_the_weights_and_a_cascade_too(place: Place) -> None:
    task, found = place.task("train.py", TRAINING), []
    for extra in ((), ("--epochs", "2"), ("--epochs", "2", "--cascade")):
        words = ("compress", "NETS:build", "--budget", "params=0.4", "--out", "small", *extra)
        assert place(*words, task=task).code == 0
        found.append(weights())
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert set(found[a]) == set(found[b])
        assert any(not torch.equal(found[a][name], found[b][name]) for name in found[a])


def test_recipes_train(place: Place) -> None:
    Path("r.yaml").write_text("budget: {params: 0.4}\nfinetune: {epochs: 2, rate: 0.002}\nsensitivity: true\n")
    found = place("compress", "NETS:build", "--recipe", "r.yaml", "--out", "small", task=place.task("t.py", TRAINING))
    assert found.code == 0
    Path("bad.yaml").write_text("budget: {params: 0.4}\nfinetune: {epochs: -1}\n")
    assert place("compress", "NETS:build", "--recipe", "bad.yaml").is_one_line_error("epochs")
    Path("worse.yaml").write_text("finetune: {epoch: 1}\n")
    assert place("compress", "NETS:build", "--recipe", "worse.yaml").is_one_line_error("epoch")


def test_what_resume_and_training_lack_is_named(place: Place) -> None:
    assert place("resume", "NETS:build").is_one_line_error("nothing to resume in 'taut-small'")
    cascade = place("compress", "NETS:build", "--budget", "params=0.4", "--cascade")
    assert cascade.is_one_line_error("--epochs")
    (place.folder / "bare.py").write_text("import torch\n\ndef example():\n    return torch.randn(8, 16)\n")
    found = place("compress", "NETS:build", "--budget", "params=0.4", "--epochs", "1", task="bare.py")
    assert found.code == 2
    assert found.is_one_line_error("train_loader()")
    assert not Path("taut-small").exists()


def test_a_damaged_request_is_refused(place: Place) -> None:
    folder = Path("small") / unfinished.UNFINISHED
    folder.mkdir(parents=True)
    (folder / unfinished.REQUEST).write_text('{"recipe": {"budget": {"params": 0.4}}}')
    found = place("resume", "NETS:build", "--out", "small")
    assert found.code == 4
    assert found.is_one_line_error("damaged")


def test_export_prints_the_parity(place: Place) -> None:
    found = place("export", "NETS:build", "model.onnx")
    assert (found.code, found.err) == (0, "")
    assert "onnxruntime" in found.out
    assert "openvino" in found.out
    assert Path("model.onnx").stat().st_size > 10_000
    assert place("export", "NETS:build", "model.pt").is_one_line_error(".onnx")
    assert place("compress", "NETS:build", "--budget", "params=0.5", "--out", "small").code == 0
    assert place("export", "small", "small.onnx", "--base", "NETS:build").code == 0
    assert Path("small.onnx").stat().st_size < Path("model.onnx").stat().st_size


def test_a_failing_export_exits_with_an_error_and_writes_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taut.artifact.exporting.LIMIT", -1.0)
    found = place("export", "NETS:build", "model.onnx")
    assert found.code == 4
    assert found.is_one_line_error("computes something else")
    assert not Path("model.onnx").exists()

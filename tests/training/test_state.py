"""The state of a run: whole or absent, and every damaged byte found."""

import os
import random

import pytest
import torch

from faults import stops
from taut.core.files import OLD
from taut.errors import ArtifactError, CallError
from taut.training.state import (
    POSITION,
    TENSORS,
    Position,
    Store,
    fill_optimizer,
    optimizer_tensors,
    packed,
    unpacked,
)


def written(folder):
    store = Store(folder)
    position = Position("mark", stage=1, epoch=2, batch=3, best=0.5, history=[(0, 1, 0.25, 1.5)])
    store.write(position, packed("model", {"w": torch.arange(6.0)}) | packed("best", {"w": torch.zeros(6)}))
    return store, position


def test_what_was_written_is_read(tmp_path):
    store, position = written(tmp_path / "state")
    found, tensors = store.read("mark")
    assert found == position
    assert torch.equal(unpacked("model", tensors)["w"], torch.arange(6.0))
    assert torch.equal(unpacked("best", tensors)["w"], torch.zeros(6))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state"]


def test_no_folder_keeps_nothing(tmp_path):
    store = Store(None)
    store.write(Position("mark"), {})
    assert store.read("mark") is None
    assert not store.due
    assert Store(tmp_path / "never").read("mark") is None


def test_killed_at_every_call_the_old_state_or_the_new_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    store, old = written(tmp_path / "run" / "state")
    new = Position("mark", stage=7)

    seen = []
    for _ in stops(lambda: store.write(new, packed("model", {"w": torch.ones(6)}))):
        position, tensors = store.read("mark")
        assert (position == new) == torch.equal(unpacked("model", tensors)["w"], torch.ones(6))
        seen.append(position)
        written(store.folder)
        assert [path.name for path in store.folder.parent.iterdir()] == ["state"]
    assert old in seen
    assert new in seen


def test_a_state_that_was_set_aside_with_the_folder_around_it_is_found(tmp_path):
    store, position = written(tmp_path / "run" / "state")
    for folder in (store.folder, store.folder.parent):
        folder.rename(folder.with_name(f"{OLD}{folder.name}"))
        assert Store(tmp_path / "run" / "state").read("mark")[0] == position


def test_a_folder_that_cannot_be_replaced_is_found_before_the_training(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CallError, match="is a file"):
        Store(tmp_path / "file")
    with pytest.raises(CallError, match="too long"):
        Store(tmp_path / ("x" * 250))
    monkeypatch.setenv("RANK", "1")  # which never writes
    Store(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_state_of_another_run_is_refused(tmp_path):
    store, _ = written(tmp_path / "state")
    with pytest.raises(CallError, match="another model, plan, schedule or seed"):
        store.read("other")


@pytest.mark.parametrize("name", [TENSORS, POSITION])
def test_every_flipped_bit_and_every_cut_is_found(tmp_path, name):
    store, _ = written(tmp_path / "state")
    path, dice = tmp_path / "state" / name, random.Random(0)
    good = path.read_bytes()
    for trial in range(200):
        damaged = bytearray(good)
        if trial % 4:
            damaged[dice.randrange(len(good))] ^= 1 << dice.randrange(8)
        else:
            del damaged[dice.randrange(len(good)) :]
        path.write_bytes(bytes(damaged))
        with pytest.raises(ArtifactError):
            store.read("mark")


def test_an_optimizer_goes_on_where_it_was():
    def make():
        weight = torch.nn.Parameter(torch.ones(3))
        return weight, torch.optim.Adam([weight], lr=0.1)

    def step(weight, optimizer, value):
        weight.grad = torch.full((3,), value)
        optimizer.step()

    one, first = make()
    for value in (1.0, -2.0):
        step(one, first, value)
    two, second = make()
    two.data = one.data.clone()
    fill_optimizer(second, {name: t.clone() for name, t in optimizer_tensors(first).items()})
    step(one, first, 0.5)
    step(two, second, 0.5)
    assert torch.equal(one, two)

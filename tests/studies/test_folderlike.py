"""The curves of the prune-then-tucker study on a folder of classes: tried on a few small files and a short net."""

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from taut.errors import ArtifactError, DataError

Image = pytest.importorskip("PIL.Image")

HERE = Path(__file__).parents[2] / "experiments" / "prune-then-tucker"
COLOURS = {"blue": (0, 0, 255), "red": (255, 0, 0)}


@pytest.fixture
def folderlike(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE.parent / "nets"))
    monkeypatch.syspath_prepend(str(HERE))
    before = set(sys.modules)
    module = import_module("folderlike")
    monkeypatch.setattr(sys.modules["googlenet"], "TABLE", (((16, 16, 24, 8, 16, 16),),))
    yield module
    for name in set(sys.modules) - before:
        if str(HERE.parent) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def data(tmp_path):
    """Two classes of one colour each, brighter and darker."""
    for split, count in (("train", 20), ("test", 3)):
        for name, colour in COLOURS.items():
            place = tmp_path / "imagefolder" / split / name
            place.mkdir(parents=True)
            for number in range(count):
                shade = tuple(value * (40 + number) // 60 for value in colour)
                Image.new("RGB", (32, 32), shade).save(place / f"{number}.png")
    return tmp_path


@pytest.fixture
def reads(folderlike, monkeypatch):
    """Every file that is read, in order."""
    found, read = [], folderlike.read
    monkeypatch.setattr(folderlike, "read", lambda path, side: found.append(path) or read(path, side))
    return found


def small(folderlike):
    return folderlike.Size(small=True, width=0.25, side=32, epoch=24, epochs=2, calibration=16, scratch=1)


def run(folderlike, data, way, level):
    place = {"folder": str(data), "out": str(data), "quick": False}
    cell = {"net": "imagefolder", "way": way, "level": level, "seed": 0}
    return folderlike.run(place, cell, small(folderlike))


def test_runs_are_wanted_where_the_folders_are(folderlike, data, tmp_path):
    assert not folderlike.wanted(None, quick=False)
    assert not folderlike.wanted(str(tmp_path / "imagefolder"), quick=False)
    assert not folderlike.wanted(str(data), quick=True)
    ways = [cell["way"] for cell in folderlike.wanted(str(data), quick=False)]
    assert set(ways) == {"control", "prune", "tucker", "prune-tucker"}
    assert ways.count("control") == 1


def test_a_tenth_of_the_training_images_is_for_validation(folderlike, data):
    train, valid, test, classes = folderlike.splits(data)
    assert (len(train), len(valid), len(test), classes) == (36, 4, 6, 2)
    assert not {path for path, _ in train} & {path for path, _ in valid}
    assert (train, valid) == folderlike.splits(data)[:2]
    assert {(path.parent.name, number) for path, number in [*train, *test]} == {("blue", 0), ("red", 1)}


def test_folders_that_do_not_fit_are_refused(folderlike, data):
    (data / "imagefolder" / "test" / "green").mkdir()
    with pytest.raises(DataError, match=r"same classes. They differ in: green"):
        folderlike.splits(data)
    (data / "imagefolder" / "train" / "green").mkdir()
    for path in (data / "imagefolder" / "test").glob("*/*"):
        path.unlink()
    with pytest.raises(DataError, match="Got 40 and 0 instead"):
        folderlike.splits(data)


def test_images_are_read_batch_by_batch_in_a_new_order(folderlike, data, reads, monkeypatch):
    monkeypatch.setattr(folderlike, "BATCH", 8)
    train = folderlike.splits(data)[0]
    pictures = folderlike.Pictures(train, 32, 24)
    assert len(pictures) == 3
    x, y = next(iter(pictures))
    assert len(reads) == 8
    assert x.shape == (8, 3, 32, 32)
    assert y.tolist() == [int(path.parent.name == "red") for path in reads]
    reads.clear()
    torch.manual_seed(0)
    first, second = ([path for _ in pictures for path in [reads.pop(0) for _ in range(8)]] for _ in range(2))
    assert set(first) == set(second) == {path for path, _ in train[:24]}
    assert first != second


def test_accuracy_counts_all_images(folderlike, data, monkeypatch):
    monkeypatch.setattr(folderlike, "BATCH", 4)
    test = folderlike.splits(data)[2]
    blue_or_red = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2, bias=False))
    blue_or_red[2].weight.data = torch.tensor([[0.0, 0, 1], [1, 0, 0]])
    assert folderlike.accuracy(blue_or_red, test, 32) == 1
    assert blue_or_red.training
    blue_or_red[2].weight.data *= -1
    assert folderlike.accuracy(blue_or_red, test, 32) == 0
    assert folderlike.accuracy(blue_or_red, [*test[:1], *test[-3:], (test[0][0], 1)], 32) == 1 / 5


def test_the_net_is_trained_once_then_pruned_and_factorized(folderlike, data, reads):
    found = run(folderlike, data, "prune-tucker", [0.7, 1.0])
    assert 0 < found["macs"] <= 0.7
    assert 0 < found["params"] < 1
    test = [path for path in reads if path.parts[-3] == "test"]
    assert len(test) == len(set(test)) == 6
    assert reads[-6:] == test
    (weights,) = data.glob("imagefolder-*.safetensors")
    before = weights.stat().st_mtime_ns
    control = run(folderlike, data, "control", None)
    assert weights.stat().st_mtime_ns == before
    assert control["macs"] == control["params"] == 1
    assert 0 <= control["accuracy"] <= 1


def test_weights_of_the_user_are_taken(folderlike, data):
    sets, size = folderlike.splits(data), small(folderlike)
    net = folderlike.googlenet(2, size.width, small=True)
    state = {name: t.half() for name, t in net.state_dict().items() if t.is_floating_point()}
    marks = [folderlike.mark(str(data), size)]
    save_file(state, data / folderlike.WEIGHTS)
    marks.append(folderlike.mark(str(data), size))
    assert marks[0] != marks[1]
    taken = folderlike.trained(data, data, (sets[0], sets[1], 2), size)
    known = load_file(data / folderlike.WEIGHTS)
    assert all(torch.equal(t, known[name].float()) for name, t in taken.state_dict().items() if name in known)
    assert not taken.training
    assert not list(data.glob("imagefolder-*.safetensors"))
    with pytest.raises(ArtifactError, match="GoogLeNet with 3 classes"):
        folderlike.trained(data, data, (sets[0], sets[1], 3), size)
    save_file(dict(list(state.items())[1:]), data / folderlike.WEIGHTS)
    with pytest.raises(ArtifactError, match="Missing key"):
        folderlike.trained(data, data, (sets[0], sets[1], 2), size)

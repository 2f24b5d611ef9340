"""The source's own evaluation reads an image folder in ImageNet's layout; tried on small files."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

Image = pytest.importorskip("PIL.Image")

HERE = Path(__file__).parents[2] / "experiments" / "linear-structure"


@pytest.fixture
def imagenet(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.syspath_prepend(str(HERE.parent / "nets"))
    import imagenet  # noqa: PLC0415 - a script's neighbour, found through the line above

    yield imagenet
    for name in ("imagenet", "imagefolder", "shapes"):
        sys.modules.pop(name, None)


@pytest.fixture
def folder(tmp_path):
    """Three classes of one colour each; wide, high, small, grey, and a file that is no image."""
    root = tmp_path / "imagenet"
    sizes = [(300, 260), (260, 400), (40, 30), (256, 256)]
    for split in ("train", "val"):
        for number, colour in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255)]):
            place = root / split / f"n0{number}"
            place.mkdir(parents=True)
            for count, size in enumerate(sizes):
                Image.new("RGB", size, colour).save(place / f"{count}.JPEG")
            (place / "notes.txt").write_text("no image")
    Image.new("L", (230, 300), 128).save(root / "val" / "n00" / "grey.JPEG")
    return root


def test_images_are_cropped_and_labelled_in_alphabetical_order(imagenet, folder):
    imagefolder = sys.modules["imagefolder"]
    ((x, y),) = imagenet.batches(folder / "val", 100)
    assert x.shape == (13, 3, 224, 224)
    assert y.tolist() == [0] * 5 + [1] * 4 + [2] * 4
    mean, std = torch.tensor(imagefolder.MEAN), torch.tensor(imagefolder.STD)
    shown = x.mean((2, 3)) * std + mean
    assert shown[5:].argmax(1).tolist() == [1] * 4 + [2] * 4
    assert float(shown.max()) < 1.01
    (few,) = imagenet.batches(folder / "val", 3)
    assert few[1].tolist() == [0, 1, 2]


def test_top_5_error_counts(imagenet, folder):
    class Colours(nn.Module):
        def forward(self, x):
            return torch.cat([x.mean((2, 3)), torch.full((len(x), 7), 9.0)], 1)  # seven wrong classes come first

    assert imagenet.top_5_error(Colours(), folder / "val") == 1.0
    assert imagenet.top_5_error(lambda x: -Colours()(x), folder / "val") < 1.0


def test_without_weights_or_images_it_is_not_there(imagenet, folder, tmp_path):
    assert imagenet.find(None) is None
    assert imagenet.find(tmp_path) is None
    (folder / "net.safetensors").write_bytes(b"")
    assert imagenet.find(tmp_path) == folder

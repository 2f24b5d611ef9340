"""Image sets as files: CIFAR-10's binary records."""

import sys
from pathlib import Path

import pytest
import torch

NETS = Path(__file__).parents[2] / "experiments" / "nets"


@pytest.fixture
def data(monkeypatch):
    monkeypatch.syspath_prepend(str(NETS))
    import data  # noqa: PLC0415 - a script's neighbour, found through the line above

    yield data
    sys.modules.pop("data", None)


def test_cifar_records_are_a_label_and_three_planes(data, tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    records = torch.randint(0, 256, (6, 3073), dtype=torch.uint8)
    records[:, 0] = torch.arange(6)
    for name, part in (("data_batch_1", records[:2]), ("data_batch_2", records[2:4]), ("test_batch", records[4:])):
        (folder / f"{name}.bin").write_bytes(part.numpy().tobytes())
    x, y = data.load("cifar-10", "train", tmp_path)
    assert (x.shape, y.tolist()) == ((4, 3, 32, 32), [0, 1, 2, 3])
    assert x[1, 2, 31, 30] == records[1, 1 + 2 * 1024 + 31 * 32 + 30] / 255
    assert data.load("cifar-10", "test", tmp_path)[1].tolist() == [4, 5]


def test_cifar_that_is_not_there_or_torn(data, tmp_path):
    with pytest.raises(FileNotFoundError, match="CIFAR-10"):
        data.load("cifar-10", "train", tmp_path)
    (tmp_path / "cifar-10").mkdir()
    (tmp_path / "cifar-10" / "test_batch.bin").write_bytes(bytes(3074))
    with pytest.raises(ValueError, match="3073"):
        data.load("cifar-10", "test", tmp_path)

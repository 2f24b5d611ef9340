"""Image sets read from a folder the user names: IDX files (MNIST, Fashion-MNIST) and CIFAR-10's binary files."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SYSTEM = Path("/usr/share/datasets")
"""Where Debian's dataset packages put their files; searched last."""


def find_set(name: str, folder: Path | None = None) -> Path:
    """The folder that holds `name` ("mnist", "fashion-mnist"): FOLDER/name, FOLDER itself, or the system's.

    Raises:
        FileNotFoundError: none of them holds the four IDX files.
    """
    places = [*([folder / name, folder] if folder else []), SYSTEM / name]
    for place in places:
        if list(place.glob("train-images-idx3-ubyte*")):
            return place
    looked = ", ".join(str(place) for place in places)
    raise FileNotFoundError(f"No {name} IDX files (train-images-idx3-ubyte.gz ...) in: {looked}")


def read_idx(path: Path) -> Tensor:
    """An IDX file of unsigned bytes, gzipped or not, as a uint8 tensor.

    Raises:
        ValueError: the magic number is not that of unsigned bytes, or the file is too short.
    """
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(raw) < 4 or raw[2] != 8:
        raise ValueError(f"'{path}' is not an IDX file of unsigned bytes.")
    ndim = raw[3]
    shape = np.frombuffer(raw, ">i4", ndim, 4).astype(int)
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim)
    if values.size != shape.prod():
        raise ValueError(f"'{path}' declares {shape.prod()} values. Got {values.size} instead.")
    return torch.from_numpy(values.reshape(shape).copy())


def load(name: str, split: str, folder: Path | None = None) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) in [0, 1] and labels (N,) of `split` ("train" or "test"); "cifar-10" (N, 3, 32, 32)."""
    if name == CIFAR:
        return load_cifar(split, folder)
    place = find_set(name, folder)
    prefix = {"train": "train", "test": "t10k"}[split]
    images, labels = (read_idx(next(place.glob(f"{prefix}-{kind}-ubyte*"))) for kind in ("images-idx3", "labels-idx1"))
    return images[:, None].float() / 255, labels.long()


CIFAR = "cifar-10"
PIXELS = 3 * 32 * 32


def load_cifar(split: str, folder: Path | None = None) -> tuple[Tensor, Tensor]:
    """CIFAR-10 from its binary files (`cifar-10-batches-bin`, or `cifar-10`): a byte of label, then red, green, blue.

    Raises:
        FileNotFoundError: they are not there.
        ValueError: a file is not a row of such records.
    """
    places = [base / sub for base in (*([folder] if folder else []), SYSTEM) for sub in ("cifar-10-batches-bin", CIFAR)]
    pattern = {"train": "data_batch_*.bin", "test": "test_batch.bin"}[split]
    found = next((sorted(place.glob(pattern)) for place in places if list(place.glob(pattern))), None)
    if found is None:
        raise FileNotFoundError(f"No CIFAR-10 binary files ({pattern}) in: {', '.join(map(str, places))}")
    raw = np.concatenate([np.frombuffer(path.read_bytes(), np.uint8) for path in found])
    if raw.size % (1 + PIXELS):
        raise ValueError(f"'{found[0].parent}' does not hold whole records of {1 + PIXELS} bytes.")
    records = torch.from_numpy(raw.reshape(-1, 1 + PIXELS).copy())
    return records[:, 1:].reshape(-1, 3, 32, 32).float() / 255, records[:, 0].long()


def split_train(name: str, folder: Path | None = None, valid: int = 5000) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The training split divided, always the same way: (x, y) to train on and (x, y) to choose on."""
    x, y = load(name, "train", folder)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    keep, held = order[valid:], order[:valid]
    return x[keep], y[keep], x[held], y[held]

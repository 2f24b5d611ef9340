"""What all runs share: the letters, the trained nets, training with early stopping, and every kind of run."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from lenet import LARGER, WIDTHS, kept, lenet, size, widths_for
from letters import Letters, load_letters
from reductions import EXAMPLE, PUBLISHED, as_the_code, counts, planned, reduced, rewound
from running import accuracy
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

import taut
from taut.artifact.manifest import taut_version
from taut.core.files import write_atomic
from taut.studies import Cell

BATCH, EPOCHS, PATIENCE, RATE = 100, 100, 10, 1e-3
QUICK = {"images": 3000, "epochs": 12, "patience": 3}
CALIBRATION = 2048
"""Training images for the data metric and the refit."""


class Counted:
    """(images, labels) in a new order every epoch, from the random state that the loop sets; it counts whole epochs."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        """Keep them."""
        self.x, self.y, self.epochs = x, y, 0

    def __len__(self) -> int:
        """Batches in an epoch."""
        return (len(self.x) + BATCH - 1) // BATCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch."""
        for rows in torch.randperm(len(self.x)).split(BATCH):
            yield self.x[rows], self.y[rows]
        self.epochs += 1


LARGER_IMAGES = 8_000
"""Training images of the larger net, whose epoch takes six times as long."""


@cache
def letters(folder: Path | None, quick: bool, net: str = "lenet") -> Letters:
    """The images, read once per process."""
    return load_letters(folder, QUICK["images"] if quick else LARGER_IMAGES if net == "larger" else None)


def stopped_early(net: nn.Module, data: Letters, seed: int, quick: bool) -> tuple[nn.Module, int]:
    """Adam at a fixed rate until the validation loss has not fallen for ten epochs; the best weights, the epochs.

    Weights that are zero stay zero.
    """
    batches = Counted(*data.train)
    valid = list(zip(data.valid[0].split(500), data.valid[1].split(500), strict=True))
    stage = taut.Stage(
        epochs=QUICK["epochs"] if quick else EPOCHS,
        patience=QUICK["patience"] if quick else PATIENCE,
        rate=RATE,
        decay=False,
        hold_zeros=True,
    )
    tuned = taut.finetune(
        net,
        None,
        None,
        batches,
        valid,
        schedule=(stage,),
        loss=nn.functional.cross_entropy,
        example=data.train[0][:EXAMPLE],
        seed=seed,
    )
    return tuned, batches.epochs


def mark(folder: Path | None, quick: bool) -> str:
    """What the runs depend on besides their settings: the letters, versions and constants."""
    data = letters(folder, quick)
    parts = [t for part in (data.train, data.valid, data.test) for t in part]
    digest = sha256(b"".join(t.numpy().tobytes() for t in parts)).hexdigest()[:16]
    constants = (BATCH, EPOCHS, PATIENCE, RATE, QUICK, CALIBRATION, LARGER_IMAGES)
    return f"taut {taut_version()}, torch {torch.__version__}, letters {digest}, {constants}"


def dense(cell: Cell, widths: tuple[int, ...]) -> tuple[nn.Module, int]:
    """The trained net from which all reduced ones of a seed start, and its epochs; trained once, then read."""
    known = sha256(mark(_folder(cell), cell["quick"]).encode()).hexdigest()[:8]
    path = Path(cell["out"]) / "nets" / f"{'-'.join(map(str, widths))}-{cell['seed']}-{known}.safetensors"
    net: nn.Module = lenet(cell["seed"], widths)
    if not path.exists():
        data = letters(_folder(cell), cell["quick"], "larger" if widths == LARGER else "lenet")
        net, epochs = stopped_early(net, data, cell["seed"], cell["quick"])
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {key: t.contiguous() for key, t in net.state_dict().items()}
        write_atomic(path, to_bytes(state | {"epochs": torch.tensor(epochs)}))
    state = load_file(path)
    epochs = int(state.pop("epochs"))
    net.load_state_dict(state)
    return net.eval(), epochs


def _folder(cell: Cell) -> Path | None:
    return None if cell["folder"] is None else Path(cell["folder"])


def run(place: Cell, cell: Cell) -> dict[str, Any]:
    """One run: build the net, score it, train it further, score it again.

    Args:
        place: data folder, output folder, and whether the run is a quick one.
        cell: the run.
    """
    where = place | cell
    data = letters(_folder(where), where["quick"], cell["net"])
    original, trained = dense(where, LARGER if cell["net"] == "larger" else WIDTHS)
    if cell["way"] == "dense":
        return {"params": kept(original), "epochs": trained, **judged(original, data)}
    small, sizes = built(where, original, data)
    before = accuracy(small, *data.test)
    tuned, epochs = stopped_early(small, data, cell["seed"] + 10, where["quick"])
    return {**sizes, "untrained": before, "epochs": epochs, **judged(tuned, data)}


def judged(net: nn.Module, data: Letters) -> dict[str, float]:
    """Accuracy on the images that stopped the training, and on those that nothing has seen."""
    return {"valid": accuracy(net, *data.valid), "test": accuracy(net, *data.test)}


def built(cell: Cell, original: nn.Module, data: Letters) -> tuple[nn.Module, dict[str, Any]]:
    """The net of a run before its training, and its sizes."""
    way, experiment, level = cell["way"], cell["experiment"], cell["level"]
    if way == "control":
        return original, {"params": kept(original)}
    if way == "scratch":
        widths = widths_for(PUBLISHED[experiment, level][0])
        return lenet(cell["seed"] + 100, widths), {"params": size(widths)}
    x = data.train[0]
    calibration = list(x[:CALIBRATION].split(256)) if way == "data" else None
    if way == "planned":
        small = planned(original, PUBLISHED[experiment, level][0], x[:CALIBRATION])
    elif way == "code":
        small = as_the_code(original, experiment, level, x, cell["seed"])
    else:
        small = reduced(original, experiment, level, x, calibration)
    sizes = counts(original, small, experiment)
    if way == "rewound":
        small = rewound(small, cell["seed"])
    return small, sizes

"""The curves on a folder of classes, such as Food-101: GoogLeNet at 224 x 224, images read as they are needed.

    DATA/imagefolder/train/CLASS/*.jpg      a tenth is for validation, always the same
    DATA/imagefolder/test/CLASS/*.jpg       read for the final accuracy of a run alone
    DATA/googlenet.safetensors              state dict of `googlenet(classes)`

Without weights the net is first trained from scratch, `Size.scratch` epochs of mirrored images; killed, that goes on
where it was. The results of `taut reproduce prune-then-tucker` then have the curves of one more net.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pipelines
import torch
from googlenet import googlenet
from imagefolder import BATCH, SIDE, listed, read
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import taut
from taut.artifact.manifest import taut_version
from taut.errors import ArtifactError, DataError
from taut.studies import Cell

NET = "imagefolder"
WEIGHTS = "googlenet.safetensors"
VALID = 10
"""One training image in so many is for validation."""

Files = Sequence[tuple[Path, int]]


@dataclass(frozen=True)
class Size:
    """Of the net, and of what it learns from.

    Attributes:
        small, width: of `googlenet`. side: of its images.
        epoch: images of an epoch of fine-tuning at most.
        epochs: of every run, as in `pipelines`.
        calibration: images without labels that are observed and refitted on.
        scratch: epochs over all training images, where there are no weights.
    """

    small: bool = False
    width: float = 1.0
    side: int = SIDE
    epoch: int = pipelines.IMAGES
    epochs: int = pipelines.EPOCHS
    calibration: int = 512
    scratch: int = 30


FULL = Size()


def wanted(data: str | None, quick: bool) -> list[Cell]:
    """Runs of the three curves and the control; none without the folders, and none that is quick."""
    if quick or data is None or not all((Path(data) / NET / split).is_dir() for split in ("train", "test")):
        return []
    levels: list[tuple[str, Any]] = [("control", None)]
    levels += [("prune", [macs]) for macs in pipelines.PRUNED]
    levels += [("tucker", [knob]) for knob in pipelines.KNOBS]
    levels += [("prune-tucker", list(pair)) for pair in pipelines.BOTH]
    return [{"net": NET, "way": way, "level": level, "seed": 0} for way, level in levels]


def mark(data: str, size: Size = FULL) -> str:
    """What all runs depend on beside their settings."""
    return f"taut {taut_version()}, torch {torch.__version__}, data {_digest(Path(data))}, {size}"


def run(place: Cell, cell: Cell, size: Size = FULL) -> dict[str, Any]:
    """One net compressed and tuned: its size, and its accuracy on the test split."""
    data = Path(place["folder"])
    train, valid, test, classes = splits(data)
    model = trained(data, Path(place["out"]), (train, valid, classes), size)
    work = _Work(model, train, valid, size, cell["seed"])
    small = work.carried_out(cell["way"], cell["level"], pipelines.kept(place, cell, mark(place["folder"], size)))
    cost = taut.trace(small, work.example).cost
    return {
        "accuracy": accuracy(small, test, size.side),
        "params": cost.params / work.net.cost.params,
        "macs": cost.macs / work.net.cost.macs,
    }


def splits(data: Path) -> tuple[Files, Files, Files, int]:
    """Images to train on, to choose on and to test on, and how many classes there are.

    Raises:
        DataError: the splits do not have the same classes, or a split has too few images.
    """
    folders = [data / NET / split for split in ("train", "test")]
    classes, others = ([path.name for path in sorted(f.iterdir()) if path.is_dir()] for f in folders)
    if classes != others:
        told = ", ".join(sorted(set(classes) ^ set(others))[:3])
        raise DataError(f"'{folders[0]}' and '{folders[1]}' must have the same classes. They differ in: {told}.")
    files, test = map(listed, folders)
    if len(files) < 2 * VALID or not test:
        raise DataError(
            f"'{data / NET}' must have at least {2 * VALID} images to train on and one to test on. "
            f"Got {len(files)} and {len(test)} instead."
        )
    held = len(files) // VALID
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    return [files[i] for i in order[held:]], [files[i] for i in order[:held]], test, len(classes)


class Pictures:
    """(images, labels) of image files, read batch by batch; in a new order, and half of them mirrored, every epoch."""

    def __init__(self, files: Files, side: int, most: int) -> None:
        """At most `most` of the files: the first, since `splits` has shuffled them."""
        self.files, self.side = files[:most], side

    def __len__(self) -> int:
        """Batches in an epoch."""
        return (len(self.files) + BATCH - 1) // BATCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch, from the random state that the loop sets."""
        for rows in torch.randperm(len(self.files)).split(BATCH):
            x, y = loaded([self.files[i] for i in rows], self.side)
            yield torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x), y


def loaded(files: Files, side: int) -> tuple[Tensor, Tensor]:
    """Images (N, 3, side, side) and labels (N,)."""
    return torch.stack([read(path, side) for path, _ in files]), torch.tensor([number for _, number in files])


@torch.no_grad()
def accuracy(net: nn.Module, files: Files, side: int) -> float:
    """Share of images that the net names right, in eval mode."""
    training = net.training
    net.eval()
    hits = 0
    for start in range(0, len(files), BATCH):
        x, y = loaded(files[start : start + BATCH], side)
        hits += int((net(x).argmax(1) == y).sum())
    net.train(training)
    return hits / len(files)


def trained(data: Path, out: Path, sets: tuple[Files, Files, int], size: Size) -> nn.Module:
    """The uncompressed net in eval mode: with the user's weights, or those that it learned here.

    Raises:
        ArtifactError: the weights are of another net.
    """
    train, valid, classes = sets
    torch.manual_seed(0)
    net = googlenet(classes, size.width, size.small)
    given, own = data / WEIGHTS, out / f"{NET}-{_digest(data)}.safetensors"
    if not given.exists() and not own.exists():
        learned = _from_scratch(net, train, valid, size, out / f"{NET}-training")
        save_file({name: t.contiguous() for name, t in learned.state_dict().items()}, own)
    path = given if given.exists() else own
    state = load_file(path)
    state = {name: t.float() if t.is_floating_point() else t for name, t in state.items()}
    counters = {name: t for name, t in net.state_dict().items() if name.endswith("num_batches_tracked")}
    try:
        net.load_state_dict(counters | state)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise ArtifactError(f"'{path}' must hold the weights of GoogLeNet with {classes} classes. {first}") from None
    return net.eval()


def _from_scratch(net: nn.Module, train: Files, valid: Files, size: Size, folder: Path) -> nn.Module:
    pictures = Pictures(train, size.side, len(train))
    return taut.finetune(
        net,
        None,
        None,
        pictures,
        lambda small: accuracy(small, valid, size.side),
        loss=nn.functional.cross_entropy,
        schedule=(taut.Stage(epochs=size.scratch, optimizer="sgd", rate=0.05, weight_decay=1e-4),),
        example=loaded(train[:2], size.side)[0],
        folder=folder,
    )


class _Work(pipelines._Work):
    """The ways of `pipelines` on images that are read as they are needed."""

    def __init__(self, model: nn.Module, train: Files, valid: Files, size: Size, seed: int) -> None:
        self.train, self.valid, self.size = train, valid, size
        x = loaded(train[: size.calibration], size.side)[0]
        self.batches, self.example = list(x.split(BATCH)), x[:2]
        self.model, self.net, self.data = model, taut.trace(model, self.example), (x,)
        self.epochs, self.seed = size.epochs, seed

    def tuned(self, model: nn.Module, groups: list[list[taut.Step]], epochs: list[int]) -> nn.Module:
        """Steps carried out group by group, with training after each."""
        net = taut.trace(model, self.example)
        steps = [step for group in groups for step in group]
        ends = [sum(map(len, groups[:number])) for number in range(len(epochs) + 1)]
        stages = [
            taut.Stage(tuple(range(start, end)), epochs=count)
            for start, end, count in zip(ends[:-1], ends[1:], epochs, strict=True)
        ]
        return taut.finetune(
            model,
            taut.Plan.of(net, steps) if steps else None,
            taut.observe(net, model, self.batches),
            Pictures(self.train, self.size.side, self.size.epoch),
            lambda small: accuracy(small, self.valid, self.size.side),
            loss=nn.functional.cross_entropy,
            schedule=tuple(stages),
            seed=self.seed,
        )


def _digest(data: Path) -> str:
    """Of the names and lengths of all files, and of the weights that are given."""
    found = hashlib.sha256()
    for path in sorted((data / NET).glob("*/*/*")):
        found.update(f"{path.relative_to(data)} {path.stat().st_size}\n".encode())
    if (data / WEIGHTS).exists():
        found.update((data / WEIGHTS).read_bytes())
    return found.hexdigest()[:12]

"""What all parts of the study share: the images, nets that are trained once, and ramps through `taut.finetune`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from data import load
from mlps import BATCH, accuracy
from rules import step
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import taut

EXAMPLE = 2
"""Samples of the example that fixes how a net is called."""

Data = tuple[Tensor, Tensor]


class Shuffled:
    """(images, labels) in a new order every epoch, from the random state that the loop sets."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        """Keep them."""
        self.x, self.y = x, y

    def __len__(self) -> int:
        """Batches in an epoch."""
        return (len(self.x) + BATCH - 1) // BATCH

    def __iter__(self) -> Any:
        """One epoch."""
        for rows in torch.randperm(len(self.x)).split(BATCH):
            yield self.x[rows], self.y[rows]


class Lab:
    """The data folder, and a folder of nets that are trained once for many runs."""

    def __init__(self, data: Path | None, out: Path) -> None:
        """Remember where; images are read when they are asked for."""
        self.folder, self.nets = data, out / "nets"
        self.sets: dict[tuple[str, str], Data] = {}

    def images(self, name: str, split: str) -> Data:
        """The set `name`, "train" or "test"."""
        if (name, split) not in self.sets:
            self.sets[name, split] = load(name, split, self.folder)
        return self.sets[name, split]

    def part(self, name: str, count: int, seed: int = 0, skip: int = 0) -> Data:
        """`count` training images of a fixed shuffle, behind the first `skip`."""
        x, y = self.images(name, "train")
        rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[skip : skip + count]
        return x[rows], y[rows]

    def once(self, key: str, make: Callable[[], nn.Module], train: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """The net of that key: read from the folder, or made and trained now."""
        path = self.nets / f"{key}.safetensors"
        if path.exists():
            net = make()
            net.load_state_dict(load_file(path))
            return net.eval()
        return self.keep(key, train(make()).eval())

    def read(self, key: str, empty: nn.Module) -> nn.Module:
        """A net that another part kept, filled into `empty`."""
        empty.load_state_dict(load_file(self.nets / f"{key}.safetensors"))
        return empty.eval()

    def keep(self, key: str, net: nn.Module) -> nn.Module:
        """Write a net for later parts."""
        self.nets.mkdir(parents=True, exist_ok=True)
        save_file({k: t.contiguous() for k, t in net.state_dict().items()}, self.nets / f"{key}.safetensors")
        return net


def ramped(  # noqa: PLR0913 - the settings of a protocol
    model: nn.Module,
    rule: str,
    sparsity: float,
    train: Data,
    valid: Data,
    *,
    times: int,
    epochs: int,
    last: int,
    seed: int,
    rank: int | None = None,
    layers: Sequence[str] = (),
) -> nn.Module:
    """The model pruned by a cubic ramp with training in between; "control" is trained as long and not pruned."""
    net = taut.trace(model, train[0][:EXAMPLE])
    batches, judge = Shuffled(*train), lambda small: accuracy(small, *valid)
    settings: dict[str, Any] = {"loss": nn.functional.cross_entropy, "seed": seed}
    if rule == "control":
        stages = tuple(taut.Stage(epochs=last if t == times - 1 else epochs) for t in range(times))
        return taut.finetune(model, None, None, batches, judge, schedule=stages, example=train[0][:EXAMPLE], **settings)
    plan = taut.Plan.of(net, taut.ramp(step(net, rule, sparsity, rank, layers), times))
    schedule = taut.alternate(plan, epochs=epochs, last=last)
    return taut.finetune(model, plan, taut.observe(net, model), batches, judge, schedule=schedule, **settings)

"""The state of a training run in a folder: written as a whole, checked when read, and enough to go on after a kill.

training.safetensors   the model, the best weights so far, the optimizer's moments, the random states
training.json          where the run stands, and the SHA-256 of the file above; sealed
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors.torch import load, save
from torch import Tensor

from taut.core.atomic_folder import reading, recover, rehearse, replacing
from taut.core.files import one_line, read, seal, unseal, write
from taut.errors import ArtifactError, CallError
from taut.training.losses import Reading
from taut.types import Kept, Step
from taut.types.budget import FORBID

TENSORS, POSITION = "training.safetensors", "training.json"
OURS = frozenset({TENSORS, POSITION})

EVERY = 60.0
"""Seconds between two states within an epoch; one more is written at its end."""

LARGEST = 1 << 36


@dataclass
class Position:
    """Where a run stands.

    Attributes:
        mark: fingerprint of model, plan, schedule and seed: a state of another run is not continued.
        stage, epoch, batch: what comes next.
        applied: whether the steps of this stage are applied.
        steps: applied so far, resolved.
        best: validation value of the best weights of this stage; None before the first validation.
        waited: epochs since then.
        length: batches in an epoch, once known.
        history: (stage, epoch, validation value, mean loss) of every finished epoch.
        reading: how the original's outputs are read, once that is settled.
        kept: layers whose step was rolled back.
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID
    mark: str
    stage: int = 0
    epoch: int = 0
    batch: int = 0
    applied: bool = False
    steps: tuple[Step, ...] = ()
    best: float | None = None
    waited: int = 0
    length: int | None = None
    history: list[tuple[int, int, float | None, float | None]] = field(default_factory=list)
    reading: Reading | None = None
    kept: tuple[Kept, ...] = ()

    def next_stage(self) -> None:
        """Everything that belongs to one stage begins anew."""
        self.stage, self.epoch, self.batch, self.applied, self.best, self.waited = self.stage + 1, 0, 0, False, None, 0


_ADAPTER = TypeAdapter(Position)  # made once: it takes longer than what it writes


class Store:
    """The folder of a run; None keeps nothing."""

    def __init__(self, folder: str | Path | None) -> None:
        """Remember where, once it is sure that states can be written there.

        Raises:
            CallError: the folder cannot be replaced.
            ArtifactError: the operating system does not allow it.
        """
        self.folder = None if folder is None else recover(folder, OURS)
        if self.folder is not None and os.environ.get("RANK", "0") == "0":  # of several processes the first one writes
            rehearse(self.folder, OURS)
        self.last = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether the last state is old."""
        return self.folder is not None and time.monotonic() - self.last >= EVERY

    def write(self, position: Position, tensors: Mapping[str, Tensor]) -> None:
        """Replace the state; a kill leaves the old one or the new one.

        Raises:
            ArtifactError: it cannot be written.
        """
        if self.folder is None:
            return
        data = save({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()})
        stamp = {"sha256": sha256(data).hexdigest(), "bytes": len(data)}
        content = {"file": stamp, "position": _ADAPTER.dump_python(position, mode="json")}
        with replacing(self.folder, OURS) as new:
            write(new / TENSORS, data)
            write(new / POSITION, seal(content))
        self.last = time.monotonic()

    def read(self, mark: str) -> tuple[Position, dict[str, Tensor]] | None:
        """The state, or None where there is none.

        Raises:
            ArtifactError: it is damaged.
            CallError: it belongs to another run.
        """
        if self.folder is None:
            return None
        with reading(self.folder, OURS):
            if not (self.folder / POSITION).exists():
                return None
            content = unseal(read(self.folder / POSITION), POSITION)
            data = read(self.folder / TENSORS, LARGEST)
        stamp = content.get("file")
        if not isinstance(stamp, dict) or stamp.get("sha256") != sha256(data).hexdigest():
            raise ArtifactError(f"'{self.folder / TENSORS}' is damaged: its SHA-256 is not the one in {POSITION}.")
        try:
            position = _ADAPTER.validate_python(content.get("position"))
        except ValidationError as error:
            raise ArtifactError(f"{POSITION}: {one_line(error.errors()[0]['msg'])}.") from None
        if position.mark != mark:
            raise CallError(
                f"'{self.folder}' holds the training of another model, plan, schedule or seed. Go on with the same "
                "ones, or choose another folder."
            )
        return position, load(data)


def packed(kind: str, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Names put under `kind`."""
    return {f"{kind}/{name}": t for name, t in tensors.items() if isinstance(t, Tensor)}


def unpacked(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `packed` put under `kind`."""
    return {name.removeprefix(f"{kind}/"): t for name, t in tensors.items() if name.startswith(f"{kind}/")}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The moments of every parameter, by its place."""
    state = optimizer.state_dict()["state"]
    return {
        f"{place}/{key}": value
        for place, own in state.items()
        for key, value in own.items()
        if isinstance(value, Tensor)
    }


def fill_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimizer back what `optimizer_tensors` took."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        place, _, key = name.partition("/")
        state.setdefault(int(place), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

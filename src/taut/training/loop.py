"""The one training loop: one stage of a schedule, from wherever it stands, to its best validation weights.

It runs on Accelerate, so several devices and mixed precision are options of `accelerate launch`. Every process reads
the same batches and takes its part of each; gradients are means over the whole batch, so that the number of processes
does not change the result (batch norms that learn from labels excepted: each process normalizes by its own part).
"""

from __future__ import annotations

import math
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from taut.core.example import Example
from taut.core.extras import missing
from taut.core.modes import device_of
from taut.core.progress import stage as announce
from taut.core.randomness import capture, mixed, restore, seed_all
from taut.core.tensors import on_device
from taut.errors import CallError, DataError, ModelError
from taut.nn import fill_plain, plain_state
from taut.training.batches import Batches, share, weight
from taut.training.freezing import train_mode
from taut.training.losses import Objective
from taut.training.state import Position, Store, fill_optimizer, optimizer_tensors, packed, unpacked
from taut.types import Stage

Judge = Callable[[nn.Module], float]
"""Validation value of a model; higher is better."""

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": lambda params, lr, weight_decay: torch.optim.SGD(
        params, lr, momentum=0.9, nesterov=True, weight_decay=weight_decay
    ),
}


def require_training() -> None:
    """Find out before long work whether what training needs is installed.

    Raises:
        CallError: Accelerate is not.
    """
    if missing("accelerate") is not None:
        raise CallError("Training needs Accelerate: pip install 'taut[train]'.")


class Idle:
    """In the place of Accelerate where nothing is trained."""

    device = torch.device("cpu")

    @property
    def is_main_process(self) -> bool:
        """Whether this is the first of several processes, or the only one."""
        return os.environ.get("RANK", "0") == "0"

    def free_memory(self) -> None:
        """Nothing is held."""


def accelerator() -> Any:
    """Accelerate's view of this process.

    Raises:
        CallError: Accelerate is not installed.
    """
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs  # noqa: PLC0415 - an optional extra
    except ImportError:
        raise CallError("Training needs Accelerate: pip install 'taut[train]'.") from None
    # Layers that the example never runs get no gradient; without this, several processes wait for it forever.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(device_placement=False, kwargs_handlers=[unused])


def launched() -> bool:
    """Whether `accelerate launch` or torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@dataclass
class Trainer:
    """Everything that one stage needs; `run` does it.

    Attributes:
        model: trained in place. still: modules that stay as they are.
        stage: the settings. objective: what is minimized. batches: training data. judge: validation, or None.
        example: how the model is called. accelerator: Accelerate's. position: where the run stands, updated.
        store: where its state is kept. seed: of everything random. penalty: added to the loss; with one the last
            weights stay, since what it is for costs some of the validation value.
    """

    model: nn.Module
    still: list[nn.Module]
    stage: Stage
    objective: Objective
    batches: Batches
    judge: Judge | None
    example: Example
    accelerator: Any
    position: Position
    store: Store
    seed: int
    penalty: Callable[[], Tensor] | None = None

    def run(self, found: dict[str, Tensor]) -> None:
        """Train until the epochs, the patience or the target end it; the model then holds the best weights.

        Args:
            found: tensors of an interrupted run of this very stage; empty at its start.
        """
        learning = [p for p in self.model.parameters() if p.requires_grad]
        if self.stage.train == "none" or not self.stage.epochs or not learning:
            return
        if self.batches.once and self.stage.epochs > 1:
            raise DataError(self.batches.again)
        half = {str(p.dtype).removeprefix("torch.") for p in learning if p.dtype in {torch.float16, torch.bfloat16}}
        if half:
            raise ModelError(f"Weights in {', '.join(half)} cannot be trained: convert the model with .float() first.")
        optimizer = OPTIMIZERS[self.stage.optimizer](learning, lr=self.stage.rate, weight_decay=self.stage.weight_decay)
        self.best: dict[str, Tensor] = unpacked("best", found)
        if optimizer_state := unpacked("optimizer", found):
            fill_optimizer(optimizer, optimizer_state)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        if not found:
            self._validate(None)
            self._save()
        random = unpacked("random", found)
        try:
            with (
                announce(f"training stage {self.position.stage + 1}", self._total()) as bar,
                _interrupts() as interrupted,
            ):
                bar(self._done())
                while self.position.epoch < self.stage.epochs and not self._over():
                    self._epoch(random, bar, interrupted)
                    random = {}
        finally:
            if self.best:
                fill_plain(self.model, self.best)

    def _epoch(self, random: dict[str, Tensor], bar: Any, interrupted: Callable[[], bool]) -> None:
        at = self.position
        seed_all(self.seed, at.stage, at.epoch)
        self.batches.reseed(mixed(self.seed, at.stage, at.epoch), at.epoch)
        raw = iter(self.batches)
        for _ in range(at.batch):  # what the interrupted run had done; the loader draws the same numbers again
            next(raw)
        if at.batch and random:
            restore(random)
        losses: list[float] = []
        train_mode(self.model, self.still, labels=self.objective.share < 1)
        for batch in raw:
            loss = self._step(batch)
            if loss is None:
                warnings.warn("The loss is not finite: the stage ends with the best weights so far.", stacklevel=2)
                at.epoch = self.stage.epochs
                return
            losses.append(loss)
            at.batch += 1
            bar.note(f"loss {loss:.4g}")
            bar()
            if interrupted() or self.store.due:
                self._save()
            if interrupted():
                raise KeyboardInterrupt
        if not at.batch:
            raise DataError("The training data gave no batch.")
        at.length, at.batch, at.epoch = at.batch, 0, at.epoch + 1
        self._validate(sum(losses) / len(losses) if losses else None)
        self._save()
        if interrupted():
            raise KeyboardInterrupt

    def _step(self, batch: Any) -> float | None:
        """One update; the loss of this process's part, or None, and no update, where any process has no finite one."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate()
        inputs, targets = self.batches.read(batch)
        if self.objective.distills and self.objective.reading is None:
            self.position.reading = self.objective.settle(self.batches.original(-1, inputs), inputs, targets)
        samples = self.example.samples
        size, mine = samples.size(inputs), (self.accelerator.process_index, self.accelerator.num_processes)
        device = device_of(self.model)
        inputs, targets = on_device(share(samples, (inputs, targets), size, *mine), device)
        original = self.batches.original(self.position.batch, inputs) if self.objective.distills else None
        with torch.enable_grad(), self.accelerator.autocast():
            output = self.example.run(self.wrapped, inputs, training=True)
            loss = self.objective(output, targets, on_device(original, device), inputs)
            scaled = loss * weight(size, *mine) if mine[1] > 1 else loss
        if not self._finite(loss):
            return None
        self.optimizer.zero_grad()
        with torch.enable_grad():
            self.accelerator.backward(scaled if self.penalty is None else scaled + self.penalty().to(scaled))
        self.optimizer.step()
        return float(loss.detach())

    def _finite(self, loss: Tensor) -> bool:
        """Whether the loss is finite in every process: all must decide alike."""
        finite = torch.isfinite(loss.detach())
        return bool(self.accelerator.gather(finite.reshape(1)).all())

    def _rate(self) -> float:
        """Half a cosine over the stage, or the same all the time."""
        if not self.stage.decay:
            return self.stage.rate
        at, length = self.position, self.batches.length or self.position.length
        done = at.epoch + (at.batch / length if length else 0.0)
        return 0.5 * self.stage.rate * (1 + math.cos(math.pi * min(1.0, done / self.stage.epochs)))

    def _validate(self, loss: float | None) -> None:
        """Keep the weights if they are the best of this stage so far."""
        at, value = self.position, None if self.judge is None else self._agreed(self.judge(self.model))
        finite = value if value is not None and math.isfinite(value) else None
        if at.epoch:
            at.history.append((at.stage, at.epoch, finite, loss))
        if value is None:
            return
        if self.penalty is not None:
            at.best = finite
            return
        if finite is not None and (at.best is None or finite > at.best):
            at.best, at.waited = finite, 0
            self.best = {name: t.detach().clone() for name, t in plain_state(self.model).items()}
        else:
            at.waited += 1

    def _agreed(self, value: float) -> float:
        """The first process's value: all must decide alike."""
        if self.accelerator.num_processes == 1:
            return value
        from accelerate.utils import broadcast_object_list  # noqa: PLC0415 - an optional extra

        return float(broadcast_object_list([value])[0])

    def _over(self) -> bool:
        at, stage = self.position, self.stage
        reached = stage.target is not None and at.best is not None and at.best >= stage.target
        return reached or (stage.patience is not None and at.waited >= stage.patience)

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            self.store.write(
                self.position,
                packed("model", plain_state(self.model))
                | packed("best", self.best)
                | packed("optimizer", optimizer_tensors(self.optimizer))
                | packed("random", capture()),
            )

    def _total(self) -> int | None:
        length = self.batches.length
        return None if length is None else length * self.stage.epochs

    def _done(self) -> int:
        return self.position.epoch * (self.batches.length or 0) + self.position.batch


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Ctrl-C noted, so that the batch is finished and the state saved; a second one takes effect at once.

    So is SIGTERM, where somebody handles it, as the command line does.
    """
    caught = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield caught.is_set
        return
    old = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handled = [number for number, handler in old.items() if number == signal.SIGINT or callable(handler)]

    def note(number: int, frame: Any) -> None:
        handler = old[signal.Signals(number)]
        if callable(handler) and (caught.is_set() or number == signal.SIGTERM):
            with nullcontext() if caught.is_set() else suppress(KeyboardInterrupt):
                handler(number, frame)  # SIGTERM at once: whoever handles it notes it, or ends
        caught.set()

    for number in handled:
        signal.signal(number, note)
    try:
        yield caught.is_set
    finally:
        for number in handled:
            signal.signal(number, old[number])

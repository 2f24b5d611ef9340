"""Latency of two models measured side by side: interleaved, warmed up, medians, ratios from one run only."""

from __future__ import annotations

import copy
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from taut.calls import Example, device_of, evaluating, map_tensors, on_device, quietly, tensors
from taut.errors import CallError
from taut.measure.storage import refuse_lazy

SHORTEST = 1e-3
"""Seconds: a faster call is repeated until it takes this long, for the clock and the loop to weigh nothing."""


@dataclass(frozen=True)
class Pair:
    """Median latency in milliseconds of the two models."""

    before: float
    after: float

    @property
    def ratio(self) -> float:
        """How many times faster the second one is; below 1 it is slower."""
        return self.before / self.after


@dataclass(frozen=True)
class Latency:
    """Latency of a model and of its replacement on the example.

    Attributes:
        runtimes: medians by runtime: "eager", "channels_last" and whatever else could run both.
        skipped: runtime -> why it could not be measured.
    """

    runtimes: dict[str, Pair]
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def best(self) -> Pair:
        """Each model in its own fastest runtime."""
        pairs = self.runtimes.values()
        return Pair(min(pair.before for pair in pairs), min(pair.after for pair in pairs))


def interleave(runs: Mapping[str, Callable[[], object]], rounds: int = 15, warmup: int = 3) -> dict[str, float]:
    """Median milliseconds of each call, all of them called in every round, in an order rotated from round to round.

    Drift of the machine (clock, other processes) thus hits all of them alike. Work on a device must be waited for
    inside the call.

    Raises:
        CallError: nothing to run, or fewer than 1 round or warm-up call.
    """
    for key, value in (("rounds", rounds), ("warmup", warmup), ("number of runs", len(runs))):
        if value < 1:
            raise CallError(f"The {key} must be at least 1. Got {value} instead.")
    repeats = {name: _repeats(run, warmup) for name, run in runs.items()}
    order = list(runs)
    times: dict[str, list[float]] = {name: [] for name in order}
    with _no_collection():
        for turn in range(rounds):
            shift = turn % len(order)
            for name in order[shift:] + order[:shift]:
                times[name].append(_seconds(runs[name], repeats[name]))
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def _repeats(run: Callable[[], object], warmup: int) -> int:
    """How often to call in one measurement, judged by the fastest warm-up call."""
    fastest = min(_seconds(run, 1) for _ in range(warmup))
    return max(1, math.ceil(SHORTEST / max(fastest, 1e-7)))


def _seconds(run: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection in the middle of a measurement."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@quietly
def latencies(before: nn.Module, after: nn.Module, example: Example, rounds: int = 15) -> Latency:
    """Interleaved latency of both models on the example, in eval mode, in every runtime that applies.

    "eager" is the model as it is; "channels_last" the same with its 4-d weights in that memory format (on a copy that
    shares everything else), where the example and a model have something to convert.

    Raises:
        ModelError: a model cannot be run on the example, or is not initialized.
    """
    models = {"before": before, "after": after}
    for model in models.values():
        refuse_lazy(model.named_parameters())
    with evaluating(before), evaluating(after):
        runs = {("eager", side): _caller(model, example) for side, model in models.items()}
        skipped: dict[str, str] = {}
        if _has_images(example) and any(_has_kernels(model) for model in models.values()):
            try:
                copies = {side: channels_last(model) for side, model in models.items()}
                runs |= {("channels_last", side): _caller(model, example, True) for side, model in copies.items()}
            except Exception as error:  # a copy may fail in any way; eager is measured all the same
                skipped["channels_last"] = f"{type(error).__name__}: {error}"
        medians = interleave({" ".join(key): run for key, run in runs.items()}, rounds)
    names = dict.fromkeys(runtime for runtime, _ in runs)
    return Latency({name: Pair(medians[f"{name} before"], medians[f"{name} after"]) for name in names}, skipped)


def _caller(model: nn.Module, example: Example, images_last: bool = False) -> Callable[[], object]:
    """A call without arguments that runs the model and waits for its device; the inputs are laid out beforehand."""
    device = device_of(model)
    inputs = map_tensors(Tensor.clone, on_device(example.value, device))
    if images_last:
        inputs = map_tensors(_last, inputs)
    example.run(model, inputs)
    args: tuple[Any, ...] = inputs if isinstance(example.value, tuple) else (inputs,)
    args, kwargs = ((), dict(inputs)) if example.keywords else (args, {})
    if device.type != "cuda":
        return lambda: model(*args, **kwargs)

    def synchronized() -> None:
        model(*args, **kwargs)
        torch.cuda.synchronize(device)

    torch.cuda.synchronize(device)
    return synchronized


def channels_last(model: nn.Module) -> nn.Module:
    """A copy whose 4-d parameters and buffers lie in channels_last memory; all other tensors are the model's own."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        own = [v for v in vars(module).values() if isinstance(v, Tensor)]
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False), *own):
            if id(tensor) not in memo:
                memo[id(tensor)] = _converted(tensor)
    return copy.deepcopy(model, memo)


def _converted(tensor: Tensor) -> Tensor:
    if tensor.ndim != 4:
        return tensor
    data = _last(tensor.detach())
    return nn.Parameter(data, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data


def _last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def _has_images(example: Example) -> bool:
    return any(tensor.ndim == 4 for tensor in tensors(example.value))


def _has_kernels(model: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv2d | nn.ConvTranspose2d) for module in model.modules())

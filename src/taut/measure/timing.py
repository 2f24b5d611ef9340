"""Latency of two models measured side by side: interleaved, warmed up, medians, ratios from one run only."""

from __future__ import annotations

import gc
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from taut.calls import Example, evaluating, map_tensors, quietly
from taut.errors import CallError, ModelError
from taut.files import one_line
from taut.measure.onnx import to_onnx
from taut.measure.runtimes import RUNTIMES, TORCH, Runtime, Subject, chosen
from taut.measure.storage import refuse_lazy

SHORTEST = 1e-3
"""Seconds: a faster call is repeated until it takes this long, for the clock and the loop to weigh nothing."""


ENOUGH = 0.5
"""Seconds that the original runs while another model is timed beside it."""

ABOUT = 1.25
"""Runtimes are about as fast as each other up to this factor: what is made of a model may run well in one alone."""

FEWEST, MOST = 7, 301
"""Rounds at least and at most."""


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
        runtimes: medians by runtime (`taut.measure.runtimes`): "eager" and whatever else could run both.
        skipped: runtime -> why it could not be measured.
        identities: runtime -> version and settings.
    """

    runtimes: dict[str, Pair]
    skipped: dict[str, str] = field(default_factory=dict)
    identities: dict[str, str] = field(default_factory=dict)

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
    return {name: 1e3 * statistics.median(values) for name, values in _rounds(runs, rounds, warmup).items()}


def _rounds(runs: Mapping[str, Callable[[], object]], rounds: int, warmup: int) -> dict[str, list[float]]:
    """Seconds of each call in every round."""
    repeats = {name: _repeats(run, warmup) for name, run in runs.items()}
    order = list(runs)
    times: dict[str, list[float]] = {name: [] for name in order}
    with _no_collection():
        for turn in range(rounds):
            shift = turn % len(order)
            for name in order[shift:] + order[:shift]:
                times[name].append(_seconds(runs[name], repeats[name]))
    return times


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
def latencies(
    before: nn.Module, after: nn.Module, example: Example, rounds: int = 15, *, quick: bool = False
) -> Latency:
    """Interleaved latency of both models on the example, in eval mode, in every runtime that is installed.

    One runtime at a time (`taut.measure.runtimes`); within it both models take turns.

    Args:
        before: the original.
        after: its replacement.
        example: at its own batch size.
        rounds: how often each is timed.
        quick: torch alone: nothing is converted.

    Raises:
        ModelError: a model cannot be run on the example, or is not initialized.
    """
    for model in (before, after):
        refuse_lazy(model.named_parameters())
    pairs: dict[str, Pair] = {}
    skipped: dict[str, str] = {}
    with evaluating(before), evaluating(after), tempfile.TemporaryDirectory(prefix="taut-") as folder:
        for model in (before, after):
            example.run(model, map_tensors(Tensor.clone, example.value))  # some models write to their input
        subjects = [
            Subject(model, example, _converter(model, example, Path(folder) / f"{place}.onnx"))
            for place, model in enumerate((before, after))
        ]
        for runtime in chosen():
            if quick and runtime not in TORCH:
                continue
            reasons = [reason for subject in subjects if (reason := runtime.refuses(subject)) is not None]
            if reasons:
                skipped |= {runtime.name: reasons[0]} if reasons[0] else {}
                continue
            try:
                pairs[runtime.name] = _measured(runtime, subjects, rounds)
            except Exception as error:  # a runtime may fail in any way; the others are measured all the same
                if runtime.name == "eager":
                    raise
                skipped[runtime.name] = f"{type(error).__name__}: {one_line(error)}"
    return Latency(pairs, skipped, {name: RUNTIMES[name].identify() for name in pairs})


class Stopwatch:
    """A model ready to run in a runtime where it is fast; others are timed in turns with it.

    Args:
        original: the model.
        example: at its own batch size.
        trial: what may be made of it: of the runtimes in which the original is about as fast as in any, the one in
            which this is fastest is taken; None: the original decides alone.

    Raises:
        ModelError: it cannot be run on the example.
    """

    def __init__(self, original: nn.Module, example: Example, trial: nn.Module | None = None) -> None:
        """Time it in every runtime that is installed."""
        self.original, self.example = original, example
        found = latencies(original, trial or original, example).runtimes
        least = min(pair.before for pair in found.values())
        near = [name for name, pair in found.items() if pair.before <= ABOUT * least]
        self.runtime = RUNTIMES[min(near, key=lambda name: found[name].after)]
        self._run = self._built(original)

    @quietly
    def share(self, model: nn.Module) -> float:
        """Time of `model` as a share of the original's: the median over rounds of what each round gives.

        A load that comes and goes hits both sides of a round alike. The rounds fill half a second.

        Raises:
            ModelError: the runtime cannot run it.
        """
        try:
            run = self._built(model)
            with evaluating(self.original), evaluating(model), torch.no_grad():
                rounds = math.ceil(ENOUGH / max(_seconds(self._run, 3), SHORTEST))
                times = _rounds({"before": self._run, "after": run}, min(max(rounds, FEWEST), MOST), warmup=3)
        except CallError:
            raise
        except Exception as error:  # a runtime may fail in any way
            others = ",".join(name for name in RUNTIMES if name != self.runtime.name)
            remedy = "" if self.runtime.name == "eager" else f" Leave it out: TAUT_RUNTIMES={others}."
            raise ModelError(
                f"{self.runtime.name} runs the original and not what was made of it, so that no budget of 'latency' "
                f"can be checked there: {type(error).__name__}: {one_line(error)}{remedy}"
            ) from error
        return statistics.median(b / a for a, b in zip(times["before"], times["after"], strict=True))

    def _built(self, model: nn.Module) -> Callable[[], object]:
        with evaluating(model), tempfile.TemporaryDirectory(prefix="taut-") as folder, torch.no_grad():
            subject = Subject(model, self.example, _converter(model, self.example, Path(folder) / "model.onnx"))
            run, inputs = self.runtime.build(subject)
            return partial(run, inputs)


def _measured(runtime: Runtime, subjects: list[Subject], rounds: int) -> Pair:
    """Both models built, timed in turns, and let go."""
    with torch.no_grad():
        built = [runtime.build(subject) for subject in subjects]
        calls = {side: partial(run, inputs) for side, (run, inputs) in zip(("before", "after"), built, strict=True)}
        found = interleave(calls, rounds)
    return Pair(found["before"], found["after"])


def _converter(model: nn.Module, example: Example, path: Path) -> Callable[[], Path]:
    """Makes the ONNX file when it is first asked for; a failure is remembered."""

    @cache
    def convert() -> Exception | None:
        try:
            to_onnx(model, example, path)
        except Exception as error:
            return error
        return None

    def onnx() -> Path:
        failure = convert()
        if failure is not None:
            raise failure
        return path

    return onnx

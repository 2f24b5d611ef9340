"""Latency of two models measured side by side: in turns, in each runtime, as low quantiles with their intervals."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from taut.core.example import Example
from taut.core.files import one_line
from taut.core.modes import evaluating, quietly
from taut.core.progress import track
from taut.core.text import brief
from taut.errors import CallError, ModelError
from taut.measure.onnx import to_onnx
from taut.measure.rounds import BUSY, Effort, Estimate, Rounds, time_calls
from taut.measure.runtimes import RUNTIMES, TORCH, Built, Runtime, Subject, built_copies, chosen, repeatable
from taut.measure.storage import refuse_lazy

ABOUT = 1.25
"""Runtimes are about as fast as each other up to this factor: what is made of a model may run well in one alone."""

SHARE_EFFORT = Effort(least=1.0, most=1.0)
"""Of one share: a search takes some twenty of them."""


Timing = bool | Literal["torch"]
"""What a comparison times: every installed runtime, nothing, or torch alone."""

Structure = tuple[tuple[tuple[str, str], ...], tuple[tuple[str, tuple[int, ...]], ...]]
"""Kinds of modules and shapes of tensors by name: what models that take the same time have in common."""


@dataclass(frozen=True)
class Pair:
    """Latency in milliseconds of two models, timed in the same rounds: the lower quintile of each one's times.

    Attributes:
        before, after: milliseconds.
        low, high: 99 % interval of `ratio`; None where nothing was measured.
        apart: by what factor a model, prepared and timed twice in the same rounds, differs from itself, at least 1.
    """

    before: float
    after: float
    low: float | None = None
    high: float | None = None
    apart: float = 1.0

    @classmethod
    def of(cls, rounds: Rounds) -> Pair:
        """What rounds of the calls "before" and "after" give."""
        ratio = rounds.ratio("before", "after")
        before, after = (1e3 * rounds.time(call).value for call in ("before", "after"))
        return cls(before, after, ratio.low, ratio.high, ratio.apart)

    @property
    def ratio(self) -> float:
        """How many times faster the second one is; below 1 it is slower."""
        return self.before / self.after

    @property
    def busy(self) -> bool:
        """Whether the machine was too busy for any conclusion."""
        return self.apart > BUSY

    @property
    def verdict(self) -> Literal["faster", "slower"] | None:
        """What the second one is, where the interval excludes that both are the same."""
        if self.low is None or self.high is None or self.busy or self.low <= 1 <= self.high:
            return None
        return "faster" if self.low > 1 else "slower"


@dataclass(frozen=True)
class Latency:
    """Latency of a model and of its replacement on the example.

    Attributes:
        runtimes: times by runtime (`taut.measure.runtimes`): "eager" and whatever else could run both.
        skipped: runtime -> why it could not be measured.
        identities: runtime -> version and settings.
    """

    runtimes: dict[str, Pair]
    skipped: dict[str, str] = field(default_factory=dict)
    identities: dict[str, str] = field(default_factory=dict)

    @property
    def best(self) -> Pair:
        """Each model in its own fastest runtime.

        Where these are two, the models were never timed in the same rounds. Then the interval goes from the ratio in
        the runtime of the first model, where the second is no faster than at its best, to that in the other one.
        """
        before = min(self.runtimes.values(), key=lambda pair: pair.before)
        after = min(self.runtimes.values(), key=lambda pair: pair.after)
        apart = max(before.apart, after.apart)
        return before if before is after else Pair(before.before, after.after, before.low, after.high, apart)


@dataclass(frozen=True)
class Times:
    """Latency of one model on the example.

    Attributes:
        runtimes: milliseconds by runtime. skipped: runtime -> why it could not be measured.
    """

    runtimes: dict[str, Estimate]
    skipped: dict[str, str]


@dataclass(frozen=True)
class Searched:
    """What a budget of latency came to in the runtime where it was searched.

    Attributes:
        runtime: its name. pair: both models there, as the search timed them.
        limit: the share of the original's time that was allowed.
    """

    runtime: str
    pair: Pair
    limit: float

    @property
    def share(self) -> Estimate:
        """Of the original's time."""
        share, pair = self.pair.after / self.pair.before, self.pair
        low, high = (share if bound is None else 1 / bound for bound in (pair.high, pair.low))
        return Estimate(share, low, high, pair.apart)


def check_timing(timing: object) -> None:
    """Refuse what does not say what is timed.

    Raises:
        CallError: it is neither True, False nor "torch".
    """
    if not isinstance(timing, bool) and timing != "torch":
        raise CallError(
            f"The 'compare' must be True (time every installed runtime), \"torch\" or False (time nothing). Got "
            f"{brief(timing)} instead."
        )


def busy_note(apart: Mapping[str, float]) -> tuple[str, ...]:
    """A sentence about the runtimes in which the same model, timed twice in the same rounds, differs from itself."""
    busy = [f"{100 * (factor - 1):.0f} % in {name}" for name, factor in apart.items() if factor > BUSY]
    if not busy:
        return ()
    return (
        f"The machine is busy: timed twice in the same rounds, and measured again, the same model differed from itself "
        f"by {', '.join(busy)}. Nothing follows from these times.",
    )


@quietly
def latencies(
    before: nn.Module,
    after: nn.Module,
    example: Example,
    rounds: int | None = None,
    *,
    quick: bool = False,
    measured: Mapping[str, Pair] | None = None,
) -> Latency:
    """Latency of both models on the example, in eval mode, in every runtime that is installed.

    One runtime at a time (`taut.measure.runtimes`); within it both models take turns (`taut.measure.rounds`).

    Args:
        before: the original.
        after: its replacement.
        example: at its own batch size.
        rounds: rounds in which each is timed; None: 60, more if they are fast, fewer if they are slow.
        quick: torch alone: nothing is converted.
        measured: what is known of a runtime: it is taken as it is.

    Raises:
        ModelError: a model cannot be run on the example, or is not initialized.
        CallError: fewer than 1 round.
    """
    pairs = dict(measured or {})
    runtimes = [runtime for runtime in _runtimes(quick) if runtime.name not in pairs]
    timed, skipped = _in_each(runtimes, {"before": before, "after": after}, example, Effort(rounds))
    pairs |= {name: Pair.of(each) for name, each in timed.items()}
    ordered = {name: pairs[name] for name in RUNTIMES if name in pairs}
    return Latency(ordered, skipped, {name: RUNTIMES[name].identify() for name in ordered})


@quietly
def model_times(model: nn.Module, example: Example, rounds: int | None = None, *, quick: bool = False) -> Times:
    """Latency of one model on the example, as `latencies` measures two.

    Args:
        model: in eval mode meanwhile.
        example: at its own batch size.
        rounds: in which it is timed.
        quick: torch alone.

    Raises:
        ModelError: the model cannot be run on the example, or is not initialized.
        CallError: fewer than 1 round.
    """
    timed, skipped = _in_each(_runtimes(quick), {"model": model}, example, Effort(rounds))
    return Times({name: _milliseconds(rounds.time("model")) for name, rounds in timed.items()}, skipped)


def _milliseconds(seconds: Estimate) -> Estimate:
    return Estimate(1e3 * seconds.value, 1e3 * seconds.low, 1e3 * seconds.high, seconds.apart)


def _runtimes(quick: bool) -> list[Runtime]:
    return [runtime for runtime in chosen() if not quick or runtime in TORCH]


def _in_each(
    runtimes: Sequence[Runtime], models: Mapping[str, nn.Module], example: Example, effort: Effort
) -> tuple[dict[str, Rounds], dict[str, str]]:
    """Rounds of the models by runtime, and why a runtime has none."""
    for model in models.values():
        refuse_lazy(model.named_parameters())
    timed: dict[str, Rounds] = {}
    skipped: dict[str, str] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="taut-")))
        for model in models.values():
            stack.enter_context(evaluating(model))
        subjects = {}
        for name, model in models.items():
            example.run(model)  # an error of its own is raised before a runtime has one
            subjects[name] = Subject(model, example, _converter(model, example, folder / f"{name}.onnx"))
        for runtime in track(runtimes, "timing"):
            reasons = [reason for each in subjects.values() if (reason := runtime.refuses(each)) is not None]
            if reasons:
                skipped |= {runtime.name: reasons[0]} if reasons[0] else {}
                continue
            try:
                timed[runtime.name] = _rounds_in(runtime, subjects, effort)
            except Exception as error:  # a runtime may fail in any way; the others are measured all the same
                if runtime.name == "eager":
                    raise
                skipped[runtime.name] = f"{type(error).__name__}: {one_line(error)}"
    return timed, skipped


def _rounds_in(runtime: Runtime, subjects: Mapping[str, Subject], effort: Effort) -> Rounds:
    """All models built, timed in turns, and let go."""
    with torch.no_grad():
        built = {name: built_copies(partial(runtime.build, subject)) for name, subject in subjects.items()}
        return time_calls(repeatable(built), effort)


class LatencyMeter:
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
        pairs = latencies(original, trial or original, example).runtimes
        least = min(pair.before for pair in pairs.values())
        near = [name for name, pair in pairs.items() if pair.before <= ABOUT * least]
        self.runtime = RUNTIMES[min(near, key=lambda name: pairs[name].after)]
        self._original = self._built(original)
        self._latest: dict[Structure, Pair] = {}

    def relative_time(self, model: nn.Module) -> float:
        """Time of `model` as a share of the original's.

        Raises:
            ModelError: the runtime cannot run it.
        """
        pair = self.timed(model)
        return pair.after / pair.before

    def share(self, model: nn.Module) -> float:
        """The same by its old name."""
        warnings.warn("LatencyMeter.share is now relative_time.", DeprecationWarning, stacklevel=2)
        return self.relative_time(model)

    @quietly
    def timed(self, model: nn.Module) -> Pair:
        """The original's time and that of `model`, in about a second of rounds, with the interval of the ratio.

        Raises:
            ModelError: the runtime cannot run it.
        """
        try:
            with evaluating(self.original), evaluating(model), torch.no_grad():
                calls = repeatable({"before": self._original, "after": self._built(model)})
                pair = Pair.of(time_calls(calls, SHARE_EFFORT))
        except CallError:
            raise
        except Exception as error:  # a runtime may fail in any way
            others = ",".join(name for name in RUNTIMES if name != self.runtime.name)
            remedy = "" if self.runtime.name == "eager" else f" Leave it out: TAUT_RUNTIMES={others}."
            raise ModelError(
                f"{self.runtime.name} runs the original and not what was made of it, so that no budget of 'latency' "
                f"can be checked there: {type(error).__name__}: {one_line(error)}{remedy}"
            ) from error
        self._latest[_structure(model)] = pair
        return pair

    def searched(self, model: nn.Module, limit: float) -> Searched:
        """What a search came to: as it was timed last, and only timed now if nothing of its structure ever was.

        Args:
            model: what was chosen, trained or not.
            limit: the share of the original's time that was allowed.

        Raises:
            ModelError: the runtime cannot run it.
        """
        return Searched(self.runtime.name, self._latest.get(_structure(model)) or self.timed(model), limit)

    def _built(self, model: nn.Module) -> list[Built]:
        with evaluating(model), tempfile.TemporaryDirectory(prefix="taut-") as folder, torch.no_grad():
            subject = Subject(model, self.example, _converter(model, self.example, Path(folder) / "model.onnx"))
            return built_copies(partial(self.runtime.build, subject))


def _structure(model: nn.Module) -> Structure:
    modules = [(name, type(module).__name__) for name, module in model.named_modules()]
    named = (*model.named_parameters(), *model.named_buffers())
    return tuple(modules), tuple((name, tuple(tensor.shape)) for name, tensor in named)


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

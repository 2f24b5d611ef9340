"""`taut.compare`: a model and its replacement side by side, every number measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from taut import text
from taut.calls import Example
from taut.measure import (
    Difference,
    Latency,
    Score,
    count_macs,
    difference,
    file_bytes,
    latencies,
    measure,
    stored_tensors,
)
from taut.measure.counting import Count, count_parameters
from taut.structure.calling import read_example
from taut.structure.surgery import shallow
from taut.types import Cost

NOISE = 1.03
"""A measured ratio below this is no improvement that one could feel or trust."""

Evaluate = Callable[[nn.Module], object]


@dataclass(frozen=True)
class Comparison:
    """Costs, latency and metric of the original model and of the compressed one.

    Attributes:
        before, after: costs; `bytes` is the size of model.safetensors. `macs` is 0 where no example was given.
        batch: samples in the example that was timed; None without an example.
        latency: medians by runtime, measured interleaved; None without an example.
        score_before, score_after: the user's metric; None without `evaluate`.
        uncounted: what torch's counter did not see and taut counted itself.
    """

    before: Cost
    after: Cost
    batch: int | None = None
    latency: Latency | None = None
    score_before: Score | None = None
    score_after: Score | None = None
    uncounted: tuple[str, ...] = ()

    @property
    def difference(self) -> Difference | None:
        """Compressed minus original metric; None without `evaluate`."""
        if self.score_before is None or self.score_after is None:
            return None
        return difference(self.score_before, self.score_after)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the numbers do not say by themselves, in sentences."""
        notes = [*_slow(self), *_zeros(self), *self.uncounted]
        if self.latency is None:
            notes.append("Without an example input neither MACs nor latency were measured.")
        else:
            notes += [f"{name} was not measured: {reason}" for name, reason in self.latency.skipped.items()]
        if self.score_after is None:
            notes.append("Only costs were measured: without `evaluate` nothing is known about the accuracy.")
        return tuple(notes)

    def __str__(self) -> str:
        """A row for every measured number, and the notes below."""
        rows = [*_cost_rows(self), *_latency_rows(self), *_score_rows(self)]
        grid = text.table(("measured", "original", "compressed", "change"), rows, right=(1, 2))
        return "\n".join((grid, *self.notes))

    def to_dict(self) -> dict[str, Any]:
        """All numbers, flat and ready for JSON.

        Ratios are original / compressed, so larger is better; milliseconds are medians; `accuracy_*` is the user's
        metric whatever its name, which is under "metric". What was not measured is None.
        """
        return {**_cost_items(self), **_latency_items(self), **_score_items(self), "notes": list(self.notes)}

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"


def compare(
    model: nn.Module,
    small: nn.Module,
    evaluate: Evaluate | None = None,
    example: Any = None,
    *,
    rounds: int = 15,
    quick: bool = False,
) -> Comparison:
    """Measure both models: parameters, nonzero, MACs, file bytes, latency, and the user's metric.

    Both models run in eval mode and are left as they were. `evaluate` runs in the caller's grad mode, everything else
    without autograd.

    Args:
        model: the original.
        small: its replacement, called the same way.
        evaluate: model -> number (higher is better), dict whose first key decides, `taut.Metric` or per-sample scores.
        example: an input (or `taut.calls.Example`) to count MACs and time on, at its own batch size.
        rounds: how often each model is timed, in turns.
        quick: time torch alone; else every installed runtime (`taut.measure.runtimes`).

    Raises:
        ModelError: a model cannot be run on the example or stored as tensors.
        DataError: `evaluate` raised or returned something that is no metric, or the example holds no tensor.
        CallError: fewer than 1 round.
    """
    call = None if example is None else read_example(model, example)
    copies = [shallow(each) for each in (model, small)]
    before, after = (_cost(each, call) for each in copies)
    scores = [None if evaluate is None else measure(evaluate, each) for each in (model, small)]
    return Comparison(
        before=before[0],
        after=after[0],
        batch=None if call is None else call.batch,
        latency=None if call is None else latencies(copies[0], copies[1], call, rounds, quick=quick),
        score_before=scores[0],
        score_after=scores[1],
        uncounted=tuple(dict.fromkeys(before[1] + after[1])),
    )


def _cost(model: nn.Module, example: Example | None) -> tuple[Cost, tuple[str, ...]]:
    counted = Count(0, {}) if example is None else count_macs(model, example)
    return Cost(*count_parameters(model), counted.total, file_bytes(stored_tensors(model)[0])), counted.notes


def _ratio(before: float, after: float) -> float | None:
    return before / after if after else None


def _costs(of: Comparison) -> dict[str, tuple[int, int]]:
    """Each cost that was measured, of both models."""
    keys = ["params", "nonzero", *(["macs"] if of.batch is not None else []), "bytes"]
    return {key: (getattr(of.before, key), getattr(of.after, key)) for key in keys}


def _slow(of: Comparison) -> list[str]:
    """A smaller count that is not a shorter time is said aloud."""
    if of.latency is None or of.after.macs >= of.before.macs or of.latency.best.ratio >= NOISE:
        return []
    fewer, best = text.fold(of.before.macs, of.after.macs), of.latency.best
    fact = "did not improve" if best.ratio > 1 / NOISE else "got worse"
    return [
        f"MACs fell {fewer}, but the measured latency {fact} ({best.before:.3g} -> {best.after:.3g} ms, each model in "
        f"its fastest runtime, batch {of.batch}): on this machine the model is smaller, not faster."
    ]


def _zeros(of: Comparison) -> list[str]:
    before, after = of.before, of.after
    if not after.nonzero * before.params < 0.9 * before.nonzero * after.params:
        return []
    zeros = text.count(after.params - after.nonzero)
    return [f"{zeros} stored parameters are zero: dense layers and model.safetensors gain nothing from that."]


NAMES = {"params": "parameters", "nonzero": "nonzero parameters", "macs": "MACs per sample", "bytes": "file bytes"}


def _cost_rows(of: Comparison) -> list[tuple[str, ...]]:
    return [
        (NAMES[key], text.count(old), text.count(new), _times(old, new, "smaller", "larger"))
        for key, (old, new) in _costs(of).items()
    ]


def _latency_rows(of: Comparison) -> list[tuple[str, ...]]:
    if of.latency is None:
        return []
    pairs = {f"ms, {name}, batch {of.batch}": pair for name, pair in of.latency.runtimes.items()}
    pairs["ms, best against best"] = of.latency.best
    return [
        (name, f"{pair.before:.3g}", f"{pair.after:.3g}", _times(pair.before, pair.after, "faster", "slower"))
        for name, pair in pairs.items()
    ]


def _score_rows(of: Comparison) -> list[tuple[str, ...]]:
    before, after, change = of.score_before, of.score_after, of.difference
    if before is None or after is None or change is None:
        return []
    row = (after.name, _value(before), _value(after), f"{change.value:+.4f}{_interval(change)}")
    others = [
        (name, f"{before.others[name]:.4f}", f"{value:.4f}", f"{value - before.others[name]:+.4f}")
        for name, value in after.others.items()
        if name in before.others
    ]
    return [row, *others]


def _value(score: Score) -> str:
    return f"{score.value:.4f}{_interval(score)}"


def _interval(of: Score | Difference) -> str:
    return "" if of.low is None or of.high is None else f" [{of.low:.4f}, {of.high:.4f}]"


def _times(before: float, after: float, better: str, worse: str) -> str:
    if before == after or not before or not after:
        return "same" if before == after else "-"
    return f"{text.fold(before, after)} {better}" if before > after else f"{text.fold(after, before)} {worse}"


def _cost_items(of: Comparison) -> dict[str, Any]:
    items: dict[str, Any] = {}
    for key in NAMES:
        before, after = _costs(of).get(key, (None, None))
        ratio = None if before is None or after is None else _ratio(before, after)
        items |= {f"{key}_before": before, f"{key}_after": after, f"{key}_ratio": ratio}
    return items


def _latency_items(of: Comparison) -> dict[str, Any]:
    if of.latency is None:
        return {"batch": None, "speedup_best": None, "best_ms_before": None, "best_ms_after": None}
    items: dict[str, Any] = {"batch": of.batch}
    for name, pair in {**of.latency.runtimes, "best": of.latency.best}.items():
        items |= {f"speedup_{name}": pair.ratio, f"{name}_ms_before": pair.before, f"{name}_ms_after": pair.after}
    return items | {f"runtime_{name}": identity for name, identity in of.latency.identities.items()}


def _score_items(of: Comparison) -> dict[str, Any]:
    change, after = of.difference, of.score_after
    items: dict[str, Any] = {"metric": None if after is None else after.name}
    for side, score in (("before", of.score_before), ("after", after)):
        for key, part in (("", "value"), ("low_", "low"), ("high_", "high"), ("n_", "n")):
            items[f"accuracy_{key}{side}"] = getattr(score, part, None)
        items |= {f"other_{name}_{side}": value for name, value in (score.others if score else {}).items()}
    for key, part in (("change", "value"), ("change_low", "low"), ("change_high", "high")):
        items[f"accuracy_{key}"] = getattr(change, part, None)
    return items

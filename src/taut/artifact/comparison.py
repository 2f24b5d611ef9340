"""`taut.compare`: a model and its replacement side by side, every number measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from taut.core import text
from taut.core.example import Example
from taut.core.showing import shown
from taut.measure import (
    Difference,
    Latency,
    Pair,
    Score,
    Searched,
    busy_note,
    count_macs,
    difference,
    file_bytes,
    latencies,
    measure,
    stored_tensors,
)
from taut.measure.classes import ClassChange
from taut.measure.counting import Count, count_parameters
from taut.measure.timing import Timing
from taut.structure.calling import read_example
from taut.structure.surgery import shallow
from taut.types import Cost

UNJUDGED = "Only costs were measured: without `evaluate` nothing is known about the accuracy."

Evaluate = Callable[[nn.Module], object]


@dataclass(frozen=True)
class Comparison:
    """Costs, latency and metric of the original model and of the compressed one.

    Attributes:
        before, after: costs; `bytes` is the size of model.safetensors. `macs` is 0 where no example was given.
        batch: samples in the example that was timed; None without an example.
        latency: times by runtime, both models timed in the same rounds; None without an example, or not asked for.
        score_before, score_after: the user's metric; None without `evaluate`.
        uncounted: what torch's counter did not see and taut counted itself.
        searched: what a budget of latency came to; None without such a budget.
        score_control: the metric of the original after the same training as the compressed model; None without one.
        classes: the class that lost most on the calibration data; None where these have no labels.
        remarks: what else the numbers do not say, in sentences.
    """

    before: Cost
    after: Cost
    batch: int | None = None
    latency: Latency | None = None
    score_before: Score | None = None
    score_after: Score | None = None
    uncounted: tuple[str, ...] = ()
    searched: Searched | None = None
    score_control: Score | None = None
    classes: ClassChange | None = None
    remarks: tuple[str, ...] = ()

    @property
    def difference(self) -> Difference | None:
        """Compressed minus original metric; None without `evaluate`."""
        if self.score_before is None or self.score_after is None:
            return None
        return difference(self.score_before, self.score_after)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the numbers do not say by themselves, in sentences."""
        notes = [*_busy(self), *_slow(self), *_elsewhere(self), *_zeros(self), *self.uncounted]
        if self.batch is None:
            notes.append("Without an example input neither MACs nor latency were measured.")
        elif self.latency is None:
            notes.append("Nothing was timed, as asked: `taut.compare` and `taut benchmark` do.")
        else:
            notes += [f"{name} was not measured: {reason}" for name, reason in self.latency.skipped.items()]
        if self.score_after is None:
            notes.append(UNJUDGED)
        if self.classes is not None:
            notes.append(
                f"The class that lost most of {self.classes.classes}: on calibration samples, which the refit saw; as "
                "the worst of several, part of its change is chance."
            )
        return (*notes, *self.remarks)

    def __str__(self) -> str:
        """A row for every measured number, and the notes below."""
        rows = [*_cost_rows(self), *_latency_rows(self), *_score_rows(self), *_control_rows(self), *_class_rows(self)]
        grid = text.table(("measured", "original", "compressed", "change"), rows, right=(1, 2))
        return "\n".join((grid, *self.notes))

    def to_dict(self) -> dict[str, Any]:
        """All numbers, flat and ready for JSON.

        Ratios are original / compressed, so larger is better; milliseconds are lower quintiles, `*_speedup_low` and
        `*_speedup_high` the 99 % interval of their ratio, `*_apart` by what factor the same model differed from itself.
        `latency_*` is what a budget of latency came to. `accuracy_*` is the user's metric whatever its name, which is
        under "metric". What was not measured is None.
        """
        items = {**_cost_items(self), **_latency_items(self), **_score_items(self), **_control_items(self)}
        return {**items, "notes": list(self.notes)}

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"


@shown
def compare(  # noqa: PLR0913 - the call is documented with these
    model: nn.Module,
    small: nn.Module,
    evaluate: Evaluate | None = None,
    example: Any = None,
    *,
    rounds: int | None = None,
    quick: bool = False,
    searched: Searched | None = None,
) -> Comparison:
    """Measure both models: parameters, nonzero, MACs, file bytes, latency, and the user's metric.

    Both models run in eval mode and are left as they were. `evaluate` runs in the caller's grad mode, everything else
    without autograd.

    Args:
        model: the original.
        small: its replacement, called the same way.
        evaluate: model -> number (higher is better), dict whose first key decides, `taut.Metric` or per-sample scores.
        example: an input (or `taut.core.example.Example`) to count MACs and time on, at its own batch size.
        rounds: in which both models are timed; None: 60, more if they are fast, fewer if they are slow.
        quick: time torch alone; else every installed runtime (`taut.measure.runtimes`).
        searched: what a budget of latency came to: its runtime is not timed again.

    Raises:
        ModelError: a model cannot be run on the example or stored as tensors.
        DataError: `evaluate` raised or returned something that is no metric, or the example holds no tensor.
        CallError: fewer than 1 round.
    """
    timing: Timing = "torch" if quick else True
    return compared_models(model, small, evaluate, example, rounds=rounds, timing=timing, searched=searched)


def compared_models(  # noqa: PLR0913 - as `compare`
    model: nn.Module,
    small: nn.Module,
    evaluate: Evaluate | None = None,
    example: Any = None,
    *,
    rounds: int | None = None,
    timing: Timing = True,
    searched: Searched | None = None,
) -> Comparison:
    """`compare`, with what is timed: True: every installed runtime, "torch": that alone, False: nothing."""
    call = None if example is None else read_example(model, example)
    copies = [shallow(each) for each in (model, small)]
    before, after = (_cost(each, call) for each in copies)
    scores = [None if evaluate is None else measure(evaluate, each) for each in (model, small)]
    measured = {} if searched is None else {searched.runtime: searched.pair}
    latency = None
    if call is not None and timing is not False:
        latency = latencies(copies[0], copies[1], call, rounds, quick=timing == "torch", measured=measured)
    elif call is not None and searched is not None:
        latency = Latency(measured)
    return Comparison(
        before=before[0],
        after=after[0],
        batch=None if call is None else call.batch,
        latency=latency,
        score_before=scores[0],
        score_after=scores[1],
        uncounted=tuple(dict.fromkeys(before[1] + after[1])),
        searched=searched,
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


def _busy(of: Comparison) -> tuple[str, ...]:
    return () if of.latency is None else busy_note({name: pair.apart for name, pair in of.latency.runtimes.items()})


def _slow(of: Comparison) -> list[str]:
    """A smaller count that is not a shorter time is said aloud, as far as the interval goes."""
    if of.latency is None or of.searched is not None or of.after.macs >= of.before.macs:
        return []
    fewer, best = text.fold(of.before.macs, of.after.macs), of.latency.best
    if best.busy or best.verdict == "faster" or best.high is None:
        return []
    times = f"({best.before:.3g} -> {best.after:.3g} ms, each model in its fastest runtime, batch {of.batch})"
    if best.verdict == "slower":
        return [
            f"MACs fell {fewer}, but the latency got worse {times}: on this machine the model is smaller, not faster."
        ]
    return [f"MACs fell {fewer}, but the latency by {100 * (1 - 1 / best.high):.2g} % at most, if at all {times}."]


def _elsewhere(of: Comparison) -> list[str]:
    if of.searched is None or of.latency is None or len(of.latency.runtimes) < 2:
        return []
    return [f"The budget of latency was searched for in {of.searched.runtime} alone; other runtimes came as they are."]


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
    head, times = [], of.latency.runtimes
    if of.searched is not None:
        head, times = [_searched_row(of.searched)], {of.searched.runtime: of.searched.pair, **times}
    pairs = {f"ms, {name}, batch {of.batch}": pair for name, pair in times.items()}
    pairs["ms, best against best"] = of.latency.best
    return [*head, *((name, f"{pair.before:.3g}", f"{pair.after:.3g}", _speed(pair)) for name, pair in pairs.items())]


def _searched_row(searched: Searched) -> tuple[str, ...]:
    share = searched.share
    interval = f"{share.value:.3g} [{share.low:.3g}, {share.high:.3g}]"
    return (f"share of the time, {searched.runtime}", "1", interval, f"at most {searched.limit:g} was asked for")


def _speed(pair: Pair) -> str:
    """The ratio with its interval, and a word only where the interval excludes that both are the same."""
    low, high = pair.low, pair.high
    verdict = None if text.fold(pair.before, pair.after) == "1x" else pair.verdict
    if low is None or high is None:
        return text.fold(pair.before, pair.after)
    if verdict == "slower":
        return f"{text.fold(pair.after, pair.before)} slower [{1 / high:.3g}, {1 / low:.3g}]"
    return f"{text.fold(pair.before, pair.after)}{f' {verdict}' if verdict else ''} [{low:.3g}, {high:.3g}]"


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


def _control_rows(of: Comparison) -> list[tuple[str, ...]]:
    """The original after the same training, in the place of the original."""
    control, after = of.score_control, of.score_after
    if control is None or after is None:
        return []
    change = difference(control, after)
    row = (f"{after.name}, dense trained equally", _value(control), _value(after))
    return [(*row, f"{change.value:+.4f}{_interval(change)}")]


def _class_rows(of: Comparison) -> list[tuple[str, ...]]:
    worst = of.classes
    if worst is None:
        return []
    name = f"right in class {worst.label}, n = {worst.n}"
    change = f"{worst.after - worst.before:+.4f} [{worst.low:.4f}, {worst.high:.4f}]"
    return [(name, f"{worst.before:.4f}", f"{worst.after:.4f}", change)]


def _value(score: Score) -> str:
    return f"{score.value:.4f}{_interval(score)}"


def _interval(of: Score | Difference) -> str:
    return "" if of.low is None or of.high is None else f" [{of.low:.4f}, {of.high:.4f}]"


def _times(before: float, after: float, better: str, worse: str) -> str:
    if before == after or not before or not after:
        return "same" if before == after else "-"
    word, more, less = (better, before, after) if before > after else (worse, after, before)
    times = text.fold(more, less)
    return f"{100 * (more / less - 1):.1g} % {word}" if times == "1x" else f"{times} {word}"


def _cost_items(of: Comparison) -> dict[str, Any]:
    items: dict[str, Any] = {}
    for key in NAMES:
        before, after = _costs(of).get(key, (None, None))
        ratio = None if before is None or after is None else _ratio(before, after)
        items |= {f"{key}_before": before, f"{key}_after": after, f"{key}_ratio": ratio}
    return items


def _latency_items(of: Comparison) -> dict[str, Any]:
    items: dict[str, Any] = {"batch": of.batch, **_searched_items(of.searched)}
    if of.latency is None:
        return items | {"speedup_best": None, "best_ms_before": None, "best_ms_after": None}
    for name, pair in {**of.latency.runtimes, "best": of.latency.best}.items():
        items |= {f"speedup_{name}": pair.ratio, f"{name}_ms_before": pair.before, f"{name}_ms_after": pair.after}
        items |= {f"{name}_speedup_low": pair.low, f"{name}_speedup_high": pair.high, f"{name}_apart": pair.apart}
    return items | {f"runtime_{name}": identity for name, identity in of.latency.identities.items()}


def _searched_items(searched: Searched | None) -> dict[str, Any]:
    keys = ("latency_runtime", "latency_limit", "latency_share", "latency_share_low", "latency_share_high")
    if searched is None:
        return dict.fromkeys(keys)
    share = searched.share
    return dict(zip(keys, (searched.runtime, searched.limit, share.value, share.low, share.high), strict=True))


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


def _control_items(of: Comparison) -> dict[str, Any]:
    """Of the original after the same training, and of the class that lost most."""
    control, after, worst = of.score_control, of.score_after, of.classes
    change = None if control is None or after is None else difference(control, after)
    parts = (("", "value"), ("low_", "low"), ("high_", "high"), ("n_", "n"))
    items: dict[str, Any] = {f"accuracy_{key}control": getattr(control, part, None) for key, part in parts}
    for key, part in (("change", "value"), ("change_low", "low"), ("change_high", "high")):
        items[f"accuracy_{key}_to_control"] = getattr(change, part, None)
    for part in ("label", "n", "before", "after"):
        items[f"worst_class_{part}"] = getattr(worst, part, None)
    return items

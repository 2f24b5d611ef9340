"""The rows of a study, and their means over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

MEASURED = ("params", "nonzero", "macs", "bytes", "zipped", "ms", "speedup")
"""The columns of numbers, beside the metrics."""


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        method: as it was asked for, or "original" or "control" (trained like the others, not compressed).
        size: asked for; None where no size steers the method.
        seed: of everything random.
        metric: what `evaluate` said; the first one decides.
        params, nonzero, macs: counted. bytes: of model.safetensors. zipped: of that file after zlib at level 6.
        ms: median latency on the example, eager. speedup: how many times faster than the original, timed in turns.
        seconds: that the run took. model: its folder among the models.
        reason: why there is no model; then nothing is measured.
    """

    method: str
    size: float | None
    seed: int
    metric: Mapping[str, float] = field(default_factory=dict)
    params: int | None = None
    nonzero: int | None = None
    macs: int | None = None
    bytes: int | None = None
    zipped: int | None = None
    ms: float | None = None
    speedup: float | None = None
    seconds: float | None = None
    model: str = ""
    reason: str = ""

    def flat(self, metrics: Sequence[str]) -> dict[str, Any]:
        """Column by column, the metrics under "metric_" and their names."""
        flat: dict[str, Any] = {}
        for column in fields(self):
            if column.name == "metric":
                flat |= {f"metric_{name}": self.metric.get(name) for name in metrics}
            else:
                flat[column.name] = getattr(self, column.name)
        return flat


@dataclass(frozen=True)
class Mean:
    """The rows of one method and size, over the seeds.

    Attributes:
        method, size: of all these rows. rows: those that made a model. failed: the others.
    """

    method: str
    size: float | None
    rows: tuple[Row, ...]
    failed: tuple[Row, ...]

    def value(self, column: str) -> float | None:
        """The mean of a column of numbers; None where nothing was measured."""
        values = [value for row in self.rows if (value := getattr(row, column)) is not None]
        return statistics.fmean(values) if values else None

    def metric(self, name: str) -> tuple[float, float] | None:
        """Mean and standard deviation (n - 1) of a metric; the latter is 0 for a single seed."""
        values = [row.metric[name] for row in self.rows if name in row.metric]
        if not values:
            return None
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def means(rows: Sequence[Row]) -> list[Mean]:
    """One for every method and size, in the order of the rows."""
    groups: dict[tuple[str, float | None], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.method, row.size), []).append(row)
    return [
        Mean(method, size, tuple(row for row in held if not row.reason), tuple(row for row in held if row.reason))
        for (method, size), held in groups.items()
    ]


def metric_names(rows: Sequence[Row]) -> list[str]:
    """Every metric that a row has, the deciding one first."""
    return list(dict.fromkeys(name for row in rows for name in row.metric))

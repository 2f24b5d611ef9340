"""What a model can become: measured points from the original to the smallest."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from taut.core.files import write_figure
from taut.core.text import count, fold, table
from taut.errors import CallError
from taut.measure import busy_note
from taut.types import Cost, Plan


@dataclass(frozen=True)
class Point:
    """One measured plan.

    Attributes:
        ratio: asked of the compressible part.
        plan: replay it with `taut.apply`.
        before, after: counted costs.
        ms_before: of the original, alone, in its fastest runtime: the same in every point; None: nothing was timed.
        ms_after: as much less as the model is faster than the original in the same rounds.
        metric, value, low, high: the user's metric with its 95 % interval where it is known.
        speedup_low, speedup_high: 99 % interval of ms_before / ms_after; None for the original, which is 1x.
        apart: by what factor the same model, timed twice in these rounds, differed from itself.
    """

    ratio: float
    plan: Plan
    before: Cost
    after: Cost
    ms_before: float | None
    ms_after: float | None
    metric: str | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    apart: float = 1.0


@dataclass(frozen=True)
class Front:
    """What a model can become: measured points from the original to the smallest.

    Attributes:
        points: by falling size; the first is the original.
    """

    points: tuple[Point, ...]

    def __str__(self) -> str:
        """A row for every point, and a note where the machine was too busy to time them."""
        name = self.points[0].metric if self.points else None
        headers = ("smaller", "params", "MACs", "file bytes", "ms", "speedup", name or "metric (no evaluate)")
        grid = table(headers, [_row(point) for point in self.points], right=(0, 1, 2, 3, 4, 5))
        return "\n".join((grid, *busy_note({f"the row of {point.ratio:g}x": point.apart for point in self.points})))

    def best(self, drop: float) -> Point:
        """The smallest point whose metric is at most `drop` below the original's.

        Raises:
            CallError: the front was explored without `evaluate`.
        """
        first = self.points[0].value
        if first is None:
            raise CallError("This front holds no metric: explore with evaluate=.")
        return [p for p in self.points if p.value is not None and p.value >= first - drop][-1]

    def to_json(self) -> str:
        """All points with their plans."""
        return json.dumps([TypeAdapter(Point).dump_python(p, mode="json") for p in self.points], indent=1) + "\n"

    def plot(self, path: str | Path) -> None:
        """Metric over MACs and over milliseconds, as an image file (needs matplotlib, the extra `report`).

        Raises:
            CallError: matplotlib is missing, or does not draw files of this suffix.
            ArtifactError: the file cannot be written; what was there is intact.
        """
        check_plot(path)
        from matplotlib.figure import Figure  # noqa: PLC0415 - an optional extra

        figure = Figure(figsize=(9, 3.6), layout="constrained")
        axes = self._axes()
        for axis, (label, xs) in zip(figure.subplots(1, len(axes), squeeze=False)[0], axes, strict=True):
            axis.plot(xs, [p.value if p.value is not None else 0.0 for p in self.points], "o-")
            axis.set(xlabel=label, ylabel=self.points[0].metric or "no metric", xscale="log")
            axis.grid(alpha=0.3)
        write_figure(figure, path)

    def _axes(self) -> list[tuple[str, list[float]]]:
        times = [p.ms_after for p in self.points if p.ms_after is not None]
        axes = [("MACs per sample", [float(p.after.macs) for p in self.points])]
        return [*axes, ("milliseconds, fastest eager layout", times)] if len(times) == len(self.points) else axes


def check_plot(path: str | Path) -> None:
    """Find out before long work whether `Front.plot` can draw such a file.

    Raises:
        CallError: matplotlib is missing, or does not draw files of this suffix.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an optional extra
    except ImportError:
        raise CallError("Plots need matplotlib: pip install 'taut[report]'.") from None
    suffix = Path(path).suffix
    if suffix.lstrip(".").lower() not in Figure().canvas.get_supported_filetypes():
        raise CallError(f"The plot '{path}' must end in .svg, .png or .pdf. Got '{suffix}' instead.")


def _row(point: Point) -> tuple[str, ...]:
    after = point.after
    interval = "" if point.low is None or point.high is None else f" [{point.low:.4f}, {point.high:.4f}]"
    value = "" if point.value is None else f"{point.value:.4f}{interval}"
    return (
        f"{point.ratio:g}x",
        f"{count(after.params)} ({fold(point.before.params, after.params)})",
        f"{count(after.macs)} ({fold(point.before.macs, after.macs)})",
        f"{count(after.bytes)} ({fold(point.before.bytes, after.bytes)})",
        "-" if point.ms_after is None else f"{point.ms_after:.3g}",
        _speedup(point),
        value,
    )


def _speedup(point: Point) -> str:
    if point.ms_before is None or point.ms_after is None:
        return "-"
    ratio, low, high = fold(point.ms_before, point.ms_after), point.speedup_low, point.speedup_high
    return ratio if low is None or high is None else f"{ratio} [{low:.3g}, {high:.3g}]"

"""What a study shows: a tidy file of all runs, a table of means, and a picture with the Pareto front."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from taut.core.text import count
from taut.errors import CallError
from taut.studies.rows import Mean, Row, means, metric_names

Point = tuple[float, float]


def to_csv(rows: Sequence[Row]) -> str:
    """A line for every run; what was not measured is empty."""
    flat = [row.flat(metric_names(rows)) for row in rows]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def to_markdown(rows: Sequence[Row]) -> str:
    """A row for every method and size: means over the seeds, of the metrics with their standard deviation."""
    names = metric_names(rows)
    header = ["method", "size", "seeds", *names, "params", "nonzero", "MACs", "bytes", "zipped", "ms", "speedup", ""]
    lines = [header, ["---"] * 3 + ["---:"] * (len(header) - 4) + ["---"]]
    lines += [_line(mean, names) for mean in means(rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _line(mean: Mean, names: Sequence[str]) -> list[str]:
    size = "" if mean.size is None else f"{mean.size:g}"
    costs = [_number(mean, column, count) for column in ("params", "nonzero", "macs", "bytes", "zipped")]
    times = [_number(mean, "ms", "{:.3g}".format), _number(mean, "speedup", "{:.2f}x".format)]
    reason = mean.failed[0].reason.replace("|", "\\|") if mean.failed else ""
    if mean.failed and mean.rows:
        reason = f"without {len(mean.failed)}: {reason}"
    metrics = [_metric(mean, name) for name in names]
    return [mean.method.replace("|", "\\|"), size, str(len(mean.rows)), *metrics, *costs, *times, reason]


def _metric(mean: Mean, name: str) -> str:
    found = mean.metric(name)
    if found is None:
        return ""
    return f"{found[0]:.4f}" + (f" ± {found[1]:.4f}" if len(mean.rows) > 1 else "")


def _number(mean: Mean, column: str, written: Any) -> str:
    value = mean.value(column)
    return "" if value is None else str(written(value))


def front(points: Sequence[Point]) -> list[Point]:
    """The points (cost, metric) that none beats: every other one costs more or has a lower metric; by rising cost."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best


def draw(rows: Sequence[Row]) -> bytes:
    """The deciding metric over bytes and over milliseconds as SVG: a point for every mean, and the Pareto front.

    Raises:
        CallError: matplotlib is missing.
    """
    try:
        import matplotlib as mpl  # noqa: PLC0415 - an optional extra
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        raise CallError("Plots need matplotlib: pip install 'taut[report]'.") from None
    name = metric_names(rows)[0]
    groups = [mean for mean in means(rows) if mean.rows]
    out = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "taut"}):
        figure = Figure(figsize=(10, 4), layout="constrained")
        axes = figure.subplots(1, 2)
        for axis, column, label in zip(
            axes, ("bytes", "ms"), ("bytes of the file", "milliseconds, eager"), strict=True
        ):
            _draw(axis, groups, column, name)
            axis.set(xlabel=label, ylabel=name, xscale="log")
            axis.tick_params(axis="x", which="both", labelsize="small", rotation=30)
            axis.grid(alpha=0.3)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def _draw(axis: Any, groups: Sequence[Mean], column: str, name: str) -> None:
    reached: list[Point] = []
    for method in dict.fromkeys(mean.method for mean in groups):
        found = [(mean.value(column), mean.metric(name)) for mean in groups if mean.method == method]
        known = [(x, *value) for x, value in found if x is not None and value is not None]
        xs, ys, spread = zip(*known, strict=True) if known else ((), (), ())
        axis.errorbar(xs, ys, yerr=spread, fmt="o", capsize=2, label=method)
        reached += list(zip(xs, ys, strict=True))
    best = front(reached)
    axis.step([x for x, _ in best], [y for _, y in best], "k--", where="post", lw=1, alpha=0.6, label="Pareto front")

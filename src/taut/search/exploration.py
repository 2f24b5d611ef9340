"""`explore`: one decomposition, plans from 1x to 16x, each refitted and measured once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import nn
from typing_extensions import TypedDict  # pydantic needs this one below Python 3.12

from taut.core.atomic_folder import rehearse_within
from taut.core.data import collect
from taut.core.example import Example, Mask
from taut.core.files import guarded, write_atomic
from taut.core.fingerprint import fingerprint
from taut.core.modes import quiet
from taut.core.progress import track
from taut.core.randomness import check_seed
from taut.core.showing import shown
from taut.measure import model_times
from taut.measure.runtimes import chosen
from taut.measure.timing import Timing, check_timing
from taut.methods import choose
from taut.methods import settings as settings_of
from taut.methods.channels.channels import Channels
from taut.nn import Recurrent
from taut.recovery.samples import SAMPLES
from taut.search.finishing import compared
from taut.search.front import Front, Point
from taut.search.held_out import Batches
from taut.search.limits import Evaluate, Evaluation, model_at_ratio
from taut.search.session import Session, bare, can_judge
from taut.structure.answers import Output
from taut.structure.calling import read_example
from taut.structure.keeping import shares_of
from taut.structure.surgery import shallow
from taut.types import Method
from taut.types.keep import Keep
from taut.types.method import MethodLike

RATIOS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 11.0, 16.0)
"""How many times smaller the compressible part of the network becomes at each point."""


@shown
def explore(  # noqa: PLR0913 - the call is documented with these
    model: nn.Module,
    example: Any,
    *,
    data: Any = None,
    evaluate: Evaluate | None = None,
    methods: Iterable[MethodLike] | None = None,
    keep: Keep = None,
    output: Output = "auto",
    mask: Mask = None,
    compare: Timing = "torch",
    progress: bool | None = None,  # noqa: ARG001 - read by the decorator
    seed: int = 0,
    folder: str | Path | None = None,
) -> Front:
    """Measure what a model can become, without choosing.

    Args:
        model: a trained model; it is not changed.
        example: fixes how the model is called.
        data: calibration batches; without them the weights alone decide.
        evaluate: as in `compress`, on validation data; None measures costs and latency only.
        methods: as in `compress`.
        keep: as in `compress`; the others become so many times smaller.
        output: what of the model's output counts, and how it is read, as in `compress`.
        mask: what says which positions are real, as in `compress`.
        compare: what is timed of every point: "torch", True for every runtime that is installed, or False for nothing.
        progress: as in `compress`.
        seed: of everything random.
        folder: where finished points are kept; started again with the same model and settings, only the missing ones
            are measured.

    Returns:
        Up to nine points; ratios that no plan reaches are left out.
    """
    seed = check_seed(seed)
    check_timing(compare)
    chosen()  # the runtimes that are asked for are here
    if folder is not None:
        rehearse_within(folder)
    asked_for, methods = methods, choose(methods)
    model, shares = bare(model), shares_of(model, keep)
    evaluation = None if evaluate is None else Evaluation.of(evaluate, model)
    with quiet(seed):
        example = read_example(model, example, output, mask)
        data = None if data is None else collect(example, data, SAMPLES)
        inputs = None if data is None else [inputs for inputs, _ in data]
        methods = methods if asked_for is not None else (*methods, *_unasked(model, example, data))
        used = [(m.name, settings_of(m)) for m in methods]
        asked: tuple[Any, ...] = (used, seed, None if evaluation is None else evaluation.original)
        asked = asked if compare == "torch" else (*asked, compare)
        asked = asked if output == "auto" and mask is None else (*asked, _named(output), _named(mask))
        mark = fingerprint(model, (example.value, inputs), (*asked, shares) if shares else asked)
        store = None if folder is None else _Store(Path(folder), mark)
        points: dict[float, Point] = {} if store is None else store.read()
        if any(ratio not in points for ratio in RATIOS):
            _fill(points, Session.open(model, example, data, asked_for, keep=shares), evaluation, compare, store)
    return _front(points)


def _fill(
    points: dict[float, Point], session: Session, evaluation: Evaluation | None, timing: Timing, store: _Store | None
) -> None:
    """Measure the points that are missing, and keep each in the store."""
    milliseconds = _original_time(session, points, timing)
    with _not_lost(points):
        for ratio in track([ratio for ratio in RATIOS if ratio not in points], "exploring"):
            point = _measure(session, ratio, evaluation, milliseconds, timing)
            if point is not None:
                points[ratio] = point
                if store is not None:
                    store.write(point)


def _front(points: Mapping[float, Point]) -> Front:
    return Front(tuple(points[ratio] for ratio in sorted(points)))


@contextmanager
def _not_lost(points: Mapping[float, Point]) -> Iterator[None]:
    """What is raised inside carries the points that were measured by then as `.result`."""
    try:
        yield
    except BaseException as error:
        if points:
            error.result = _front(points)  # type: ignore[attr-defined] # TautError documents it
            error.add_note("The points that were measured by then are the `.result` of this error.")
        raise


def _unasked(model: nn.Module, example: Example, data: Batches | None) -> Iterator[Method]:
    """What may take out channels in a session that is told no methods, as far as it shows before any work."""
    if can_judge(example, data):
        yield Channels()
    elif any(isinstance(module, nn.RNNBase | Recurrent) for module in model.modules()):
        yield Channels(hidden=True)


def _named(value: Any) -> Any:
    """A function by its name."""
    return getattr(value, "__qualname__", value)


def _original_time(session: Session, points: Mapping[float, Point], timing: Timing) -> float | None:
    """Milliseconds of the original in its fastest runtime, to which all points refer: as in those that are there."""
    if timing is False:
        return None
    for point in points.values():
        return point.ms_before
    times = model_times(shallow(session.original), session.example, quick=timing == "torch").runtimes
    return min(estimate.value for estimate in times.values())


def _measure(
    session: Session, ratio: float, evaluation: Evaluation | None, milliseconds: float | None, timing: Timing
) -> Point | None:
    """One point; the original is not timed against itself: it is 1x by definition."""
    built = model_at_ratio(session, ratio)
    if built is None:
        return None
    small, plan = built
    if plan.steps:
        comparison = compared(session, small, evaluation, timing=timing)
        score, best = comparison.score_after, comparison.latency.best if comparison.latency else None
    else:
        score, best = None if evaluation is None else evaluation.score(small), None
    point = Point(ratio, plan, session.network.cost, session.cost(small), milliseconds, milliseconds)
    if score is not None:
        point = replace(point, metric=score.name, value=score.value, low=score.low, high=score.high)
    if best is None or milliseconds is None:
        return point
    return replace(
        point,
        ms_after=milliseconds / best.ratio,
        speedup_low=best.low,
        speedup_high=best.high,
        apart=best.apart,
    )


class _Store:
    """Finished points as files of a folder, each with the digest of the model it belongs to."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self.fingerprint = folder, fingerprint

    def read(self) -> dict[float, Point]:
        """Points of this model and these settings; damaged files count as missing."""
        points = {}
        for path in sorted(self.folder.glob("point-*.json")):
            try:
                record = TypeAdapter(_Record).validate_json(path.read_bytes())
            except (ValidationError, OSError):
                continue
            if record["fingerprint"] == self.fingerprint:
                points[record["point"].ratio] = record["point"]
        return points

    def write(self, point: Point) -> None:
        """Keep a point.

        Raises:
            ArtifactError: the folder cannot be written.
        """
        record = _Record(fingerprint=self.fingerprint, point=point)
        with guarded(f"Cannot keep the front in '{self.folder}'"):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / f"point-{point.ratio:g}.json", TypeAdapter(_Record).dump_json(record, indent=1))


class _Record(TypedDict):
    fingerprint: str
    point: Point

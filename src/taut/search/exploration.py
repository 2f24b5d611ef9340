"""`explore`: one decomposition, plans from 1x to 16x, each refitted and measured once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from taut.artifact.comparison import compared_models
from taut.core.atomic_folder import rehearse_within
from taut.core.data import collect
from taut.core.example import Example, Mask
from taut.core.fingerprint import fingerprint
from taut.core.modes import quiet
from taut.core.progress import stage, track
from taut.core.randomness import check_seed
from taut.core.showing import shown
from taut.core.workers import Jobs, check_jobs, finished
from taut.measure import model_times
from taut.measure.runtimes import chosen
from taut.measure.timing import Timing, check_timing
from taut.methods import choose
from taut.methods import settings as settings_of
from taut.methods.channels.channels import Channels
from taut.nn import Recurrent
from taut.recovery.samples import SAMPLES
from taut.search.candidates import Candidate, Candidates, candidate_at
from taut.search.front import Front, Point
from taut.search.held_out import Batches
from taut.search.kept_points import Store
from taut.search.limits import Evaluate, Evaluation
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
    jobs: Jobs = 1,
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
        jobs: how many points are made at a time, each in a process of its own with one thread; 1 stays in this process.
            Or a `concurrent.futures.Executor` that makes them, here or on other machines. The front is the same, and
            times are measured afterwards in this process.

    Returns:
        Up to nine points; ratios that no plan reaches are left out.
    """
    seed = check_seed(seed)
    check_timing(compare)
    check_jobs(jobs)
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
        candidates = Candidates(model, example, data, asked_for, shares, evaluation, seed, compare is not False)
        front = _Measuring(candidates, compare, None if folder is None else Store(Path(folder), mark))
        front.run(jobs)
    return _front(front.points)


class _Measuring:
    """A front while it is measured.

    Attributes:
        points: those that are there.
    """

    def __init__(self, candidates: Candidates, timing: Timing, store: Store | None) -> None:
        """Begin with what was measured earlier."""
        self.candidates, self.timing, self.store = candidates, timing, store
        self.points: dict[float, Point] = {} if store is None else store.read()

    @property
    def missing(self) -> list[float]:
        """The ratios without a point."""
        return [ratio for ratio in RATIOS if ratio not in self.points]

    def run(self, jobs: Jobs) -> None:
        """Measure the points that are missing, and keep each in the store."""
        if not self.missing:
            return
        with _not_lost(self.points):
            if jobs == 1:
                self._here(self.candidates.session, self._original_time())
            else:
                self._by_workers(jobs, self._original_time())

    def _here(self, session: Session, milliseconds: float | None) -> None:
        self._time(self._untimed(), milliseconds)
        for ratio in track(self.missing, "exploring"):
            candidate = candidate_at(session, ratio, self.candidates.evaluation, self.candidates.seed)
            if candidate is not None:
                self._keep(self._timed(_point(ratio, candidate, milliseconds), candidate.model))

    def _by_workers(self, jobs: Jobs, milliseconds: float | None) -> None:
        """Made and judged by workers; timed here when they are done, since other work would disturb it."""
        waiting = self._untimed()
        self.points |= {ratio: point for ratio, (point, _) in waiting.items()}
        items = [{"ratio": ratio} for ratio in self.missing]
        with stage("exploring", len(items)) as bar, closing(finished(self.candidates, items, jobs)) as results:
            for place, candidate in results:
                bar()
                if candidate is None:
                    continue
                point = _point(items[place]["ratio"], candidate, milliseconds)
                if candidate.model is None:
                    self._keep(point)
                    continue
                self.points[point.ratio], waiting[point.ratio] = point, (point, candidate.model)
                if self.store is not None:
                    self.store.write_untimed(point, candidate.model)
        self._time(waiting, milliseconds)

    def _untimed(self) -> dict[float, tuple[Point, nn.Module]]:
        """What an earlier call left to be timed."""
        found = {} if self.store is None else self.store.untimed(self.candidates.model)
        return {ratio: each for ratio, each in found.items() if ratio in self.missing}

    def _time(self, waiting: dict[float, tuple[Point, nn.Module]], milliseconds: float | None) -> None:
        for ratio in track(sorted(waiting), "timing"):
            point, model = waiting.pop(ratio)
            self._keep(self._timed(replace(point, ms_before=milliseconds, ms_after=milliseconds), model))

    def _original_time(self) -> float | None:
        """Milliseconds of the original in its fastest runtime, to which all points refer: those that are there, too."""
        if self.timing is False:
            return None
        for point in self.points.values():
            return point.ms_before
        model, example = self.candidates.model, self.candidates.example
        times = model_times(shallow(model), example, quick=self.timing == "torch").runtimes
        return min(estimate.value for estimate in times.values())

    def _keep(self, point: Point) -> None:
        self.points[point.ratio] = point
        if self.store is not None:
            self.store.write(point)

    def _timed(self, point: Point, model: nn.Module | None) -> Point:
        """With its time; the original is not timed against itself: it is 1x by definition."""
        if model is None or point.ms_before is None or not point.plan.steps:
            return point
        original, example = self.candidates.model, self.candidates.example
        latency = compared_models(original, model, None, example, timing=self.timing).latency
        best = latency.best if latency else None
        if best is None:
            return point
        return replace(
            point,
            ms_after=point.ms_before / best.ratio,
            speedup_low=best.low,
            speedup_high=best.high,
            apart=best.apart,
        )


def _point(ratio: float, candidate: Candidate, milliseconds: float | None) -> Point:
    """All that is known of a candidate but its time."""
    point = Point(ratio, candidate.plan, candidate.before, candidate.after, milliseconds, milliseconds)
    score = candidate.score
    if score is None:
        return point
    return replace(point, metric=score.name, value=score.value, low=score.low, high=score.high)


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

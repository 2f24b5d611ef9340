"""One run of a study: a model made smaller by one method, to one size, with one seed; trained, measured and saved."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import nn

from taut.artifact.checkpoint import is_folder, load, save
from taut.artifact.manifest import WEIGHTS
from taut.core.data import collect
from taut.core.example import Example, Mask
from taut.core.files import one_line
from taut.core.fingerprint import fingerprint
from taut.core.modes import quiet
from taut.core.randomness import own_states, seed_all
from taut.errors import ArtifactError, BudgetError, CallError, DataError, ModelError
from taut.measure.accuracy import measure
from taut.measure.counting import count
from taut.measure.timing import latencies
from taut.methods import settings
from taut.planning.application import apply_plan
from taut.planning.plan import whole
from taut.recovery.samples import SAMPLES
from taut.search.limits import meet_budget
from taut.search.session import Session
from taut.structure.answers import Output
from taut.structure.calling import read_example
from taut.structure.keeping import leaving
from taut.structure.observation import observe
from taut.structure.surgery import clone, shallow
from taut.structure.tracing import trace
from taut.studies.grid import Cell
from taut.studies.wishes import CONTROL, ORIGINAL, planned, pruned_to_size, read_method, shares_size
from taut.training.finetuning import Finetune, carry_out
from taut.types import Budget, Group, Looking, Method, Network, Plan, Stage, Step

Made = tuple[nn.Module, Plan]

LONGEST = 150
"""Letters of a folder's name before its digest: names have an end, and settings have none."""


@dataclass(frozen=True)
class Subject:
    """The model and the task of a study.

    Attributes:
        model: trained; it is not changed.
        example: fixes how it is called, and the batch that is timed.
        evaluate: the metric, higher is better; of a dict the first key.
        data: gives calibration batches; None: the weights alone decide.
        training: gives training data and what judges (`taut.Finetune`), where models are trained.
        loss: of the training; None: distillation.
        identity: of everything else that results depend on, such as the digest of the data.
        output: what of an output counts, and how it is read, as in `taut.compress`.
        mask: what says which positions are real, likewise.
    """

    model: nn.Module
    example: Any
    evaluate: Callable[[nn.Module], Any]
    data: Callable[[], Any] | None = None
    training: Callable[[], tuple[Any, Any]] | None = None
    loss: Any = None
    identity: str = ""
    output: Output = "auto"
    mask: Mask = None

    @property
    def call(self) -> Example:
        """How the model is called, and its outputs are read."""
        return read_example(self.model, self.example, self.output, self.mask)

    @cached_property
    def state(self) -> str:
        """A digest of the weights and of `identity`."""
        return fingerprint(self.model, None, self.identity)


Source = Callable[[], Subject]


@lru_cache(maxsize=1)
def opened(source: Source) -> Subject:
    """The subject, built once per process, from a fixed random state."""
    with own_states():
        seed_all(0)
        return source()


@dataclass(frozen=True)
class Run:
    """What other processes are sent: cell -> results.

    Attributes:
        source: builds the subject. state: that it must have. epochs: of training, or None.
        folder: where models are saved. mark: of the results. keep: layers that are left alone, as in `Grid`.
    """

    source: Source
    state: str
    epochs: int | None
    folder: Path
    mark: str
    keep: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, cell: Cell) -> dict[str, Any]:
        """The run's measurements, or the reason why there are none.

        Raises:
            DataError: the source builds another model each time, or the training data cannot be used.
        """
        start, seed = time.perf_counter(), cell["seed"]
        subject = opened(self.source)
        if subject.state != self.state:
            raise DataError("The model of the study is built with other weights each time: give it trained weights.")
        try:
            with quiet(seed):
                small, plan = make(subject, cell, self.keep)
        except (BudgetError, CallError, ModelError) as error:
            return {"reason": one_line(error)}
        if self.epochs and cell["method"] != ORIGINAL:
            try:
                small = trained(subject, small, cell, self.epochs)
            except (CallError, ModelError) as error:
                if cell["method"] == CONTROL:
                    raise
                return {"reason": one_line(error)}
        return self._measured(subject, small, plan, cell) | {"seconds": round(time.perf_counter() - start, 2)}

    def _measured(self, subject: Subject, small: nn.Module, plan: Plan, cell: Cell) -> dict[str, Any]:
        try:
            with own_states():
                seed_all(cell["seed"])
                score = measure(subject.evaluate, small)
        except DataError as error:
            if cell["method"] in {ORIGINAL, CONTROL}:
                raise
            return {"reason": one_line(error)}
        cost = count(shallow(small), subject.call)
        name = self.name(cell)
        save(small, plan, self.folder / name)
        stored = (self.folder / name / WEIGHTS).read_bytes()
        return {
            "metric": {score.name: score.value, **score.others},
            "params": cost.params,
            "nonzero": cost.nonzero,
            "macs": cost.macs,
            "bytes": len(stored),
            "zipped": len(zlib.compress(stored, 6)),
            "model": name,
        }

    def name(self, cell: Cell) -> str:
        """Of the folder: readable, and not that of another study in the same place."""
        words = "-".join(str(part) for part in cell.values() if part is not None)
        plain = "".join(
            letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in words
        )
        return f"{plain[:LONGEST]}-{sha256(f'{self.mark} {cell}'.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Timing:
    """Times saved models, one after the other, each in turns with the original: cell -> milliseconds.

    Attributes:
        source: builds the subject. folder: of saved models.
    """

    source: Source
    folder: Path

    def __call__(self, cell: Cell) -> dict[str, float]:
        """Medians of torch's plain calls, and how many times faster the model is than the original.

        Raises:
            ArtifactError: the model is gone or damaged.
        """
        subject, place = opened(self.source), self.folder / cell["model"]
        if not is_folder(place):
            raise ArtifactError(f"The model '{place}' is gone: delete runs.jsonl beside its folder and start again.")
        small = load(place, base=subject.model)
        found = latencies(subject.model, small, subject.call, quick=True).runtimes["eager"]
        return {"ms": found.after, "speedup": found.ratio}


def make(subject: Subject, cell: Cell, keep: Mapping[str, float] | None = None) -> Made:
    """The model before any training, and what was done.

    Args:
        subject: the model and its task.
        cell: method, size and seed.
        keep: layers that are left alone, or not below a share.

    Raises:
        BudgetError: the method does not reach the size.
        CallError: it applies to no layer, or refuses its settings.
    """
    if cell["method"] in {ORIGINAL, CONTROL}:
        return clone(subject.model), Plan(())
    method = read_method(cell["method"])
    data = None if subject.data is None else subject.data()
    if planned(method):
        session = Session.open(subject.model, subject.call, data, None if method is None else [method], keep=keep)
        if not session.planner.movable.params:
            raise CallError(f"{cell['method']} makes no layer of this network smaller.")
        built, missed = meet_budget(session, Budget(params=float(cell["size"])))
        if missed is not None:
            raise BudgetError(missed.reason)
        return built
    if method is None:
        raise CallError("Without a method there is nothing to do.")
    net = leaving(trace(subject.model, subject.call), subject.model, keep)
    batches = None if data is None else collect(net.example, data, SAMPLES)
    plan = Plan.of(net, _steps(net, method, cell["size"]))
    small, done = apply_plan(subject.model, plan, observe(net, subject.model, batches), batches)
    if not done.steps:
        reasons = [kept.reason for kept in done.kept if kept.code != "as asked"] or ["all its layers are kept as asked"]
        raise CallError(f"{method.name} did nothing: {reasons[0]}.")
    return small, done


def _steps(net: Network, method: Method, size: float | None) -> list[Step]:
    """One step over all layers where the method looks at the network, else one for every layer that it takes."""
    given = settings(method)
    step = replace(whole(net, method.name, (), **given), allow_growth=True)
    if pruned_to_size(method) and size is not None:
        return [replace(step, settings=step.settings | {"sparsity": _sparsity(net, method, size)}, allow_growth=False)]
    if shares_size(method) and size is not None:
        return [replace(step, settings=step.settings | {"share": _share(net, step, size)})]
    if isinstance(method, Looking):
        return [step]
    steps, refused = [], ""
    for layer in step.group.layers if step.group else ():
        try:
            if net.allows(layer.name, method.cost(Group((layer,)))):
                steps.append(replace(step, layers=(layer.name,), group=Group((layer,)), before=layer.cost))
        except CallError as error:
            refused = refused or str(error)
    if not steps:
        raise CallError(refused or f"{method.name} takes no layer that may become as small as it makes them.")
    return steps


def _sparsity(net: Network, method: Method, size: float) -> float:
    """The share of the weights that goes where `size` of all that could go stays: what is left alone counts, too.

    Raises:
        CallError: what is left alone is more than may stay.
    """
    free = [layer for layer in net.layers if method.refuses(Group((layer,))) is None]
    kept = [replace(la, skip=None) for la in net.layers if la.name in net.kept]
    alone = sum(math.prod(layer.weight) for layer in kept if method.refuses(Group((layer,))) is None)
    weights = sum(math.prod(layer.weight) for layer in free)
    sparsity = (1 - size) * (weights + alone) / max(weights, 1)
    if sparsity >= 1:
        raise CallError(f"{size:.4g} of the weights cannot be met: {alone / (weights + alone):.0%} are kept as asked.")
    return round(sparsity, 12)


def _share(net: Network, step: Step, size: float) -> float:
    """The share of a step's weights that is stored where the network keeps `size` of its parameters.

    Raises:
        CallError: the other parameters are more than that.
    """
    weights = sum(math.prod(layer.weight) for layer in step.group.layers) if step.group else 0
    others = net.cost.params - weights
    left = size * net.cost.params - others
    if left < 1:
        raise CallError(
            f"{size:.4g} of the parameters cannot be met: {others / net.cost.params:.0%} are in biases, norms and "
            f"layers that {step.method} does not take."
        )
    return float(min(1.0, left / weights))


def trained(subject: Subject, small: nn.Module, cell: Cell, epochs: int) -> nn.Module:
    """The model after so many epochs; zeros that a method made stay.

    Raises:
        CallError: the subject has no training data.
        DataError: it cannot be used.
    """
    if subject.training is None:
        raise CallError("Training needs data: the subject of the study has none.")
    made = cell["method"] not in {ORIGINAL, CONTROL} and not planned(read_method(cell["method"]))
    with quiet(cell["seed"]):
        train, judge = subject.training()
        wish = Finetune(train, judge, subject.loss, (Stage(epochs=epochs, hold_zeros=made),))
        return carry_out(small, None, None, wish, teacher=subject.model, example=subject.call, seed=cell["seed"])[0]

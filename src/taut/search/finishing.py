"""What `compress` returns: the model with its comparison, the control beside it, and what the numbers do not prove."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from taut.artifact.checkpoint import save
from taut.artifact.comparison import Comparison, compared_models
from taut.artifact.exporting import Export, export
from taut.core.example import Example
from taut.measure.accuracy import Score
from taut.measure.classes import worst_class
from taut.measure.timing import Timing
from taut.search.limits import Evaluation
from taut.search.session import Session
from taut.structure.surgery import shallow
from taut.training.control import control_reason, train_control
from taut.training.finetuning import Finetune
from taut.types import Budget, Plan


@dataclass(frozen=True)
class Result:
    """What `compress` returns.

    Attributes:
        model: the new model. plan: what was done to which layer, and why. comparison: before and after, measured.
        example: how the model is called.
    """

    model: nn.Module = field(repr=False)
    plan: Plan = field(repr=False)
    comparison: Comparison = field(repr=False)
    example: Example = field(repr=False)

    def __str__(self) -> str:
        """What was done to how many layers, and the comparison."""
        return f"{self.plan.summary()}\n{self.comparison}"

    def __repr__(self) -> str:
        """One line."""
        return f"<taut.Result: {self.plan.summary()}>"

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write model.safetensors, manifest.json and comparison.json into `folder` (`taut.save`)."""
        save(self.model, self.plan, folder, comparison=self.comparison, overwrite=overwrite)

    def export(self, path: str | Path) -> Export:
        """Write the model as .onnx or .xml (OpenVINO), checked there (`taut.export`)."""
        return export(self.model, self.example, path)


def finished(
    session: Session,
    small: nn.Module,
    plan: Plan,
    evaluation: Evaluation | None,
    budget: Budget,
    *,
    timing: Timing = True,
) -> Result:
    """The result with its comparison and the counted cost.

    Args:
        session: of the original.
        small: what was made of it.
        plan: what was done.
        evaluation: the user's metric.
        budget: what was asked for.
        timing: what is timed (`taut.compress`).
    """
    comparison = compared(session, small, evaluation, timing=timing, latency=budget.latency)
    if session.data is not None:
        classes = worst_class(session.example, shallow(session.original), shallow(small), session.data)
        comparison = replace(comparison, classes=classes)
    comparison = replace(comparison, remarks=_of_drop(budget, comparison))
    return Result(small, replace(plan, after=session.cost(small)), comparison, session.example)


def counted(session: Session, small: nn.Module, plan: Plan) -> Result:
    """The result with its counted cost alone: nothing of the user's is called."""
    comparison = compared(session, small, None, timing=False)
    return Result(small, replace(plan, after=session.cost(small)), comparison, session.example)


def compared(
    session: Session,
    small: nn.Module,
    evaluation: Evaluation | None,
    *,
    timing: Timing = True,
    latency: float | None = None,
) -> Comparison:
    """The comparison with the original, whose metric is known already.

    Args:
        session: of the original.
        small: what was made of it.
        evaluation: the user's metric.
        timing: what is timed (`taut.compress`).
        latency: share of the time that was allowed; what the search measured is shown.
    """
    score = None if evaluation is None else evaluation.score(small)
    timed = None if latency is None or session.meter is None else session.meter.searched(shallow(small), latency)
    costs = compared_models(session.original, small, None, session.example, timing=timing, searched=timed)
    return replace(costs, score_before=None if evaluation is None else evaluation.original, score_after=score)


def controlled(session: Session, result: Result, evaluation: Evaluation | None, wish: Finetune, seed: int) -> Result:
    """The result with the original beside it, trained equally: what training alone brings.

    Args:
        session: of the original.
        result: trained.
        evaluation: the user's metric; without it there is nothing to compare.
        wish: how it was trained.
        seed: as of the training.
    """
    if evaluation is None:
        return result
    reason, score = control_reason(wish, result.plan), None
    if reason is None:
        control = train_control(session.original, session.stats, wish, result.plan, seed)
        score = evaluation.score(control)
    remarks = (*result.comparison.remarks, *([] if reason is None else [reason]))
    return replace(result, comparison=replace(result.comparison, score_control=score, remarks=remarks))


def _of_drop(budget: Budget, comparison: Comparison) -> tuple[str, ...]:
    """What a budget of `drop` promises, and on which data."""
    change, score = comparison.difference, comparison.score_after
    if budget.drop is None or change is None or score is None:
        return ()
    promise = (
        f"The drop of at most {budget.drop:g} holds on the data of `evaluate` alone, where {score.name} changed by"
    )
    if change.low is not None and change.high is not None:
        return (
            f"{promise} {change.value:+.4f}: over its {score.n} samples a 95 % interval of [{change.low:+.4f}, "
            f"{change.high:+.4f}], and on other data it may be anything in it.",
        )
    return (f"{promise} {change.value:+.4f}. {_no_interval(comparison.score_before, score)}",)


def _no_interval(before: Score | None, after: Score) -> str:
    if before is None or None in {before.low, before.high, after.low, after.high}:
        return (
            "No interval can be given, since it returned a number without the samples behind it: return one score per "
            "sample, or taut.Metric(value, n)."
        )
    return (
        f"Over its {after.n} samples the 95 % intervals of both are [{before.low:.4f}, {before.high:.4f}] and "
        f"[{after.low:.4f}, {after.high:.4f}]; one score per sample would give that of the change, which is narrower."
    )

"""`finetune`: a schedule carried out: steps applied, nets trained in between, resumable after a kill."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from taut.artifact.provenance import hand_on, history, remember
from taut.artifact.rebuild import replay, with_sides
from taut.core.data import collect
from taut.core.example import Example
from taut.core.fingerprint import fingerprint
from taut.core.modes import device_of, evaluating, quiet
from taut.core.randomness import check_seed, own_states, seed_all
from taut.core.showing import shown
from taut.core.tensors import on_device
from taut.core.user_code import call
from taut.errors import CallError, DataError, TautError
from taut.measure.accuracy import measure
from taut.measure.layout import channels_last, has_images
from taut.methods import resolve
from taut.nn import bake, hold_zeros, masked
from taut.planning.application import apply_plan
from taut.recovery.balancing import balance
from taut.recovery.samples import SAMPLES
from taut.structure.answers import Output
from taut.structure.calling import read_example
from taut.structure.kinds import Reader
from taut.structure.observation import observe
from taut.structure.statistics import Statistics
from taut.structure.surgery import clone
from taut.structure.tracing import trace
from taut.structure.wrappers import unwrapped
from taut.training.batches import Batches
from taut.training.freezing import below, frozen, run_order
from taut.training.loop import Idle, Judge, Trainer, accelerator, launched, require_training
from taut.training.losses import Loss, Objective
from taut.training.sparsifying import penalty_of
from taut.training.state import Position, Store, unpacked
from taut.types import Plan, Schedule, Slimming, Stage, Step, check_schedule
from taut.types.gone import gone_blocks, without_gone

APPLYING = 1 << 20
"""In the place of an epoch: the random state in which a stage's steps are applied."""


@dataclass(frozen=True)
class Finetune:
    """How `taut.compress` trains what it made.

    Attributes:
        train: training batches, with or without targets; read once per epoch.
        valid: validation batches (their mean loss decides) or a function of the model, higher is better.
        loss: `loss(outputs, targets)`, a mean over samples; None: distillation from the original, without labels.
        schedule: stages, or a function of the plan that gives them, such as `taut.cascade`; None: all at once.
        folder: where the state is kept, to go on after a kill.
        output: what of the original's outputs is distilled, and how it is read: "auto" (as `observe` did), or as in
            `taut.observe`.
        control: whether `taut.compress` trains the original equally and shows its metric beside: training alone may
            bring what looks like a gift of compression. It takes as long again; only where there is a loss, and
            `evaluate`. Its state is kept in FOLDER-control.
    """

    train: Any
    valid: Any
    loss: Loss | None = None
    schedule: Schedule | Callable[[Plan], Schedule] | None = None
    folder: str | Path | None = None
    output: Output = "auto"
    control: bool = True


def stages_of(wish: Finetune, plan: Plan | None) -> Schedule:
    """The stages of a training, for a plan.

    Raises:
        CallError: a schedule that is a function needs a plan.
        DataError: it raised.
    """
    if callable(wish.schedule):
        if plan is None:
            raise CallError("A schedule that is a function of the plan needs a plan.")
        return call("The schedule", wish.schedule, plan)
    return (Stage(tuple(range(len(plan.steps))) if plan else ()),) if wish.schedule is None else wish.schedule


def trains(schedule: Schedule | Callable[[Plan], Schedule] | None) -> bool:
    """Whether a schedule trains anything, as far as can be known before there is a plan."""
    if callable(schedule):
        try:
            schedule = schedule(Plan(()))
        except Exception:  # it is written for real plans
            return True
    if not isinstance(schedule, tuple) or not schedule:
        return True
    return any(getattr(stage, "epochs", 1) and getattr(stage, "train", "all") != "none" for stage in schedule)


@shown
def finetune(  # noqa: PLR0913 - the call is documented with these
    model: nn.Module,
    plan: Plan | None,
    stats: Statistics | None,
    train: Any,
    valid: Any,
    *,
    schedule: Schedule | None = None,
    loss: Loss | None = None,
    teacher: nn.Module | None = None,
    example: Any = None,
    folder: str | Path | None = None,
    output: Output = "auto",
    progress: bool | None = None,  # noqa: ARG001 - read by the decorator
    seed: int = 0,
) -> nn.Module:
    """Carry out a schedule: apply the steps of each stage, then train, and keep the best validation weights.

    Args:
        model: the ORIGINAL model, or with plan=None one that is only to be trained; it is not changed.
        plan: steps by original layer names, or None.
        stats: what `observe` found in the original; None needs `example`.
        train: training batches like the example, or (inputs, targets); their inputs also calibrate the refit.
        valid: validation batches (their mean loss decides), or `evaluate(model)`, higher is better.
        schedule: `taut.Stage`s; None: one stage with every step, 3 epochs of Adam at 1e-3.
        loss: `loss(outputs, targets)`, a mean over samples; None: distillation, which needs no labels.
        teacher: whose outputs are distilled; None: `model`, where there is a plan.
        example: how the model is called, where there are no statistics.
        folder: where the state is kept; called again with the same arguments, it goes on from there.
        output: what of outputs is distilled, and how it is read: "auto" (as `observe` did), or as in `taut.observe`.
        progress: None: shown on a terminal or in a notebook, once it takes long; True: at once; False: not at all.
        seed: of everything random.

    Returns:
        A new model, with train flags, devices and layouts as in the input.

    Raises:
        CallError: the schedule does not apply each step once, or what it needs is missing.
        DataError: batches, the loss or `valid` cannot be used; the model as far as it was trained is its `.result`.
    """
    return carry_out(
        model,
        plan,
        stats,
        Finetune(train, valid, loss, schedule, folder, output),
        teacher=teacher if teacher is not None or plan is None else model,
        example=example,
        seed=seed,
    )[0]


def carry_out(  # noqa: PLR0913 - as `finetune`
    model: nn.Module,
    plan: Plan | None,
    stats: Statistics | None,
    wish: Finetune,
    *,
    teacher: nn.Module | None,
    example: Any = None,
    seed: int = 0,
) -> tuple[nn.Module, Plan | None]:
    """`finetune`, and the plan as it was really carried out."""
    seed = check_seed(seed)
    model, teacher = unwrapped(model), None if teacher is None else unwrapped(teacher)
    stages = stages_of(wish, plan)
    if plan is not None and not plan.steps and not stages:
        return clone(model), plan  # a cascade over nothing
    check_schedule(stages, plan)
    if trains(stages):
        require_training()
    if plan is not None:
        _check_steps(plan, stats)
    with quiet(seed), own_states():
        return _Run(model, plan, stats, wish, stages, teacher, example, seed).run()


class _Run:
    """One run of a schedule."""

    def __init__(  # noqa: PLR0913, PLR0917 - as `finetune`
        self,
        model: nn.Module,
        plan: Plan | None,
        stats: Statistics | None,
        wish: Finetune,
        stages: Schedule,
        teacher: nn.Module | None,
        example: Any,
        seed: int,
    ) -> None:
        if stats is None and example is None:
            raise CallError("Training needs stats= of taut.observe or an example= to know how the model is called.")
        given = stats.network.example if stats is not None else example
        self.example: Example = read_example(model, given, wish.output)
        self.given = model
        self.held = tuple(masked(model))
        model = bake(clone(model)) if self.held else model
        self.original, self.plan, self.stats, self.wish, self.stages, self.seed = model, plan, stats, wish, stages, seed
        kinds = stats.kinds if stats is not None and wish.output == "auto" else ()
        kind = "auto" if self.example.output is None else self.example.output.kind
        reader = Reader(model if teacher is None else teacher, self.example)
        self.objectives = [Objective(wish.loss, stage.distill, kinds, kind, reader) for stage in stages]
        distills = any(objective.distills for objective in self.objectives)
        if distills and teacher is None:
            raise CallError("Distillation needs the original: give teacher=, or a loss.")
        self.teacher = _fast(teacher, self.example) if distills and teacher is not None else None
        self.batches = Batches(self.example, wish.train, self.teacher, "training")
        self.store = Store(wish.folder)

    def run(self) -> tuple[nn.Module, Plan | None]:
        """All stages, from the first or from where the state of the folder stands."""
        mark = self._mark()
        found = self.store.read(mark)
        position, tensors = found if found is not None else (Position(mark), {})
        model = self._restored(position, unpacked("model", tensors)) if found else clone(self.original)
        accelerate = accelerator() if trains(self.stages) else Idle()
        home, device = device_of(model), accelerate.device if launched() else device_of(model)
        generators = [(generator, generator.get_state()) for generator in self.batches.generators()]
        while position.stage < len(self.stages):
            stage = self.stages[position.stage]
            if not position.applied:
                tensors = {}
                model, done = self._applied(model, stage, position, first=not position.steps and position.stage == 0)
                if done is not None:
                    # a later stage may have folded an order that an earlier one had to leave
                    steps = tuple(with_sides(model, step) for step in (*position.steps, *done.steps))
                    position.steps, position.applied = steps, True
                    position.kept += done.kept
            position.applied = True
            model = self._trained(model.to(device), stage, position, tensors, accelerate)
            position.next_stage()
            accelerate.free_memory()  # it would keep the model and the moments of every stage
        for generator, state in generators:
            generator.set_state(state)
        if accelerate.is_main_process:
            self.store.write(position, {f"model/{name}": t for name, t in model.state_dict().items()})
        return self._finished(model.to(home), position)

    def _finished(self, model: nn.Module, position: Position) -> tuple[nn.Module, Plan | None]:
        """The model with what was done to it remembered, and the plan as it was carried out."""
        if self.plan is None:
            hand_on(self.given, model)
            return model, None
        plan = replace(self.plan, steps=position.steps, kept=(*self.plan.kept, *position.kept))
        remember(model, plan, history(self.given))
        return model, plan

    def _mark(self) -> str:
        """What a state must belong to: model, teacher, plan, schedule, seed, loss, and data that is a list."""
        loss = getattr(self.wish.loss, "__qualname__", type(self.wish.loss).__name__)
        teacher = None if self.teacher is None else fingerprint(self.teacher, None, None)
        batches = self.wish.train if self.batches.fixed else None
        plan = self.plan and self.plan.to_json()
        output = getattr(self.wish.output, "__qualname__", self.wish.output)
        beside = [(n, stage.sparsify) for n, stage in enumerate(self.stages) if stage.sparsify]  # unknown before
        return fingerprint(self.original, batches, (plan, self.stages, self.seed, loss, teacher, output, *beside))

    def _restored(self, position: Position, tensors: dict[str, Tensor]) -> nn.Module:
        model = clone(self.original)
        replay(model, position.steps)
        model.load_state_dict(tensors)
        return model

    def _applied(
        self, model: nn.Module, stage: Stage, position: Position, first: bool
    ) -> tuple[nn.Module, Plan | None]:
        """The model with the stage's steps; decomposed and refitted from the weights that it has now."""
        if self.plan is None or not stage.steps:
            return model, None
        seed_all(self.seed, position.stage, APPLYING)  # also after a resume: nothing depends on what training drew
        asked = (without_gone(self.plan.steps[place], gone_blocks(position.steps)) for place in stage.steps)
        steps = Plan(tuple(step for step in asked if not isinstance(step, str)))
        looks = any(resolve(step).uses_statistics for step in steps.steps)
        data = [inputs for inputs, _ in collect(self.example, self.wish.train, SAMPLES)] if looks else None
        known = None if self.stats is None else self.stats.leaving(self.plan.shares)
        stats = known if first else None
        if stats is None:
            net = trace(model, self.example)
            stats = observe(net if known is None else net.leaving_as(known.network), model, data)
        return apply_plan(model, steps, stats.leaving(self.plan.shares) if known is None else stats, data)

    def _trained(
        self, model: nn.Module, stage: Stage, position: Position, tensors: dict[str, Tensor], accelerate: Any
    ) -> nn.Module:
        layers = [name for place in stage.steps if self.plan for name in self.plan.steps[place].layers]
        fixed = below(run_order(model, self.example), layers) if stage.train == "above" else set()
        objective = self.objectives[position.stage]
        objective.reading = position.reading
        judge = self._judge(objective, position)
        working = _fast(model, self.example)
        if stage.train != "none" and not tensors:
            balance(working)
        try:
            with frozen(working, fixed) as still, _holding(working, position.steps, self.held, every=stage.hold_zeros):
                Trainer(
                    working,
                    still,
                    stage,
                    objective,
                    self.batches,
                    judge,
                    self.example,
                    accelerate,
                    position,
                    self.store,
                    self.seed,
                    penalty_of(stage, working, self.example, self.plan),
                ).run(tensors)
        except TautError as error:
            model.load_state_dict(working.state_dict())
            error.result = self._finished(model, position)[0]
            raise
        model.load_state_dict(working.state_dict())
        return model

    def _judge(self, objective: Objective, position: Position) -> Judge | None:
        valid = self.wish.valid
        if valid is None:
            return None
        if callable(valid):
            return lambda model: measure(valid, model, "The function that validates (valid=)").value
        batches = Batches(self.example, valid, self.teacher if objective.distills else None, "validation")
        if batches.once and self.stages[position.stage].epochs:
            raise DataError(batches.again)

        def judge(model: nn.Module) -> float:
            """Minus the mean loss."""
            total = count = 0.0
            with evaluating(model):
                for place, batch in enumerate(batches):
                    inputs, targets = (on_device(part, device_of(model)) for part in batches.read(batch))
                    samples = self.example.samples.size(inputs)
                    output, original = self.example.run(model, inputs), batches.original(place, inputs)
                    if objective.distills and objective.reading is None:
                        position.reading = objective.settle(original, inputs, targets)
                    loss = objective(output, targets, on_device(original, device_of(model)), inputs)
                    total, count = total + samples * float(loss), count + samples
            if not count:
                raise DataError("The validation data gave no batch.")
            return -total / count

        return judge


@contextmanager
def _holding(model: nn.Module, steps: Iterable[Step], held: Iterable[str], *, every: bool) -> Iterator[None]:
    """Inside the block the zeros of all pruned layers, and of those that were held before, are held at zero."""
    pruned = [name for step in steps for name in _pruned(step)] + list(held)
    places = {n for n, _ in model.named_modules() for name in pruned if n == name or n.startswith(f"{name}.")}
    hold_zeros(model, None if every else places)
    try:
        yield
    finally:
        bake(model)


def _pruned(step: Step) -> list[str]:
    """The layers whose zeros a pruning step made: not those that it spared."""
    method = resolve(step)
    if not method.masks:
        return []
    spared = method.spared(len(step.layers))  # type: ignore[attr-defined]
    return [name for place, name in enumerate(step.layers) if place not in spared]


def _check_steps(plan: Plan, stats: Statistics | None) -> None:
    """What can be known to fail is said before anything is trained.

    Raises:
        CallError: a step's method or setting is wrong, it does not take its layers, or an earlier step replaces them.
    """
    replaced: dict[str, tuple[str, tuple[int, ...]]] = {}
    for step in plan.steps:
        method = resolve(step)
        group = step.group or (None if stats is None else stats.network.group(step.layers))
        if group is None:
            continue
        refused = method.refuses(group)
        if refused:
            raise CallError(f"{step.method} does not apply to layer '{step.layers[0]}': {refused}.")
        method.cost(group)
        for layer in group.layers:
            earlier, weight = replaced.get(layer.name, ("", ()))
            if earlier and weight == layer.weight:
                raise CallError(
                    f"{step.method} cannot find layer '{layer.name}' as it was: {earlier}, an earlier step, replaces "
                    f"it. Put {step.method} before {earlier}, or plan it on the network that {earlier} makes."
                )
        if not method.masks and not method.exact and not isinstance(method, Slimming):
            replaced |= {layer.name: (step.method, layer.weight) for layer in group.layers}


def _fast(model: nn.Module, example: Example) -> nn.Module:
    """A copy to train on; convolutions of images in the layout that takes a third less time."""
    copied = clone(model)
    return channels_last(copied) if has_images(example) else copied

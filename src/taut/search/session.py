"""A model with all that plans are made from, complete when it is opened: many plans can be cut from one session."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from taut.artifact.provenance import history, remember
from taut.core.data import collect
from taut.core.example import Example
from taut.core.progress import stage
from taut.errors import CallError, TautError
from taut.measure import LatencyMeter, LatencyModel
from taut.measure.counting import count as count_cost
from taut.methods import choose, settings
from taut.methods.channels.channels import Channels
from taut.methods.channels.heads import with_heads
from taut.planning.blocks import survey_all
from taut.planning.damage_measurement import sensitivity as measure_damage
from taut.planning.narrowing import Latest
from taut.planning.plain_form import carry_exact, idle_forms, in_own_form, in_plain_form, kept_whole
from taut.planning.plan import describe
from taut.recovery.judging import Judge
from taut.recovery.refit import removed_layers
from taut.recovery.samples import SAMPLES, refit_samples
from taut.search.held_out import JUDGES, Batches, divided
from taut.search.joint import JointPlanner
from taut.search.latency import fit_latency_model, shape_variants
from taut.search.ranks import Built, Limits, RankPlanner
from taut.structure.answers import answers_of
from taut.structure.calling import read_example
from taut.structure.channels.groups import coupled, hidden_alone
from taut.structure.keeping import leaving, shares_of
from taut.structure.observation import observe
from taut.structure.outputs import Outputs
from taut.structure.statistics import Statistics
from taut.structure.surgery import clone, locate, shallow
from taut.structure.tracing import trace
from taut.structure.wrappers import unwrapped
from taut.training.finetuning import Finetune, carry_out
from taut.types import Cost, Group, Layer, Method, Network, Plan, Slimming, Step
from taut.types.keep import Keep
from taut.types.method import MethodLike

JUDGED = 64
"""Calibration samples from which on channels are candidates unasked."""

IN_OWN_FORM = "it is in its own form again: nothing but its plain form changed it"
"""Why a layer of the base is left alone that is not there any more."""


@dataclass(frozen=True, eq=False)
class Session:
    """A model with everything that plans are made from: traced, observed, decomposed and, for a budget of time, timed.

    Attributes:
        original: the user's model. network: as it was traced.
        base: the same after exact steps (or itself). exact: those steps.
        planner: makes plans of the base.
        data: calibration batches, read once.
        meter: times what is built, for a budget of latency.
    """

    original: nn.Module
    network: Network
    base: nn.Module
    exact: tuple[Step, ...]
    planner: RankPlanner | JointPlanner
    data: Batches | None
    meter: LatencyMeter | None = None

    @classmethod
    def open(  # noqa: PLR0913 - the settings of `taut.compress`
        cls,
        model: nn.Module,
        example: Any,
        data: Any,
        methods: Iterable[MethodLike] | None,
        *,
        keep: Keep = None,
        measured: bool = False,
        align: int = 1,
        latency: float | None = None,
    ) -> Session:
        """Trace, do what is exact, observe, decompose, and learn what layers cost in time.

        Args:
            model: as in `taut.compress`.
            example: likewise.
            data: likewise.
            methods: likewise; None: see `_unasked`.
            keep: likewise.
            measured: whether measured damages take the place of predicted ones.
            align: as in `taut.compress`.
            latency: share of the original's time that plans are to keep at most; None: nothing is timed.

        Raises:
            CallError: more than one method takes out channels.
        """
        shares_of(model, keep)  # refuses before any work what it does not know
        chosen, model = choose(methods), bare(model)
        call = read_example(model, example)
        batches = None if data is None else collect(call, data, SAMPLES)
        with stage("tracing"):
            network = leaving(trace(model, call, batches), model, keep)
        base, inner, exact = _exact(model, network, [m for m in chosen if m.exact])
        stats = observe(inner, base, batches)
        narrowing, low_rank = _divided([m for m in chosen if not m.exact])
        asked = methods is not None
        if not asked:
            narrowing = _unasked(base, inner, batches, align)
        if measured and batches is not None:
            stats = measure_damage(inner, base, stats, batches, low_rank)
        stats = replace(stats, looks={})  # nobody changes the base
        choices = survey_all(inner, base, stats, batches, low_rank, align, timed=latency is not None)

        latest = Latest()

        def planner(
            latency_model: LatencyModel | None = None, correction: Mapping[float, float] | None = None
        ) -> RankPlanner | JointPlanner:
            ranks = RankPlanner(base, stats, choices, batches, latency_model)
            return (
                JointPlanner(ranks, narrowing, low_rank, align, correction or {}, latest, asked) if narrowing else ranks
            )

        if latency is None:
            return cls(model, network, base, exact, planner(), batches)
        bared = shallow(base)
        meter = LatencyMeter(shallow(model), call, next(shape_variants(bared, stats, choices, narrowing), None))
        fitted = fit_latency_model(
            bared,
            shape_variants(bared, stats, choices, narrowing),
            meter,
            lambda latency_model: planner(latency_model).shape_candidates({"latency": latency}),
        )
        return cls(model, network, base, exact, planner(*fitted), batches, meter)

    @property
    def stats(self) -> Statistics:
        """Of the base, with every decomposition made so far."""
        return self.planner.stats

    @property
    def example(self) -> Example:
        """How the model is called."""
        example: Example = self.network.example
        return example

    def best_within(self, limits: Limits) -> Built | None:
        """The model with the least damage within `limits`; None where no plan is so small."""
        built = self.planner.best_within(limits)
        return None if built is None else self._renamed(*built, limits)

    def alternatives(self, limits: Limits) -> Iterator[Built]:
        """Models within `limits` by channels, by ranks, and by both in equal parts, as far as these were asked for."""
        return (self._renamed(*built, limits) for built in self.planner.alternatives(limits))

    def whole(self, key: str) -> float:
        """What the original costs by a key of a budget."""
        return 1.0 if key == "latency" else float(getattr(self.network.cost, key))

    def uncompressed(self, *, met: bool = True) -> Built:
        """A bit-equal copy, or the exact steps alone where some were asked for; `met` says whether that is enough."""
        choices = self.planner.choices
        plan = describe(self.stats.network, self.stats, choices, [0] * len(choices), met=met)
        idle = idle_forms(self.base, self.base, self.exact, ())
        exact = tuple(step for step in self.exact if step not in idle)
        small = in_own_form(self.base, self.original, idle) if exact else clone(self.original)
        kept = kept_whole(plan.kept, idle, self.network)
        whole = replace(plan, steps=exact, kept=kept, before=self.network.cost)
        remember(small, whole, history(self.original))
        return small, whole

    def without(self, reasons: Mapping[str, str]) -> Session:
        """The same, with some layers left alone, for these reasons: what was done to them failed."""
        return replace(self, planner=self.planner.without(reasons), network=self.network.skipping(reasons))

    @cached_property
    def judge(self) -> Judge:
        """Samples on which networks near a budget that cannot be met are compared with the original."""
        call, kinds = self.example, list(self.stats.kinds)
        if self.data is None:
            outputs = answers_of(call, Outputs(self.original, call).run(self.original)[0]).tensors
            return Judge(call, self.original, [call.value], ["values"] * len(outputs))
        some = collect(call, self.data, min(JUDGES, refit_samples(self.stats.network)))
        return Judge(call, self.original, [inputs for inputs, _ in some], kinds)

    def _renamed(self, small: nn.Module, plan: Plan, limits: Limits) -> Built:
        """With the exact steps in front that were needed, and original names."""
        renamed = tuple(_original_names(step, self.exact) for step in plan.steps)
        small, exact = self._needed(small, renamed, limits)
        kept = kept_whole(plan.kept, [step for step in self.exact if step not in exact], self.network)
        kept = tuple(replace(one, layer=_original_name(one.layer, self.exact)) for one in kept)
        gone = removed_layers(renamed)
        exact = tuple(step for step in exact if not set(step.layers) <= gone)
        whole = replace(plan, steps=(*exact, *renamed), kept=kept, before=self.network.cost)
        remember(
            small, whole, history(self.original)
        )  # what was carried out of the base alone leaves out the exact steps
        return small, whole

    def _needed(self, small: nn.Module, steps: Sequence[Step], limits: Limits) -> tuple[nn.Module, tuple[Step, ...]]:
        """Layers that only their plain form changed as they were, within the limits; the exact steps that are left."""
        idle = idle_forms(small, self.base, self.exact, steps)
        counted = {key: limit for key, limit in limits.items() if key != "latency"}
        for some in (
            idle,
            tuple(step for step in idle if step.after == step.before),
        ):  # the others cost more as they were
            own = in_own_form(small, self.original, some) if some else small
            if some and all(amount <= counted[key] for key, amount in self.amounts(own, counted).items()):
                return own, tuple(step for step in self.exact if step not in some)
        return small, self.exact

    def trained(self, plan: Plan, wish: Finetune, seed: int) -> tuple[nn.Module, Plan]:
        """The schedule of `wish` carried out from the base, where the exact steps of the plan are done already."""
        exact = tuple(step for step in plan.steps if step in self.exact)
        done = len(exact)
        stages = tuple(
            replace(stage, steps=tuple(place - done for place in stage.steps if place >= done))
            for stage in wish.schedule or ()  # type: ignore[union-attr] # resolved by the caller
            if not stage.steps or max(stage.steps) >= done
        )
        inner = replace(plan, steps=tuple(_inside(self.base, step, exact) for step in plan.steps[done:]))
        wish = replace(wish, schedule=stages)
        base, stats = self.base, self.stats
        if len(exact) < len(self.exact):
            base = in_own_form(base, self.original, [step for step in self.exact if step not in exact])
            gone = {layer.name for layer in stats.network.layers} - {name for name, _ in base.named_modules()}
            stats = replace(stats, network=stats.network.skipping(dict.fromkeys(gone, IN_OWN_FORM)), looks=None)
        model, trained = carry_out(base, inner, stats, wish, teacher=self.original, seed=seed)
        steps = () if trained is None else trained.steps
        whole = replace(trained or plan, steps=(*exact, *(_original_names(step, exact) for step in steps)))
        remember(
            model, whole, history(self.original)
        )  # what was carried out of the base alone leaves out the exact steps
        return model, whole

    def cost(self, model: nn.Module) -> Cost:
        """Counted cost of a built model."""
        return count_cost(shallow(model), self.example)

    def amounts(self, model: nn.Module, keys: Iterable[str]) -> dict[str, float]:
        """What a built model costs by the keys of a budget: counted, and its time measured beside the original's."""
        keys, cost = list(keys), self.cost(model)
        return {key: self._time(model) if key == "latency" else float(getattr(cost, key)) for key in keys}

    def _time(self, model: nn.Module) -> float:
        if self.meter is None:
            raise CallError("This session was opened without a clock.")
        return self.meter.relative_time(shallow(model))


def bare(model: nn.Module) -> nn.Module:
    """The model without wrappers.

    Raises:
        CallError: it is no module.
    """
    return unwrapped(model)


def _divided(methods: Sequence[Method]) -> tuple[Method | None, tuple[Method, ...]]:
    """The method that takes out channels, if any, and the others.

    Raises:
        CallError: there are several.
    """
    narrowing = [method for method in methods if isinstance(method, Slimming)]
    if len(narrowing) > 1:
        raise CallError(f"One method can take out channels, not {len(narrowing)}: give {narrowing[0].name} once.")
    return next(iter(narrowing), None), tuple(method for method in methods if method not in narrowing)


def _unasked(base: nn.Module, net: Network, data: Batches | None, align: int) -> Method | None:
    """What takes out channels where nothing was asked for.

    How much of the way they should go is decided on samples that no refit saw, of which a few say nothing: with fewer
    than `JUDGED`, hidden units of recurrent layers alone may go.

    Args:
        base: the model.
        net: as it was traced.
        data: calibration batches.
        align: widths are multiples of it, as ranks are.
    """
    judged = can_judge(net.example, data)
    several = align if align > 1 else None
    recurrent = any(layer.kind == "StateLinear" and layer.skip is None for layer in net.layers)
    if judged or recurrent:
        with suppress(TautError):
            coupling = coupled(base, net.example)
            if judged and (coupling.groups or with_heads(base, net.example).groups):
                return Channels(align=several)
            if recurrent and hidden_alone(coupling, base).groups:
                return Channels(hidden=True, align=several)
    return None


def can_judge(example: Example, data: Batches | None) -> bool:
    """Whether plans can be judged on samples enough, of which none is refitted on."""
    enough = sum(example.samples.size(inputs) for inputs, _ in data or ()) >= JUDGED
    return enough and divided(example, data)[0] is not data


def _exact(model: nn.Module, net: Network, methods: list[Method]) -> tuple[nn.Module, Network, tuple[Step, ...]]:
    """Give layers their plain form, do every exact rewrite that makes something smaller, and trace again."""
    model, net, plain = in_plain_form(model, net)
    steps = []
    for layer in net.layers:
        group = Group((layer,))
        for method in methods:
            if layer.skip is None and method.refuses(group) is None:
                steps += [
                    Step(group.names, m.name, settings(m), group, reason="exact", damage=0.0)
                    for m in method.candidates(group, None)
                    if net.allows(layer.name, m.cost(group))
                ]
    done, net, others = carry_exact(model, net, steps)
    return done, net, (*plain, *others)


def _inside(base: nn.Module, step: Step, exact: tuple[Step, ...]) -> Step:
    """The step by the names that its layers have in the base: what `_original_names` undid.

    A layer that an exact step of the plan replaced stands inside of what that built; it may be narrower by then.
    """
    replaced = {name for done in exact for name in done.layers}
    if step.group is None or not replaced & set(step.layers):
        return step

    def place(layer: Layer) -> str:
        if layer.name not in replaced:
            return layer.name
        try:
            return locate(base, layer)
        except CallError:
            inner = base.get_submodule(layer.name).named_modules()
            return next(f"{layer.name}.{path}" for path, m in inner if path and type(m).__name__ == layer.kind)

    layers = tuple(replace(layer, name=place(layer)) for layer in step.group.layers)
    return replace(step, layers=tuple(layer.name for layer in layers), group=Group(layers))


def _original_names(step: Step, exact: tuple[Step, ...]) -> Step:
    """The step by original names: "conv.1", left inside by an exact step, is "conv" to the user.

    What became several layers has none of its own any more: these go by the names that they have.
    """
    if step.group is None:
        return step
    layers = tuple(replace(layer, name=_original_name(layer.name, exact)) for layer in step.group.layers)
    return replace(step, layers=tuple(_original_name(name, exact) for name in step.layers), group=Group(layers))


def _original_name(name: str, exact: tuple[Step, ...]) -> str:
    """The layer that exact steps replaced, of which a layer is what there is; what stands for a weight has its own."""
    layers = [layer for done in exact if done.group is not None for layer in done.group.layers]
    known = {layer.name for layer in layers if layer.weight and not layer.summed}
    return next((one for one in known if name == one or name.startswith(f"{one}.")), name)

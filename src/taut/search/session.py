"""A model with all that plans are made from: many can be cut from one workshop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from taut.core.data import collect
from taut.errors import CallError
from taut.measure import Pace, Stopwatch
from taut.measure.counting import count as count_cost
from taut.methods import choose, settings
from taut.planning.application import apply_plan
from taut.planning.damage_measurement import sensitivity as measure_damage
from taut.planning.plan import Choice, describe, least, solve, survey
from taut.recovery.judging import Judge
from taut.recovery.samples import SAMPLES, refit_samples
from taut.search.joint import JUDGES, Mixer
from taut.search.latency import find_pace, variants
from taut.structure.calling import read_example
from taut.structure.fisher import float_outputs
from taut.structure.observation import observe
from taut.structure.outputs import Outputs
from taut.structure.statistics import Statistics
from taut.structure.surgery import clone, locate, shallow, unwrapped
from taut.structure.tracing import trace
from taut.training.finetuning import Finetune, carry_out
from taut.types import Cost, Group, Layer, Method, Network, Plan, Slimming, Step


@dataclass(frozen=True)
class Workshop:
    """A model with everything that plans are made from; many plans can be cut from one.

    Attributes:
        original: the user's model. base: the same after exact steps (or itself).
        exact: those steps. stats: of `base`, with every decomposition made so far. choices: what can be done.
        data: calibration batches, read once. mixer: finds widths and ranks together, where channels may go, too.
        pace: predicts times, for a budget of latency. watch: checks them.
    """

    original: nn.Module
    base: nn.Module
    network: Network
    exact: tuple[Step, ...]
    stats: Statistics
    choices: tuple[Choice, ...]
    data: list[tuple[Any, Any]] | None
    mixer: Mixer | None = None
    pace: Pace | None = None
    watch: Stopwatch | None = None

    @classmethod
    def open(  # noqa: PLR0913 - the settings of `taut.compress`
        cls,
        model: nn.Module,
        example: Any,
        data: Any,
        methods: Iterable[str | Method] | None,
        *,
        measured: bool = False,
        align: int = 1,
        latency: float | None = None,
    ) -> Workshop:
        """Trace, do what is exact, observe and decompose.

        Args:
            model: as in `taut.compress`.
            example: likewise.
            data: likewise.
            methods: likewise.
            align: likewise.
            measured: whether measured damages take the place of predicted ones.
            latency: share of the original's time that plans are to keep at most; None: nothing is timed.
        """
        chosen, model = choose(methods), bare(model)
        call = read_example(model, example)
        batches = None if data is None else collect(call, data, SAMPLES)
        original = trace(model, call, batches)
        base, net, exact = _exact(model, original, [m for m in chosen if m.exact])
        stats = observe(net, base, batches)
        slim = [m for m in chosen if isinstance(m, Slimming)]
        lossy = [m for m in chosen if not m.exact and not isinstance(m, Slimming)]
        if measured and batches is not None:
            stats = measure_damage(net, base, stats, batches, lossy)
        timed = latency is not None
        choices = tuple(survey(net, stats, lossy, align, timed=timed))
        mixer = Mixer(base, stats, choices, batches, slim, lossy, align, timed=timed) if slim else None
        shop = cls(model, base, original, exact, stats, choices, batches, mixer)
        return shop if latency is None else shop._timed(latency, slim)

    def _timed(self, latency: float, slim: Sequence[Method]) -> Workshop:
        """The same with the pace of its layers, right for plans that keep so much of the time."""
        limits, base = {"latency": latency}, shallow(self.base)
        trial = next(variants(base, self.stats, self.choices, slim), None)
        watch = Stopwatch(shallow(self.original), self.network.example, trial)

        def drafts(pace: Pace) -> Iterator[tuple[float, nn.Module]]:
            if self.mixer is not None:
                self.mixer.pace = pace
                yield from self.mixer.drafts(limits)
            elif (picks := solve(self.stats.network, self.choices, limits, pace)) is not None:
                plan = describe(self.stats.network, self.stats, self.choices, picks)
                yield 0.0, apply_plan(self.base, plan, self.stats)[0]

        pace, off = find_pace(base, self.stats, self.choices, slim, watch, drafts)
        if self.mixer is not None:
            self.mixer.pace, self.mixer.off = pace, off
        return replace(self, pace=pace, watch=watch)

    def within(self, limits: Mapping[str, float]) -> tuple[nn.Module, Plan] | None:
        """The model with the least damage within `limits`; None where no plan is so small."""
        if self.mixer is not None:
            found = self.mixer.within(limits)
            return None if found is None else self._named(*found)
        picks = solve(self.stats.network, self.choices, limits, self.pace)
        return None if picks is None else self.build(picks)

    def ways(self, limits: Mapping[str, float]) -> Iterator[tuple[nn.Module, Plan]]:
        """Models within `limits` by channels, by ranks, and by both in equal parts, as far as these were asked for."""
        if self.mixer is None:
            built = self.within(limits)
            yield from () if built is None else (built,)
        else:
            yield from (self._named(*built) for built in self.mixer.ways(limits))

    def least(self, limits: Mapping[str, float]) -> dict[str, float]:
        """What plans cost at least by the keys of `limits`, as one plan: of the way that comes closest to them."""
        ways = [least(self.stats.network, self.choices, limits, self.pace)]
        if self.mixer is not None:
            ways.append(self.mixer.least(limits))
        return min(ways, key=lambda way: max(way[key] / max(limit, 1e-9) for key, limit in limits.items()))

    def whole(self, key: str) -> float:
        """What the original costs by a key of a budget."""
        return 1.0 if key == "latency" else float(getattr(self.network.cost, key))

    def unchanged(self, *, met: bool = True) -> tuple[nn.Module, Plan]:
        """A bit-equal copy, or the exact steps alone where some were asked for; `met` says whether that is enough."""
        plan = describe(self.stats.network, self.stats, self.choices, [0] * len(self.choices), met=met)
        return clone(self.base), replace(plan, steps=self.exact, before=self.network.cost)

    def without(self, reasons: Mapping[str, str]) -> Workshop:
        """The same, with some layers left alone, for these reasons: what was done to them failed."""
        choices = tuple(choice for choice in self.choices if not set(choice.group.names) & set(reasons))
        if self.mixer is not None:
            self.mixer.leave(reasons)
        stats = replace(self.stats, network=self.stats.network.skipping(reasons))
        return replace(self, choices=choices, stats=stats, network=self.network.skipping(reasons))

    @cached_property
    def judge(self) -> Judge:
        """Samples on which networks near a budget that cannot be met are compared with the original."""
        call, kinds = self.network.example, list(self.stats.kinds)
        if self.data is None:
            outputs = float_outputs(Outputs(self.original, call).run(self.original)[0])
            return Judge(call, self.original, [call.value], ["values"] * len(outputs))
        some = collect(call, self.data, min(JUDGES, refit_samples(self.stats.network)))
        return Judge(call, self.original, [inputs for inputs, _ in some], kinds)

    def _named(self, small: nn.Module, plan: Plan) -> tuple[nn.Module, Plan]:
        """With the exact steps in front, and original names."""
        renamed = tuple(_renamed(step, self.exact) for step in plan.steps)
        return small, replace(plan, steps=(*self.exact, *renamed), before=self.network.cost)

    def build(self, picks: list[int]) -> tuple[nn.Module, Plan]:
        """The model and the full plan for one option per choice."""
        plan = describe(self.stats.network, self.stats, self.choices, picks)
        return self._named(*apply_plan(self.base, plan, self.stats, self.data))

    def trained(self, plan: Plan, wish: Finetune, seed: int) -> tuple[nn.Module, Plan]:
        """The schedule of `wish` carried out from the base, where the exact steps are done already."""
        done = len(self.exact)
        stages = tuple(
            replace(stage, steps=tuple(place - done for place in stage.steps if place >= done))
            for stage in wish.schedule or ()  # type: ignore[union-attr] # resolved by the caller
            if not stage.steps or max(stage.steps) >= done
        )
        inner = replace(plan, steps=tuple(_inside(self.base, step, self.exact) for step in plan.steps[done:]))
        wish = replace(wish, schedule=stages)
        model, found = carry_out(self.base, inner, self.stats, wish, teacher=self.original, seed=seed)
        steps = () if found is None else found.steps
        return model, replace(found or plan, steps=(*self.exact, *(_renamed(step, self.exact) for step in steps)))

    def cost(self, model: nn.Module) -> Cost:
        """Counted cost of a built model."""
        return count_cost(shallow(model), self.network.example)

    def amounts(self, model: nn.Module, keys: Iterable[str]) -> dict[str, float]:
        """What a built model costs by the keys of a budget: counted, and its time measured beside the original's."""
        keys, cost = list(keys), self.cost(model)
        return {key: self._time(model) if key == "latency" else float(getattr(cost, key)) for key in keys}

    def _time(self, model: nn.Module) -> float:
        if self.watch is None:
            raise CallError("This workshop was opened without a clock.")
        return self.watch.share(shallow(model))


def bare(model: nn.Module) -> nn.Module:
    """The model without wrappers.

    Raises:
        CallError: it is no module.
    """
    if not isinstance(model, nn.Module):
        raise CallError(f"The model must be a torch.nn.Module. Got {type(model).__name__} instead.")
    return unwrapped(model)


def _exact(model: nn.Module, net: Network, methods: list[Method]) -> tuple[nn.Module, Network, tuple[Step, ...]]:
    """Do every exact rewrite that makes something smaller, and trace again."""
    steps = []
    for layer in net.layers:
        group = Group((layer,))
        for method in methods:
            if layer.skip is None and method.refuses(group) is None:
                steps += [
                    Step(group.names, m.name, settings(m), group, reason="exact", damage=0.0)
                    for m in method.candidates(group, None)
                ]
    if not steps:
        return model, net, ()
    done, plan = apply_plan(model, Plan(tuple(steps)), observe(net, model))
    return done, trace(done, net.example), plan.steps


def _inside(base: nn.Module, step: Step, exact: tuple[Step, ...]) -> Step:
    """The step by the names that its layers have in the base: what `_renamed` undid.

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


def _renamed(step: Step, exact: tuple[Step, ...]) -> Step:
    """The step by original names: "conv.1", left inside by an exact step, is "conv" to the user."""
    names = {name for done in exact for name in done.layers}

    def original(name: str) -> str:
        return next((known for known in names if name == known or name.startswith(f"{known}.")), name)

    if step.group is None:
        return step
    layers = tuple(replace(layer, name=original(layer.name)) for layer in step.group.layers)
    return replace(step, layers=tuple(original(name) for name in step.layers), group=Group(layers))

"""Recovery without training: every layer, front to back, is solved again on the inputs that it now gets.

One pass of the original notes what each layer should give; one pass of the compressed model stops before each layer,
solves  dW = argmin E|y - (W + dW) x - b|^2 + lambda |dW|^2  in closed form on the compressed model's own inputs x, cuts
the factors again from W + dW, and goes on; lambda is the one that predicts held-out samples best. Batch norms
re-estimate their statistics in the same pass.

In front of a ReLU y is changed, where it is negative, to whatever the layer gives that stays negative, and the layer is
solved again, ROUNDS times: what nobody sees costs nothing. In front of a residual sum y makes up for what the other
branch lost. See `taut.recovery.successors`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from taut.core.example import TautControl
from taut.core.modes import evaluating, generator
from taut.core.progress import Stage, stage
from taut.decompose.linalg import LARGE
from taut.decompose.weighting import Weighting
from taut.methods import resolve, settings
from taut.methods.factorization import Factorization
from taut.nn import LowRankSparse, Rebuilt, Reorder
from taut.recovery.batch_norm import Norm, moved, reestimate
from taut.recovery.passes import merged, passes
from taut.recovery.routing import of_present_rows, routed
from taut.recovery.skip_inputs import Others
from taut.recovery.solving import Moments, least_squares
from taut.recovery.sparse import keep_zeros
from taut.recovery.successors import Follows
from taut.recovery.tail_refit import refit_rest
from taut.recovery.targets import Noted, Target, Targets, solvable, together
from taut.structure.chains import chain_outputs
from taut.structure.collecting import FULL_LIMIT, SKETCH_ROWS, form_of, second_moment, sketched
from taut.structure.coverage import seeded
from taut.structure.narrowing import Cut
from taut.structure.padding import Padding
from taut.structure.patches import (
    fan_in,
    input_rows,
    weight_of,
)
from taut.structure.statistics import LayerStatistics, Statistics
from taut.structure.surgery import locate, shallow, swap
from taut.types import Layer, Looking, Method, Slimming, Step

DUAL_ROWS = 2048
"""Rows of a layer too wide for its full second moment: the dual problem is of this size."""

ENOUGH = 10
"""Rows for every input of a layer from which on it aims anew: fewer are fitted by chance."""

ROUNDS = 3
"""Times that a layer in front of a ReLU aims anew, at what is left to do where the original is negative."""

Link = tuple[Method, Layer]
"""A method, and the layer as the method finds it: the original, or a part of what an earlier method made."""


def recover(
    model: nn.Module,
    small: nn.Module,
    steps: Sequence[Step],
    stats: Statistics,
    data: Any,
    cuts: Mapping[str, Cut] | None = None,
) -> None:
    """Refit every layer of `small` in place, and re-estimate its batch norms.

    Args:
        model: the original.
        small: what `steps` made of it.
        steps: in order.
        stats: for the output weights of the second decomposition, and the layers before their factorization.
        data: calibration batches; as `Noted`, what the original gives on them serves several calls.
        cuts: what is left of layers that lost channels.
    """
    cuts = cuts or {}
    net = stats.network
    chains: dict[str, list[Link]] = {}
    for step in (step for step in steps if not isinstance(resolve(step), Slimming)):
        for layer in (step.group or net.group(step.layers)).layers:
            chains.setdefault(layer.name, []).append((resolve(step), layer))
    cut = {name for name, chain in chains.items() if len(chain) > 1 and any(method.exact for method, _ in chain)}
    # no solution keeps what several layers share, and none is sparse but where all that was done is pruning
    cut |= {
        name
        for name, chain in chains.items()
        if any(m.masks or isinstance(m, Looking) for m, _ in chain) and not _only_pruned(chain)
    }
    gone = removed_layers(steps)
    names = [name for name in solvable(net) if name not in cut | gone]  # compress recovers those on the cut model
    noted = data if isinstance(data, Noted) else Noted(data, net, names)
    targets = noted.of(model, names)
    with stage("refitting", total=len(targets.layers)) as bar:
        copied = shallow(small)  # the same weights, but buffers of its own, which are handed back
        originals = {
            **dict(model.named_modules()),
            **{name: stats.modules[name] for name in cuts if name in stats.modules},
        }
        layers = {name: target.kept(originals[name], cuts.get(name)) for name, target in targets.layers.items()}
        norms = {n: _of_channels(norm, cuts.get(n)) for n, norm in targets.norms.items() if n not in net.kept | gone}
        layers = {n: t if t.norm in {"", *norms} else replace(t, norm="", follows=None) for n, t in layers.items()}
        _Refit(originals, copied, chains, stats, replace(targets, layers=layers, norms=norms)).run(bar)
    for mine, found in zip(small.modules(), copied.modules(), strict=True):
        if isinstance(mine, Reorder | LowRankSparse | Rebuilt) or (
            isinstance(mine, _BatchNorm) and isinstance(mine.running_mean, Tensor)
        ):
            mine.load_state_dict(found.state_dict())


def removed_layers(steps: Sequence[Step]) -> set[str]:
    """The layers that went with blocks: they are not there to be solved again."""
    blocks = (layer.block for step in steps if step.group is not None for layer in step.group.layers)
    return {name for block in blocks if block is not None for name in block.layers}


def _of_channels(norm: Norm, cut: Cut | None) -> Norm:
    return norm if cut is None else (norm[0][cut.outputs], norm[1][cut.outputs])


def _only_pruned(chain: Sequence[Link]) -> bool:
    return bool(chain) and all(method.masks for method, _ in chain)


@dataclass(frozen=True)
class Arrival:
    """What a batch brings to a layer or norm: its input, and the other summand of the layer's output, if any."""

    x: Tensor
    other: Tensor | None = None


class _Enough(TautControl):
    """A batch has been to all points of a pass."""


class _Refit:
    """State of all passes through the compressed model."""

    def __init__(
        self,
        originals: dict[str, nn.Module],
        small: nn.Module,
        chains: dict[str, list[Link]],
        stats: Statistics,
        targets: Targets,
    ) -> None:
        self.originals, self.small, self.chains, self.stats, self.targets = originals, small, chains, stats, targets
        self.norms = dict(targets.norms)
        self.padding = [Padding(stats.network.example, inputs) for inputs in targets.batches]
        aimed = {name: target for name, target in targets.layers.items() if fan_in(originals[name]) <= FULL_LIMIT}
        self.others = Others(small, aimed)
        self.done: set[str] = set()

    def run(self, bar: Stage) -> None:
        """Solve every layer and re-estimate every batch norm, in the order in which they are reached."""
        self.bar = bar
        known = {*self.targets.layers, *self.norms}
        order = [point for point in merged(self.targets.orders) if point in known]
        for points in passes(order, len(self.targets.batches)):
            self.solve_pass(points)

    def solve_pass(self, points: Sequence[str]) -> None:
        """Run all batches up to some layers and norms, and see to these."""
        arrivals: dict[str, dict[int, Arrival]] = {point: {} for point in points}
        alone = len(self.targets.batches) == 1
        for number, inputs in enumerate(self.targets.batches):
            awaited = set(points) & set(self.targets.orders[number])
            if not awaited:
                continue

            def arrive(point: str, x: Tensor, number: int = number, awaited: set[str] = awaited) -> None:
                if point in self.done or number in arrivals[point]:
                    return
                if alone:
                    self.meet(point, {number: self.arrival(point, number, x)})
                    return
                arrivals[point][number] = self.arrival(point, number, x.clone())  # code behind it may write to it
                awaited.discard(point)
                if not awaited:
                    raise _Enough

            self.run_batch(number, inputs, points, arrive)
        for point in points:
            if arrivals[point]:
                self.meet(point, arrivals[point])

    def run_batch(self, number: int, inputs: Any, points: Sequence[str], arrive: Callable[[str, Tensor], None]) -> None:
        """One run of the compressed model, with a look at what comes to some points."""

        def hook(point: str) -> Any:
            def before(_: nn.Module, args: tuple[Any, ...]) -> None:
                if args and isinstance(args[0], Tensor):
                    arrive(point, args[0])

            return before

        handles = self.others.watch()  # the first: a layer's input may be its own other summand
        handles += [self.small.get_submodule(point).register_forward_pre_hook(hook(point)) for point in points]
        try:
            with evaluating(self.small), seeded(number), suppress(_Enough):
                self.stats.network.example.run(self.small, inputs)
        finally:
            for handle in handles:
                handle.remove()
            self.others.held.clear()

    def arrival(self, point: str, number: int, x: Tensor) -> Arrival:
        """What a batch brings to a point, noted while it is there."""
        target = self.targets.layers.get(point)
        if target is None or number not in target.seen:
            return Arrival(x)
        return Arrival(x, self.others.rows(self.originals[point], target, number))

    def meet(self, point: str, arrivals: Mapping[int, Arrival]) -> None:
        """Solve the layer, or re-estimate the norm, with what all batches bring."""
        self.done.add(point)
        module = self.small.get_submodule(point)
        if point in self.norms:
            real = [self.padding[number].of_channels(point, arrival.x) for number, arrival in arrivals.items()]
            reestimate(module, self.norms[point], [arrival.x for arrival in arrivals.values()], real)
            return
        target = self.targets.layers[point].of(arrivals.keys())
        inputs = {number: arrivals[number].x for number in target.seen}
        target = of_present_rows(self.originals[point], target, inputs, always=routed(self.small, point))
        if target.seen:
            self.solve(point, module, target, {number: arrivals[number] for number in target.seen})
        self.bar()

    def solve(self, name: str, module: nn.Module, target: Target, arrivals: Mapping[int, Arrival]) -> None:
        """New weights for one layer, dense or factorized, from its present inputs, batch by batch."""
        original, inputs = self.originals[name], {number: arrival.x for number, arrival in arrivals.items()}
        wide, pruned = fan_in(original) > FULL_LIMIT, self.pruned(name, module)
        if wide and pruned:
            return
        some = target.thinned(DUAL_ROWS) if wide else target
        wanted = noted = some.rows
        centred = isinstance(original.bias, Tensor) or bool(target.norm)
        rows = [input_rows(original, inputs[n], seen.output, seen.index) for n, seen in some.seen.items()]
        moments = Moments.of(together(rows), centred=centred, again=not wide and target.follows is not None)
        if wide or target.follows is None:
            dense = self.fitted(name, module, moments, wanted, centred=centred)
        else:
            dense, wanted = self.aimed(name, module, target, moments, _summand(arrivals), centred=centred)
        if wide and self.approximated(name):
            known = self.stats.layers.get(name, LayerStatistics()).outputs
            refit_rest(dense, inputs, target, known)
        if isinstance(original.bias, Tensor) and (pruned or self.approximated(name)):
            _shift(dense, (wanted.mean(1) - mean_output(original, dense, moments.mean)).flatten())
        state = dense.state_dict()
        if all(bool(torch.isfinite(t).all()) for t in state.values()):
            module.load_state_dict(state)
            if target.norm and wanted is not noted and not wide:
                self.norms[target.norm] = moved(self.norms[target.norm], noted, wanted)

    def fitted(self, name: str, module: nn.Module, moments: Moments, wanted: Tensor, *, centred: bool) -> nn.Module:
        """The layer solved for wanted outputs, and cut as it was before."""
        original = self.originals[name]
        dense = _dense(original, *least_squares(original, moments, wanted, centred=centred))
        if self.pruned(name, module):
            keep_zeros(dense, module, moments)
            return dense
        for link in self.chains.get(name, ()):
            dense = self.factorized(name, dense, link, moments)
        return dense

    def aimed(
        self,
        name: str,
        module: nn.Module,
        target: Target,
        moments: Moments,
        other: Tensor | None,
        *,
        centred: bool,
    ) -> tuple[nn.Module, Tensor]:
        """The same with regard to what follows: outputs to aim at, and the layer solved for them."""
        original = self.originals[name]
        follows = cast(Follows, target.follows)
        wanted = follows.aim(target.rows, other)
        dense = self.fitted(name, module, moments, wanted, centred=centred)
        enough = moments.rows.shape[1] >= ENOUGH * moments.rows.shape[2]
        for _ in range(ROUNDS if follows.rectified and enough else 0):
            present = chain_outputs(original, dense, moments.rows)
            if centred:  # the bias or the batch norm will see to the mean
                present = present - present.mean(1, keepdim=True) + wanted.mean(1, keepdim=True)
            wanted = follows.aim(target.rows, other, present)
            dense = self.fitted(name, module, moments, wanted, centred=centred)
        return dense, wanted

    def pruned(self, name: str, module: nn.Module) -> bool:
        """Whether a layer is what it was but for zeros, of this plan or of an earlier one."""
        chain = self.chains.get(name, ())
        return _only_pruned(chain) or (not chain and not bool(weight_of(module).all()))

    def approximated(self, name: str) -> bool:
        """Whether a factorization left something of the layer out: its mean output then needs its bias."""
        return any(isinstance(method, Factorization) and not method.exact for method, _ in self.chains.get(name, ()))

    def factorized(self, name: str, dense: nn.Module, link: Link, moments: Moments) -> nn.Module:
        """What the method makes of its layer, which stands alone or in the chain that an earlier method made."""
        method, layer = link
        holder = nn.Sequential(dense)
        place = locate(holder, replace(layer, name="0"))
        made = self.factorize(name, holder.get_submodule(place), method, moments)
        swap(holder, holder.get_submodule(place), made)
        return holder[0]

    def factorize(self, name: str, dense: nn.Module, method: Method, moments: Moments) -> nn.Module:
        """Cut the factors again, in the metric of the present inputs and of the original output weights."""
        before = self.stats.layers.get(name, LayerStatistics())
        if method.uses_statistics and fan_in(dense) == moments.rows.shape[-1]:
            now = replace(before, weighting=moment_form(dense, moments))
            known = before.outputs is not None and before.outputs.shape[-1] <= LARGE
            if known and getattr(method, "metric", None) == "data" and "fisher" in getattr(method, "metrics", ()):
                method = resolve(Step((), method.name, settings(method) | {"metric": "fisher"}))
        else:
            now = LayerStatistics()
        once = method.factor_once if isinstance(method, Factorization) else method.factor
        factors = once({name: dense}, {name: now})
        return method.rewrite({name: dense}, factors).modules[name]


def _summand(arrivals: Mapping[int, Arrival]) -> Tensor | None:
    """The other summand at the chosen positions of all batches; None where one does not know it."""
    others = [arrival.other for arrival in arrivals.values()]
    known = [other for other in others if other is not None]
    return together(known) if len(known) == len(others) else None


def mean_output(original: nn.Module, dense: nn.Module, row: Tensor) -> Tensor:
    """Mean output (g, o) of the chain `dense`: a layer is affine, so that is its output for the mean input patch.

    Args:
        original: says how a patch is shaped.
        dense: the linear layers or convolutions that replace it.
        row: (g, 1, c s), the mean unfolded input.
    """
    return chain_outputs(original, dense, row)[:, 0]


def moment_form(module: nn.Module, moments: Moments) -> Weighting:
    """The present input moments in the form that suits the layer's size."""
    form = form_of(module)
    if form == "full" and moments.gram is not None:
        return Weighting(full=moments.gram)
    scaled = moments.rows / moments.rows.shape[1] ** 0.5
    if form == "sketch":
        return Weighting(sketch=sketched(scaled, SKETCH_ROWS, generator(0)))
    return Weighting(**{form: second_moment(module, scaled, form)})


def _dense(original: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The original layer with other values."""
    layer = shallow(original)
    layer.weight = nn.Parameter(weight.reshape(weight_of(original).shape).to(weight_of(original)), requires_grad=False)
    if bias is not None and isinstance(original.bias, Tensor):
        layer.bias = nn.Parameter(bias.to(original.bias), requires_grad=False)
    for attribute in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        getattr(layer, attribute).clear()
    return layer


def _shift(module: nn.Module, error: Tensor) -> None:
    for part in reversed(list(module.modules())):
        if isinstance(part, Reorder):
            error = part.undone(error)
        elif isinstance(bias := getattr(part, "bias", None), Tensor):
            bias.data += error.to(bias)
            return

"""Recovery without training: every layer, front to back, is solved again on the inputs that it now gets.

One pass of the original notes what each layer should give; one pass of the compressed model stops before each layer,
solves  dW = argmin E|y - (W + dW) x - b|^2 + lambda |dW|^2  in closed form on the compressed model's own inputs x, cuts
the factors again from W + dW, and goes on; lambda is the one that predicts held-out samples best. Batch norms
re-estimate their statistics in the same pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from taut.calls import batch_size, collect, evaluating, generator, map_tensors, tensors
from taut.decompose.linalg import LARGE
from taut.decompose.weighting import Weighting
from taut.methods import resolve, settings
from taut.methods.base import Factorization
from taut.nn import LowRankSparse, Rebuilt, Reorder
from taut.progress import Stage, stage
from taut.recovery.rest import ROWS, refit_rest
from taut.recovery.solving import Moments, least_squares
from taut.recovery.sparse import keep_zeros
from taut.structure.collecting import FULL_LIMIT, SKETCH_ROWS, form_of, second_moment, sketched
from taut.structure.narrowing import Cut
from taut.structure.patches import (
    CONVOLUTIONS,
    choose,
    fan_in,
    groups_of,
    input_rows,
    output_rows,
    positions,
    row_budget,
    weight_of,
)
from taut.structure.statistics import LayerStatistics, Statistics
from taut.structure.surgery import locate, shallow, swap
from taut.types import Layer, Looking, Method, Network, Slimming, Step

SAMPLES = 2048
"""Samples of a refit at most."""

ACTIVATION_BYTES = 400 << 20
"""Bytes that the inputs and outputs of the largest layer may take together; bounds the samples of a refit."""

FEW_ROWS = 1024
"""Output positions of that layer below which a sample tells little: then twice as many bytes are allowed."""

ROWS_PER_COLUMN = 40

DUAL_ROWS = 2048
"""Rows of a layer too wide for its full second moment: the dual problem is of this size."""


Norm = tuple[Tensor, Tensor]
"""Mean and variance per channel."""

Link = tuple[Method, Layer]
"""A method, and the layer as the method finds it: the original, or a part of what an earlier method made."""


@dataclass(frozen=True)
class Target:
    """What a layer gave in the original model.

    Attributes:
        index: chosen output positions. rows: (g, n, o), outputs there.
        output: the whole output's shape, on the meta device.
        normalized: whether a batch norm follows directly, which takes care of the mean.
    """

    index: Tensor
    rows: Tensor
    output: Tensor
    normalized: bool = False


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
        data: calibration batches.
        cuts: what is left of layers that lost channels.
    """
    cuts = cuts or {}
    net = stats.network
    batch = joined(collect(net.example, data, refit_samples(net)))
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
    free = [layer for layer in net.layers if layer.skip is None and len(layer.calls) == 1]
    names = [layer.name for layer in free if layer.name not in cut]  # compress recovers those on the cut model
    targets, norms = note_targets(model, net, names, batch)
    with stage("refitting", total=len(targets)) as bar:
        copied = shallow(small)  # the same weights, but buffers of its own, which are handed back
        originals = {
            **dict(model.named_modules()),
            **{name: stats.modules[name] for name in cuts if name in stats.modules},
        }
        targets = {name: _kept(target, originals[name], cuts.get(name)) for name, target in targets.items()}
        norms = {name: _of_channels(norm, cuts.get(name)) for name, norm in norms.items()}
        _run_refit(_Refit(originals, copied, chains, stats, targets), norms, batch, bar)
    for mine, found in zip(small.modules(), copied.modules(), strict=True):
        if isinstance(mine, Reorder | LowRankSparse | Rebuilt) or (
            isinstance(mine, _BatchNorm) and isinstance(mine.running_mean, Tensor)
        ):
            mine.load_state_dict(found.state_dict())


def _kept(target: Target, module: nn.Module, cut: Cut | None) -> Target:
    """What the outputs that are left should give."""
    if cut is None:
        return target
    n = target.rows.shape[1]
    flat = target.rows.transpose(0, 1).reshape(n, -1)[:, cut.outputs.to(target.rows.device)]
    return replace(target, rows=flat.reshape(n, groups_of(module), -1).transpose(0, 1).contiguous())


def _of_channels(norm: Norm, cut: Cut | None) -> Norm:
    return norm if cut is None else (norm[0][cut.outputs], norm[1][cut.outputs])


def refit_samples(net: Network) -> int:
    """max(256, 40 K / T) over the layers, at most 2,048 and what the largest activation allows."""
    free = [layer for layer in net.layers if layer.skip is None and layer.positions]
    wanted, largest, room = 256, 1, ACTIVATION_BYTES
    for layer in free:
        fan = layer.params // max(layer.weight[0], 1)
        wanted = max(wanted, ROWS_PER_COLUMN * fan * layer.batch // layer.positions)
        sizes = [torch.Size(call.input).numel() + torch.Size(call.output).numel() for call in layer.calls]
        size = layer.itemsize * max(sizes) // layer.batch
        if size > largest:
            largest, room = size, ACTIVATION_BYTES * (2 if layer.positions < FEW_ROWS * layer.batch else 1)
    return max(8, min(wanted, SAMPLES, room // max(largest, 1)))


def joined(batches: list[tuple[Any, Any]]) -> Any:
    """All batches whose tensors have the shape of the first, as one batch of inputs."""
    first = batches[0][0]
    size = batch_size(first)
    inner = [t.shape[1:] for t in tensors(first)]
    same = [b for b, _ in batches if [t.shape[1:] for t in tensors(b)] == inner]
    parts = [tensors(b) for b in same]
    merged = iter(
        [
            torch.cat([part[i] for part in parts]) if t.ndim and t.shape[0] == size else t
            for i, t in enumerate(tensors(first))
        ]
    )
    return map_tensors(lambda _: next(merged), first)


def note_targets(
    model: nn.Module, net: Network, names: Sequence[str], batch: Any
) -> tuple[dict[str, Target], dict[str, Norm]]:
    """The original's outputs at chosen positions of every named layer, and what its batch norms see."""
    copied = shallow(model)
    targets: dict[str, Target] = {}
    norms: dict[str, Norm] = {}
    last: list[tuple[str, Tensor]] = []
    seen: dict[str, str] = {}

    def note(name: str, seed: int) -> Any:
        def hook(module: nn.Module, _: Any, output: Tensor) -> None:
            total = positions(module, output)
            rows = row_budget(max(fan_in(module), 1), total, ROWS_PER_COLUMN)
            rows = min(total, ROWS) if fan_in(module) > FULL_LIMIT else rows
            index = choose(total, rows, seed)
            shape = torch.empty(output.shape, device="meta")
            targets[name] = Target(index, output_rows(module, output, index), shape)
            last[:] = [(name, output)]

        return hook

    for seed, name in enumerate(names):
        copied.get_submodule(name).register_forward_hook(note(name, seed), prepend=True)
    for name, module in copied.named_modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            module.register_forward_pre_hook(_note_norm(name, last, seen, norms))
    with evaluating(copied):
        net.example.run(copied, batch)
    for layer in {seen[name] for name in norms} & set(targets):
        targets[layer] = replace(targets[layer], normalized=True)
    return targets, norms


def _note_norm(name: str, last: list[tuple[str, Tensor]], seen: dict[str, str], norms: dict[str, Norm]) -> Any:
    """A hook that notes what a batch norm sees, and which layer's output that is (`last`)."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        follows = last[0][0] if last and args and args[0] is last[0][1] else ""
        if name in seen:  # one set of statistics serves several inputs: leave it alone
            norms.pop(name, None)
        elif args and args[0].numel() > args[0].shape[1]:
            norms[name] = moments_of(args[0])
        seen[name] = follows

    return hook


def _run_refit(refit: _Refit, norms: dict[str, Norm], batch: Any, bar: Stage) -> None:
    handles = []
    for name in refit.targets:
        handles.append(refit.small.get_submodule(name).register_forward_pre_hook(refit.hook(name, bar)))
    for name, norm in norms.items():
        handles.append(refit.small.get_submodule(name).register_forward_pre_hook(reestimate(norm)))
    try:
        with evaluating(refit.small):
            refit.stats.network.example.run(refit.small, batch)
    finally:
        for handle in handles:
            handle.remove()


def reestimate(before: Norm) -> Any:
    """A hook that moves a batch norm's running statistics as far as its input moved, relative to the original's.

    mean' = mean + (m - m0), var' = var v / v0, with m, v of the input that it is about to normalize and m0, v0 of the
    original's on the same samples: what training stored stays, where nothing moved.
    """

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        mean, var = module.running_mean, module.running_var
        same = isinstance(mean, Tensor) and mean.shape == before[0].shape  # an exact step may have made it narrower
        if same and isinstance(mean, Tensor) and isinstance(var, Tensor):
            now = moments_of(args[0])
            stored = mean.double(), var.double()
            tiny = 1e-6 * before[1].mean() + 1e-30
            mean.copy_(stored[0] + now[0] - before[0])
            var.copy_(stored[1] * (now[1] + tiny) / (before[1] + tiny))

    return hook


def moments_of(x: Tensor) -> Norm:
    """Mean and variance of every channel, in float64."""
    wide = x.detach().double()
    axes = [axis for axis in range(x.ndim) if axis != 1]
    return wide.mean(axes), wide.var(axes)


def _only_pruned(chain: Sequence[Link]) -> bool:
    return bool(chain) and all(method.masks for method, _ in chain)


class _Refit:
    """State of one pass through the compressed model."""

    def __init__(
        self,
        originals: dict[str, nn.Module],
        small: nn.Module,
        chains: dict[str, list[Link]],
        stats: Statistics,
        targets: dict[str, Target],
    ) -> None:
        self.originals, self.small, self.chains, self.stats, self.targets = originals, small, chains, stats, targets

    def hook(self, name: str, bar: Stage) -> Any:
        """Solve the layer just before it runs; every layer once."""
        done = False

        def solve(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            nonlocal done
            if done or not args:
                return
            done = True
            self.solve(name, module, args[0])
            bar()

        return solve

    def solve(self, name: str, module: nn.Module, x: Tensor) -> None:
        """New weights for one layer, dense or factorized, from its present input x."""
        original, target = self.originals[name], self.targets[name]
        wide, pruned = fan_in(original) > FULL_LIMIT, self.pruned(name, module)
        if wide and pruned:
            return
        index, wanted = target.index, target.rows
        if wide:
            some = spread(len(index), DUAL_ROWS)
            index, wanted = index[some], wanted[:, some.to(wanted.device)]
        centred = isinstance(original.bias, Tensor) or target.normalized
        moments = Moments.of(input_rows(original, x, target.output, index), centred=centred)
        dense = _dense(original, *least_squares(original, moments, wanted, centred=centred))
        if pruned:
            keep_zeros(dense, module, moments)
        for link in () if pruned else self.chains.get(name, ()):
            dense = self.factorized(name, dense, link, moments)
        if wide and self.approximated(name):
            known = self.stats.layers.get(name, LayerStatistics()).outputs
            refit_rest(dense, x, target.output, target.index, target.rows, known)
        if isinstance(original.bias, Tensor) and (pruned or self.approximated(name)):
            _shift(dense, (wanted.mean(1) - mean_output(original, dense, moments.mean)).flatten())
        state = dense.state_dict()
        if all(bool(torch.isfinite(t).all()) for t in state.values()):
            module.load_state_dict(state)

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
        if method.needs and fan_in(dense) == moments.rows.shape[-1]:
            now = replace(before, weighting=moment_form(dense, moments))
            known = before.outputs is not None and before.outputs.shape[-1] <= LARGE
            if known and getattr(method, "metric", None) == "data" and "fisher" in getattr(method, "metrics", ()):
                method = resolve(Step((), method.name, settings(method) | {"metric": "fisher"}))
        else:
            now = LayerStatistics()
        once = method.factor_once if isinstance(method, Factorization) else method.factor
        factors = once({name: dense}, {name: now})
        return method.rewrite({name: dense}, factors).modules[name]


def spread(total: int, most: int) -> Tensor:
    """At most `most` of `total` places, evenly spread."""
    return torch.linspace(0, total - 1, min(total, most)).round().long()


def mean_output(original: nn.Module, dense: nn.Module, row: Tensor) -> Tensor:
    """Mean output (g, o) of the chain `dense`: a layer is affine, so that is its output for the mean input patch.

    Args:
        original: says how a patch is shaped.
        dense: the linear layers or convolutions that replace it.
        row: (g, 1, c s), the mean unfolded input.
    """
    groups = groups_of(original)
    weight = weight_of(original)
    given = row.reshape(1, groups * weight.shape[1], *weight.shape[2:])
    whole = isinstance(dense, LowRankSparse | Rebuilt)
    for part in [dense] if whole or not list(dense.children()) else dense.children():
        plain = part.to_plain() if isinstance(part, LowRankSparse | Rebuilt) else part
        given = _bare(plain).to(row.dtype)(given)
    return given.reshape(groups, -1)


def _bare(module: nn.Module) -> nn.Module:
    """A convolution that sees one patch: its taps lie side by side, and nothing is padded."""
    copied: Any = shallow(module)
    if not isinstance(module, CONVOLUTIONS):
        return cast(nn.Module, copied)
    axes = len(copied.kernel_size)
    copied.padding, copied.dilation, copied.padding_mode = (0,) * axes, (1,) * axes, "zeros"
    return cast(nn.Module, copied)


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

"""What every layer of the original gives, and has to give in the compressed model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from taut.calls import collect, evaluating
from taut.recovery.following import Following, Follows
from taut.recovery.norms import Norm, moments_of
from taut.recovery.proving import unseen
from taut.recovery.rest import ROWS
from taut.recovery.samples import ROWS_PER_COLUMN, joined, refit_samples
from taut.structure.collecting import FULL_LIMIT
from taut.structure.narrowing import Cut
from taut.structure.patches import CONVOLUTIONS, choose, fan_in, groups_of, output_rows, positions, row_budget
from taut.structure.surgery import shallow
from taut.types import Network

CHECKED = 64
"""Rows on which a batch norm is held against its statistics."""

ALIKE = 0.02
"""Relative error up to which it does what they say; half precision rounds by less."""


@dataclass(frozen=True)
class Target:
    """What a layer gave in the original model.

    Attributes:
        index: chosen output positions. rows: (g, n, o), outputs there.
        output: the whole output's shape, on the meta device.
        norm: the batch norm directly behind it, which takes care of the mean, or "".
        follows: the sum or the ReLU behind it, None where there is none for certain.
    """

    index: Tensor
    rows: Tensor
    output: Tensor
    norm: str = ""
    follows: Follows | None = None

    def kept(self, module: nn.Module, cut: Cut | None) -> Target:
        """For a layer (`module` as it is now) that lost outputs."""
        if cut is None:
            return self
        places = cut.outputs.to(self.rows.device)

        def keep(t: Tensor) -> Tensor:
            flat = t.transpose(0, 1).reshape(t.shape[1], -1)[:, places]
            return flat.reshape(t.shape[1], groups_of(module), -1).transpose(0, 1).contiguous()

        follows = None if self.follows is None else self.follows.narrowed(keep)
        return replace(self, rows=keep(self.rows), follows=follows)


class Noted:
    """Batches, and the targets of one model on them, noted once for all plans that are tried on it.

    Attributes:
        data: the calibration batches.
    """

    def __init__(self, data: Any, net: Network, names: Sequence[str] | None = None) -> None:
        """Nothing is noted yet.

        Args:
            data: calibration batches.
            net: of the model.
            names: layers that will be asked for; None for all that a refit could solve.
        """
        self.data, self.net = data, net
        self.names = solvable(net) if names is None else list(names)
        self._found: tuple[Any, dict[str, Target], dict[str, Norm]] | None = None

    def of(self, model: nn.Module, names: Sequence[str]) -> tuple[Any, dict[str, Target], dict[str, Norm]]:
        """A batch, and what `note_targets` finds on it for some layers."""
        if self._found is None:
            batch = joined(self.net.example, collect(self.net.example, self.data, refit_samples(self.net)))
            self._found = batch, *note_targets(model, self.net, self.names, batch)
        batch, targets, norms = self._found
        return batch, {name: targets[name] for name in names if name in targets}, dict(norms)


def solvable(net: Network) -> list[str]:
    """Layers that a refit can solve: one call, and nothing that forbids a change."""
    return [layer.name for layer in net.layers if layer.skip is None and len(layer.calls) == 1]


def note_targets(
    model: nn.Module, net: Network, names: Sequence[str], batch: Any
) -> tuple[dict[str, Target], dict[str, Norm]]:
    """The original's outputs at chosen positions of every named layer, and what its batch norms see."""
    copied = shallow(model)
    targets: dict[str, Target] = {}

    def rows(name: str, t: Tensor, index: Tensor | None = None) -> Tensor:
        place = targets[name].index if index is None else index
        return output_rows(copied.get_submodule(name), t, place).to(targets[name].rows)

    watch = Following(rows)
    norms = _Norms(watch)
    seeds = {layer.name: place for place, layer in enumerate(net.layers)}
    for name in names:
        layer = copied.get_submodule(name)
        layer.register_forward_pre_hook(_entered(name, watch))
        layer.register_forward_hook(_noted(name, seeds[name], targets, watch, norms), prepend=True)
    for name, module in copied.named_modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            module.register_forward_pre_hook(norms.before(name))
            module.register_forward_hook(norms.behind(name, targets))
    with evaluating(copied), watch:
        watch.returned(net.example.run(copied, batch))
    for name, norm in norms.direct().items():
        targets[name] = replace(targets[name], norm=norm)
    followed = {name: replace(t, follows=_follows(copied, name, watch, t)) for name, t in targets.items()}
    rectified = {n: t.follows for n, t in followed.items() if t.follows is not None and t.follows.rectified}
    for name in rectified.keys() - set(unseen(model, net, batch, rectified)):
        followed[name] = replace(followed[name], follows=rectified[name].seen())
    return followed, norms.found


def _entered(name: str, watch: Following) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            watch.enter(name, args[0])

    return hook


def _noted(name: str, seed: int, targets: dict[str, Target], watch: Following, norms: _Norms) -> Any:
    """A hook that notes outputs of a layer at chosen positions."""

    def hook(module: nn.Module, _: Any, output: Tensor) -> None:
        with watch.looking_away():
            total = positions(module, output)
            rows = row_budget(max(fan_in(module), 1), total, ROWS_PER_COLUMN)
            rows = min(total, ROWS) if fan_in(module) > FULL_LIMIT else rows
            index = choose(total, rows, seed)
            shape = torch.empty(output.shape, device="meta")
            targets[name] = Target(index, output_rows(module, output, index), shape)
            if isinstance(module, CONVOLUTIONS) or output.ndim == 2:  # else a norm's channels are another axis
                norms.last = name, output
            watch.leave(name, output)
            watch.layer(name, output)

    return hook


class _Norms:
    """Batch norms while the original runs: what each saw, and behind which layer it stands."""

    def __init__(self, watch: Following) -> None:
        self.watch, self.found = watch, dict[str, Norm]()
        self.last: tuple[str, Tensor] | None = None
        self._behind: dict[str, str] = {}

    def before(self, name: str) -> Any:
        """A hook that notes what a batch norm sees, and which layer's output that is."""

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if not args:
                return
            with self.watch.looking_away():
                if name in self._behind:  # one set of statistics serves several inputs: leave it alone
                    self.found.pop(name, None)
                elif args[0].numel() > args[0].shape[1]:
                    self.found[name] = moments_of(args[0])
                self._behind[name] = self.last[0] if self.last and args[0] is self.last[1] else ""

        return hook

    def behind(self, name: str, targets: dict[str, Target]) -> Any:
        """A hook that notes what a batch norm gave, if that is what its statistics say and nothing more."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not (args and isinstance(output, Tensor)):
                return
            self.watch.leave(name, output)
            layer = self._behind.get(name)
            if not layer or output.shape != args[0].shape:
                return
            with self.watch.looking_away():
                target = targets[layer]
                few = target.index[:: max(1, len(target.index) // CHECKED)]
                scale, shift = affine(module, target.rows)
                given = self.watch.rows(layer, output, few)
                plain = scale * self.watch.rows(layer, args[0], few) + shift
            if float((given - plain).norm()) <= ALIKE * float(plain.norm()):
                self.watch.norm(name, args[0], output)

        return hook

    def direct(self) -> dict[str, str]:
        """Layer -> the batch norm directly behind it whose statistics can be estimated anew."""
        return {layer: norm for norm, layer in self._behind.items() if layer and norm in self.found}


def _follows(model: nn.Module, name: str, watch: Following, target: Target) -> Follows | None:
    """What the original makes of a layer's output, in numbers."""
    certain = watch.certain(name)
    if certain is None or certain[0].norm not in {"", target.norm} or not target.rows.is_floating_point():
        return None
    trail, rectified = certain
    norm = model.get_submodule(trail.norm) if trail.norm else None
    return Follows(*affine(norm, target.rows), trail.total, trail.partner, rectified)


def affine(norm: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift (g, 1, o) of a batch norm that uses its stored statistics; 1 and 0 without one."""
    groups, _, outputs = rows.shape
    if norm is None:
        return rows.new_ones(groups, 1, outputs), rows.new_zeros(groups, 1, outputs)
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    shift = shift if norm.bias is None else shift + norm.bias.detach().double()
    return scale.to(rows).reshape(groups, 1, outputs), shift.to(rows).reshape(groups, 1, outputs)

"""What calibration says of a network's layers, and every decomposition that was made with it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from taut.decompose.outputs import OutputMoment
from taut.decompose.weighting import Weighting
from taut.nn.answering import read_attributes
from taut.structure.correcting import tried
from taut.structure.outputs import Outputs
from taut.structure.patches import grouped_weight
from taut.types import Group, Layer, Method, Network


@dataclass(frozen=True)
class LayerStatistics:
    """What calibration knows of one layer.

    Attributes:
        weighting: second moment of the unfolded input, summed over positions, mean over samples.
        outputs: the same of the per-sample loss gradient at the output; None without data.
        positions: output positions per sample, T.
        taylor: (o,), mean over samples of |mean over positions of y dL/dy| of each output y; None without data.
        scale: loss per unit of relative output error, for a layer that no gradient reaches.
        held: (g, n, c s), held-out patches with the second moment of all, where `weighting` is of the channels alone.
    """

    weighting: Weighting = field(default_factory=Weighting)
    outputs: OutputMoment | None = None
    positions: float = 1.0
    taylor: Tensor | None = None
    scale: float | None = None
    held: Tensor | None = None

    def narrowed(
        self, outputs: Tensor, inputs: Tensor, sizes: tuple[int, int], modules: tuple[nn.Module, nn.Module]
    ) -> LayerStatistics:
        """Of the layer with fewer channels, as far as they are known.

        Args:
            outputs: kept ones.
            inputs: kept ones, of each group.
            sizes: of outputs and inputs before.
            modules: the layer before and after.
        """
        del modules  # what it gives is not looked at
        weighting, held = self.weighting, self.held
        if len(inputs) < sizes[1] or (len(outputs) < sizes[0] and weighting.groups > 1):
            weighting = weighting.narrowed(outputs, inputs, sizes)
            held = None if held is None else Weighting(sketch=held).narrowed(outputs, inputs, sizes).sketch
        B = self.outputs
        if B is not None and len(outputs) < sizes[0]:
            B = B.narrowed(outputs)
        taylor = None if self.taylor is None else self.taylor[outputs.to(self.taylor.device)]
        return replace(self, weighting=weighting, outputs=B, taylor=taylor, held=held)

    def damage(self, error: Tensor, energy: float) -> Tensor:
        """Predicted damage of squared errors tr(B dW A dW^T).

        With output gradients the Kronecker-factored rise of the loss, error / (2 T); without them (B = I) the error
        relative to the layer's `energy` tr(W A W^T), times `scale` where one was measured.
        """
        if self.outputs is not None:
            return error / (2 * self.positions)
        relative = error / energy if energy > 0 else torch.zeros_like(error)
        return relative * (1.0 if self.scale is None else self.scale)


@dataclass(frozen=True)
class Curve:
    """Measured damage over predicted damage of one layer and method.

    Attributes:
        points: (predicted, measured) pairs, both positive.
    """

    points: tuple[tuple[float, float], ...]

    def __call__(self, predicted: float) -> float:
        """Interpolated in logarithms, made monotone; in proportion outside the measured range."""
        if predicted <= 0:
            return 0.0
        pairs = sorted((p, max(m, 1e-12)) for p, m in self.points if p > 0)
        logs = np.log(np.array(pairs))
        measured = np.maximum.accumulate(logs[:, 1])
        x = math.log(predicted)
        inside = float(np.interp(x, logs[:, 0], measured))
        return math.exp(inside + min(0.0, x - logs[0, 0]) + max(0.0, x - logs[-1, 0]))


@dataclass(frozen=True)
class Statistics:
    """What `observe` returns: per layer the second moments, and every decomposition once it was made.

    Attributes:
        network: the traced network.
        modules: the model's own layers by name (references, not copies).
        layers: statistics by layer name.
        kinds: how each float output of the model was read.
        unit: what damages are measured in.
        samples: calibration samples seen.
        curves: measured damages, where `taut.sensitivity` made them.
        asides: tables and transposed convolutions, which methods of their own rewrite, with what was observed of them.
        real: by the input that is a mask ("" for the user's own), how many positions are real, and of how many.
        looks: what methods over the whole network found out about this very model, where nobody changes it meanwhile,
            as in a search; None where somebody may.
    """

    network: Network
    modules: dict[str, nn.Module]
    layers: dict[str, LayerStatistics]
    kinds: tuple[str, ...] = ()
    unit: str = "relative weight error"
    samples: int = 0
    curves: Mapping[tuple[tuple[str, ...], str], Curve] = field(default_factory=dict)
    real: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    asides: Mapping[str, tuple[nn.Module, LayerStatistics]] = field(default_factory=dict)
    looks: dict[Any, Any] | None = field(default=None, repr=False, compare=False)
    _cache: dict[tuple[tuple[str, ...], str], Any] = field(default_factory=dict, repr=False, compare=False)
    _outputs: dict[tuple[int, int], Outputs] = field(default_factory=dict, repr=False, compare=False)

    def narrowed(
        self, model: nn.Module, layers: Iterable[Layer], cuts: Mapping[str, tuple[Tensor, Tensor]]
    ) -> Statistics:
        """Of the network that has fewer channels: what was observed of those that are left.

        Args:
            model: with the narrower layers in it.
            layers: as they are now.
            cuts: kept outputs and inputs of the layers that lost some.
        """
        now = {layer.name: _answering(layer, model) if layer.name in cuts else layer for layer in layers}
        before = {layer.name: layer for layer in self.network.layers}
        network = replace(
            self.network,
            layers=tuple(now.get(layer.name, layer) for layer in self.network.layers),
            cost=sum((now[n].cost - before[n].cost for n in now if n in before), self.network.cost),
        )
        modules = {name: model.get_submodule(name) if name in cuts else m for name, m in self.modules.items()}

        def left(name: str, stats: LayerStatistics) -> LayerStatistics:
            if name not in cuts:
                return stats
            sizes: Any = before[name].weight[:2]
            return stats.narrowed(*cuts[name], sizes, (self.module(name), model.get_submodule(name)))

        return replace(
            self,
            network=network,
            modules=modules,
            layers={name: left(name, stats) for name, stats in self.layers.items()},
            curves={},
            asides={
                name: (model.get_submodule(name) if name in cuts else module, left(name, stats))
                for name, (module, stats) in self.asides.items()
            },
            looks=None,
            _cache={},
        )

    def leaving(self, shares: Mapping[str, float]) -> Statistics:
        """The same, of a network of which the user wants these shares of layers to stay; 1 leaves one alone."""
        known = self.network.asked
        shares = {name: share for name, share in shares.items() if share > known.get(name, 0.0)}
        return replace(self, network=self.network.leaving(shares)) if shares else self

    def outputs(self, model: nn.Module) -> Outputs:
        """The original's outputs on all inputs that cover its paths so far, run once for all plans."""
        key = id(model), len(self.network.example.witnesses)
        if key not in self._outputs:
            self._outputs.clear()
            self._outputs[key] = Outputs(model, self.network.example)
        return self._outputs[key]

    def module(self, name: str) -> nn.Module:
        """A layer of the model."""
        return self.asides[name][0] if name in self.asides else self.modules[name]

    def seen(self, name: str) -> LayerStatistics:
        """What was observed of a layer; nothing where nothing was."""
        return self.asides[name][1] if name in self.asides else self.layers.get(name, LayerStatistics())

    def factors(self, group: Group, method: Method) -> Any:
        """The decomposition of `group` that `method` cuts its candidates from, made once per method family."""
        key = (group.names, method.family())
        if key not in self._cache:
            modules = {name: self.module(name) for name in group.names}
            stats = {name: self.seen(name) if method.uses_statistics else LayerStatistics() for name in group.names}
            self._cache[key] = method.factor(modules, stats)
        return self._cache[key]

    def damage(self, group: Group, method: Method) -> float:
        """Damage of a resolved method: measured and interpolated where that was done, else predicted."""
        predicted = method.damage(self.factors(group, method)) or 0.0
        curve = self.curves.get((group.names, method.family())) or self._corrected(group, method)
        return predicted if curve is None else curve(predicted)

    def _corrected(self, group: Group, method: Method) -> Curve | None:
        """What held-out patches say of the candidates of a family; None where the prediction needs no judge."""
        stats = self.layers.get(group.names[0])
        if len(group.names) > 1 or stats is None or stats.held is None or method.masks or not method.uses_statistics:
            return None
        key = (group.names, f"{method.family()} on held-out patches")
        if key not in self._cache:
            module = self.modules[group.names[0]]
            pairs = tried(group, method, self.factors(group, method), module, (stats.held, stats.outputs))
            energy = Weighting(sketch=stats.held).energy(grouped_weight(module)) if stats.outputs is None else 0.0
            damages = stats.damage(torch.tensor([error for _, error in pairs], dtype=torch.float64), energy).tolist()
            points = zip((predicted for predicted, _ in pairs), damages, strict=True)
            self._cache[key] = Curve(tuple(points)) if pairs else None
        found: Curve | None = self._cache[key]
        return found

    def __str__(self) -> str:
        """One line: what was seen and how it was read."""
        if not self.samples:
            return "no calibration data: damage is the relative error of the weights"
        parts = [f"{self.samples} samples"]
        parts += [
            f"{name or 'mask'}: {real:,} of {whole:,} positions real" for name, (real, whole) in self.real.items()
        ]
        parts += [f"output read as {', '.join(self.kinds) or 'loss'}", f"damage in units of {self.unit}"]
        return "; ".join(parts)


def _answering(layer: Layer, model: nn.Module) -> Layer:
    """A layer that became narrower, with what other code is told of it now."""
    if not layer.answers:
        return layer
    return replace(layer, answers=read_attributes(model.get_submodule(layer.name), set(layer.answers)))

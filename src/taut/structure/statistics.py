"""`observe`: one calibration pass that says what each layer sees and how much its outputs matter."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from taut.core.data import chunks, collect
from taut.core.example import Example
from taut.core.files import one_line
from taut.core.modes import device_of, evaluating, generator, quietly
from taut.core.nested import fresh
from taut.core.progress import track
from taut.decompose.outputs import OutputMoment
from taut.decompose.weighting import Weighting
from taut.errors import CallError, DataError, ModelError
from taut.structure.collecting import LayerMoments
from taut.structure.correcting import tried
from taut.structure.fisher import Loss, choose_kinds, divergence, float_outputs, sampled_loss
from taut.structure.outputs import Outputs
from taut.structure.patches import grouped_weight
from taut.structure.surgery import shallow, unwrapped
from taut.structure.tracing import covered
from taut.types import Group, Layer, Method, Network

SAMPLES = 1024
"""Calibration samples at most: second moments change little beyond."""


GRAPH_BYTES = 1 << 28
"""Bytes that one backward pass may hold (an estimate: three tensors per layer output, LOSS_COPIES of the model's)."""

LOSS_COPIES = 8
"""Tensors as large as the model's output that the loss on it, its sampled labels and its gradient take."""

HELD_OUT = 1 / 16, 8, 1 / 4
"""Share of the samples that judges the moments of the others; that many at least; and at most this share."""


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

    def narrowed(self, outputs: Tensor, inputs: Tensor, sizes: tuple[int, int]) -> LayerStatistics:
        """Of the layer with fewer channels, as far as they are known.

        Args:
            outputs: kept ones.
            inputs: kept ones, of each group.
            sizes: of outputs and inputs before.
        """
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
    """

    network: Network
    modules: dict[str, nn.Module]
    layers: dict[str, LayerStatistics]
    kinds: tuple[str, ...] = ()
    unit: str = "relative weight error"
    samples: int = 0
    curves: Mapping[tuple[tuple[str, ...], str], Curve] = field(default_factory=dict)
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
        now = {layer.name: layer for layer in layers}
        before = {layer.name: layer for layer in self.network.layers}
        network = replace(
            self.network,
            layers=tuple(now.get(layer.name, layer) for layer in self.network.layers),
            cost=sum((now[n].cost - before[n].cost for n in now if n in before), self.network.cost),
        )
        modules = {name: model.get_submodule(name) if name in cuts else m for name, m in self.modules.items()}
        known = {
            name: stats.narrowed(*cuts[name], before[name].weight[:2]) if name in cuts else stats  # type: ignore[arg-type]
            for name, stats in self.layers.items()
        }
        return replace(self, network=network, modules=modules, layers=known, curves={}, _cache={})

    def outputs(self, model: nn.Module) -> Outputs:
        """The original's outputs on all inputs that cover its paths so far, run once for all plans."""
        key = id(model), len(self.network.example.witnesses)
        if key not in self._outputs:
            self._outputs.clear()
            self._outputs[key] = Outputs(model, self.network.example)
        return self._outputs[key]

    def factors(self, group: Group, method: Method) -> Any:
        """The decomposition of `group` that `method` cuts its candidates from, made once per method family."""
        key = (group.names, method.family())
        if key not in self._cache:
            modules = {name: self.modules[name] for name in group.names}
            stats = {name: self.layers.get(name, LayerStatistics()) for name in group.names}
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
        if len(group.names) > 1 or stats is None or stats.held is None or method.masks or "inputs" not in method.needs:
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
        return (
            f"{self.samples} samples; output read as {', '.join(self.kinds) or 'loss'}; damage in units of {self.unit}"
        )


@quietly
def observe(
    net: Network, model: nn.Module, data: Any = None, *, output: str = "auto", loss: Loss | None = None
) -> Statistics:
    """Second moments of every layer's inputs and loss gradients, from one pass over calibration data.

    Args:
        net: what `trace` found in `model`.
        model: the traced model; it is not changed.
        data: an iterable of batches (inputs, or (inputs, targets)), or one batch; 1,024 samples are used at most.
            None: the weights alone decide.
        output: how the model's output is read: "auto", "logits", "probabilities", "sigmoid" or "values".
        loss: `loss(outputs, targets)` in place of the sampled labels.

    Raises:
        DataError: no batch, a batch of the wrong structure, or values that are not finite.
        CallError: `output` is unknown, `loss` without targets, or `net` is of another model.
    """
    model = unwrapped(model)
    modules = dict(model.named_modules())
    missing = [layer.name for layer in net.layers if layer.skip is None and layer.name not in modules]
    if missing:
        raise CallError(f"The network was traced from another model: this one has no layer '{missing[0]}'.")
    batches = None if data is None else collect(net.example, data, SAMPLES)
    net = net if batches is None else covered(net, model, batches)
    modules = {layer.name: modules[layer.name] for layer in net.layers if layer.skip is None}
    if batches is None:
        return Statistics(net, modules, {})
    if loss is not None and any(targets is None for _, targets in batches):
        raise CallError("A 'loss' needs targets: give calibration batches as (inputs, targets).")
    try:
        return _observe(net, model, modules, batches, _Scalar(output, loss))
    except (RuntimeError, ModelError) as error:
        if loss is not None:
            raise
        why = one_line(error)
    found = _observe(net, model, modules, batches, None)  # fails likewise where the gradient is not to blame
    warnings.warn(
        f"No gradient can be taken through this model, so that damages are errors of the layers' outputs: {why}",
        stacklevel=2,
    )
    return found


class _Scalar:
    """The number whose gradient is taken, and how the first output was read."""

    def __init__(self, output: str, loss: Loss | None) -> None:
        self.wish, self.loss = output, loss
        self.kinds: list[str] = []
        self.generator = generator(1)

    def __call__(self, output: Any, targets: Any, samples: int) -> Tensor | None:
        if not float_outputs(output):
            return None
        if not all(bool(torch.isfinite(t).all()) for t in float_outputs(output)):
            raise DataError("The model's output on the calibration data is not finite: check data and weights.")
        if not self.kinds:
            self.kinds = choose_kinds(output, self.wish)
        if self.loss is None:
            return sampled_loss(output, self.kinds, self.generator)
        value = self.loss(output, targets)
        return value * samples if value.ndim == 0 else value.sum()


def _observe(
    net: Network,
    model: nn.Module,
    modules: dict[str, nn.Module],
    batches: list[tuple[Any, Any]],
    scalar: _Scalar | None,
) -> Statistics:
    """Without a scalar no gradient is taken."""
    samples = sum(net.example.samples.size(inputs) for inputs, _ in batches)
    copied = shallow(model)
    with evaluating(copied), torch.no_grad():
        outputs = sum(t.numel() * t.element_size() for t in float_outputs(net.example.run(copied)))
    moments = {
        name: LayerMoments(copied.get_submodule(name), net[name], samples, seed) for seed, name in enumerate(modules)
    }
    with _capturing(moments), evaluating(copied), torch.set_grad_enabled(scalar is not None):
        parts = _parts(net.example, batches, samples, chunk_size(net, outputs))
        for inputs, targets, held in track(parts, "observing"):
            for m in moments.values():
                m.held = held
            output, size = net.example.run(copied, inputs), net.example.samples.size(inputs)
            value = None if scalar is None else scalar(output, fresh(targets, device_of(copied)), size)
            _backward(value, moments)
    layers = {name: _finished(moments.pop(name)) for name in modules}
    unit = "loss" if any(s.outputs is not None for s in layers.values()) else "relative output error"
    if unit == "loss" and scalar is not None:
        silent = [name for name, s in layers.items() if s.outputs is None]
        layers |= {name: _calibrated(net[name], layers[name], copied, batches[0][0], net, scalar) for name in silent}
    return Statistics(net, modules, layers, () if scalar is None else tuple(scalar.kinds), unit, samples)


def _finished(moments: LayerMoments) -> LayerStatistics:
    weighting, outputs, positions, taylor = moments.finish()
    return LayerStatistics(weighting, outputs, positions, taylor, held=moments.patches())


def chunk_size(net: Network, outputs: int) -> int:
    """Samples that may pass at once for what their gradient needs to stay within GRAPH_BYTES.

    Args:
        net: what `trace` found.
        outputs: bytes of the model's output on the example.
    """
    layers = sum(math.prod(call.output) * layer.itemsize for layer in net.layers for call in layer.calls)
    samples: int = max(1, GRAPH_BYTES * net.example.batch // max(1, 3 * layers + LOSS_COPIES * outputs))
    return samples


def _parts(
    example: Example, batches: list[tuple[Any, Any]], samples: int, size: int
) -> list[tuple[Any, Any, bool | None]]:
    """The samples in chunks of at most `size`, and whether each is held out; None: too few for any to be.

    Whole samples are: positions of one image know of each other. They come from all over the data, for that may be in
    some order.
    """
    least, number, most = HELD_OUT
    share = min(most, max(least, number / samples))
    parts: list[tuple[Any, Any, bool | None]] = []
    due = 0.0
    for inputs, targets in batches:
        whole = example.samples.size(inputs)
        due += share * whole
        out = int(due) if example.divisible else whole * (due >= whole)
        due -= out
        pieces = [((inputs, targets), out > 0)]
        if 0 < out < whole:
            sides = (slice(whole - out), False), (slice(whole - out, whole), True)
            pieces = [
                ((example.samples.cut(inputs, side, whole), example.samples.part(targets, side, whole)), held)
                for side, held in sides
            ]
        parts += [(*chunk, held) for piece, held in pieces for chunk in chunks(example, [piece], size)]
    return parts if any(held for *_, held in parts) else [(*chunk, None) for *chunk, _ in parts]


def _backward(value: Tensor | None, moments: dict[str, LayerMoments]) -> None:
    """Gradients of the scalar at every captured output; nothing is accumulated in any parameter."""
    taken = [(m, t) for m in moments.values() for t in m.take_outputs()]
    if value is None or not value.requires_grad or not taken:
        return
    if not bool(torch.isfinite(value)):
        raise DataError("The loss on the calibration data is not finite: check the data and the model's output.")
    grads = torch.autograd.grad(value, [t for _, t in taken], allow_unused=True)
    for (m, t), grad in zip(taken, grads, strict=True):
        if grad is not None:
            m.add_gradient(grad, t)


@contextmanager
def _capturing(moments: dict[str, LayerMoments]) -> Iterator[None]:
    """Hooks that hand inputs and outputs to the moments; outputs are cloned, for in-place ReLUs that follow."""

    def hook(m: LayerMoments) -> Callable[..., Tensor]:
        def record(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x, y = args[0], output
            with torch.inference_mode(False):  # a forward may be decorated with it
                m.add_input(*(t.clone() if t.is_inference() else t for t in (x, y)))
            if not torch.is_grad_enabled() or y.is_inference():
                return y
            kept = y if y.requires_grad else y.detach().requires_grad_()
            m.outputs.append(kept)
            return kept.clone()

        return record

    handles = [m.module.register_forward_hook(hook(m), prepend=True) for m in moments.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _calibrated(
    layer: Layer, stats: LayerStatistics, copied: nn.Module, inputs: Any, net: Network, scalar: _Scalar
) -> LayerStatistics:
    """Measure what a relative output error of 0.1 at a layer without gradient does to the model's output."""
    noise, share = generator(2), 0.1

    def disturb(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        rms = output.float().square().mean().sqrt()
        disturbed: Tensor = output + (torch.randn(output.shape, generator=noise).to(output) * rms * share**0.5).to(
            output.dtype
        )
        return disturbed

    with evaluating(copied), torch.no_grad():
        before = net.example.run(copied, inputs)
        handle = copied.get_submodule(layer.name).register_forward_hook(disturb)
        after = net.example.run(copied, inputs)
        handle.remove()
    scale = divergence(scalar.kinds, before, after) / share if scalar.kinds else 1.0
    return replace(stats, outputs=None, scale=scale)

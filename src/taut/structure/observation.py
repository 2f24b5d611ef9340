"""`observe`: one calibration pass that says what each layer sees and how much its outputs matter."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from taut.core.arguments import expect
from taut.core.data import chunks, collect
from taut.core.example import Example, Mask
from taut.core.files import one_line
from taut.core.modes import device_of, evaluating, generator, quietly
from taut.core.nested import fresh
from taut.core.progress import track
from taut.core.showing import shown
from taut.core.tensors import describe
from taut.core.user_code import call
from taut.errors import CallError, DataError, ModelError
from taut.structure.answers import Output, Wish, answers_of
from taut.structure.asides import AsideMoments
from taut.structure.calling import read_example
from taut.structure.collecting import LayerMoments
from taut.structure.fisher import Loss, divergence, sampled_loss
from taut.structure.kinds import choose_kinds, look_at
from taut.structure.masks import settle
from taut.structure.padding import Padding, real_share, tallied
from taut.structure.pooling import pooled_groups, pooled_statistics
from taut.structure.statistics import LayerStatistics, Statistics
from taut.structure.support import is_looked_at
from taut.structure.surgery import shallow
from taut.structure.tracing import covered
from taut.structure.wrappers import unwrapped
from taut.types import Layer, Network

SAMPLES = 1024
"""Calibration samples at most: second moments change little beyond."""


GRAPH_BYTES = 1 << 28
"""Bytes that one backward pass may hold (an estimate: three tensors per layer output, LOSS_COPIES of the model's)."""

LOSS_COPIES = 8
"""Tensors as large as the model's output that the loss on it, its sampled labels and its gradient take."""

HELD_OUT = 1 / 16, 8, 1 / 4
"""Share of the samples that judges the moments of the others; that many at least; and at most this share."""


@shown
@quietly
def observe(  # noqa: PLR0913 - the call is documented with these
    net: Network,
    model: nn.Module,
    data: Any = None,
    *,
    output: Output = "auto",
    mask: Mask = None,
    loss: Loss | None = None,
    progress: bool | None = None,  # noqa: ARG001 - read by the decorator
) -> Statistics:
    """Second moments of every layer's inputs and loss gradients, from one pass over calibration data.

    Args:
        net: what `trace` found in `model`.
        model: the traced model; it is not changed.
        data: an iterable of batches (inputs, or (inputs, targets)), or one batch; 1,024 samples are used at most.
            None: the weights alone decide.
        output: what of the model's output counts, and how it is read: "auto", "logits", "probabilities", "sigmoid" or
            "values"; the name, number or dotted path of a part, "part:kind", or a function that picks the part. By
            itself it is all but caches, losses and inner states, and the kind is found as in
            `taut.structure.kinds.Look`: by targets, names, values, shapes.
        mask: the name of an input that is true, or not 0, where a position is real, or a function of the inputs that
            gives such a tensor (samples, positions); None: inputs called attention_mask, or *padding_mask, which are
            true at padding. Padded positions count nowhere.
        loss: `loss(outputs, targets)` in place of the sampled labels.
        progress: None: shown on a terminal or in a notebook, once it takes long; True: at once; False: not at all.

    Raises:
        DataError: no batch, a batch of the wrong structure, or values that are not finite.
        CallError: `output` is unknown, `loss` without targets, or `net` is of another model.
    """
    expect(net, Network, "taut.trace(model, example)")
    model = unwrapped(model)
    modules = dict(model.named_modules())
    missing = [layer.name for layer in net.layers if layer.skip is None and layer.name not in modules]
    if missing:
        raise CallError(f"The network was traced from another model: this one has no layer '{missing[0]}'.")
    example = read_example(model, net.example, output, mask)
    net = net if example is net.example else replace(net, example=example)
    batches = None if data is None else collect(net.example, data, SAMPLES)
    if batches:
        settle(model, net.example, batches[0][0])
    net = net if batches is None else covered(net, model, batches)
    aside = {layer.name: modules[layer.name] for layer in net.layers if is_looked_at(layer)}
    modules = {layer.name: modules[layer.name] for layer in net.layers if layer.skip is None}
    if batches is None:
        return Statistics(net, modules, {}, asides={name: (m, _unseen(net[name])) for name, m in aside.items()})
    if loss is not None and any(targets is None for _, targets in batches):
        raise CallError("A 'loss' needs targets: give calibration batches as (inputs, targets).")
    try:
        return _observe(net, model, (modules, aside), batches, _Scalar(model, net.example, loss))
    except (RuntimeError, ModelError) as error:
        if loss is not None:
            raise
        why = one_line(error)
    statistics = _observe(
        net, model, (modules, aside), batches, None
    )  # fails likewise where the gradient is not to blame
    warnings.warn(
        f"No gradient can be taken through this model, so that damages are errors of the layers' outputs: {why}",
        stacklevel=2,
    )
    return statistics


class _Scalar:
    """The number whose gradient is taken, and how the first output was read."""

    def __init__(self, model: nn.Module, example: Example, loss: Loss | None) -> None:
        self.model, self.example, self.loss = model, example, loss
        self.kinds: list[str] = []
        self.generator = generator(1)

    def __call__(self, output: Any, inputs: Any, targets: Any) -> Tensor | None:
        answers = answers_of(self.example, output, inputs)
        if not answers.tensors:
            return None
        if not all(bool(torch.isfinite(t).all()) for t in answers.tensors):
            raise DataError("The model's output on the calibration data is not finite: check data and weights.")
        if not self.kinds:
            wish = self.example.output or Wish()
            self.kinds = choose_kinds(answers, wish.kind, look_at(self.model, self.example, inputs, targets))
        if self.loss is None:
            return sampled_loss(answers, self.kinds, self.generator)
        value = call("loss", self.loss, output, targets)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise DataError(
                f"loss returned {describe(value)}: return a tensor, one number that is a mean over the samples, or one "
                "for each."
            )
        return value * self.example.samples.size(inputs) if value.ndim == 0 else value.sum()


def _observe(
    net: Network,
    model: nn.Module,
    sides: tuple[dict[str, nn.Module], dict[str, nn.Module]],
    batches: list[tuple[Any, Any]],
    scalar: _Scalar | None,
) -> Statistics:
    """Without a scalar no gradient is taken; `sides` are the layers that all methods take, and those set aside."""
    modules, aside = sides
    samples = sum(net.example.samples.size(inputs) for inputs, _ in batches)
    copied = shallow(model)
    with evaluating(copied), torch.no_grad():
        counting = answers_of(net.example, net.example.run(copied)).tensors
        outputs = sum(t.numel() * t.element_size() for t in counting)
    real = real_share(net.example, batches)
    moments = {
        name: LayerMoments(copied.get_submodule(name), net[name], samples, seed, real(net[name]))
        for seed, name in enumerate(modules)
    }
    others: dict[str, LayerMoments | AsideMoments] = {
        name: LayerMoments(copied.get_submodule(name), net[name], samples, seed, real(net[name]))
        if isinstance(module, nn.Linear)
        else AsideMoments(copied.get_submodule(name), net[name], samples)
        for seed, (name, module) in enumerate(aside.items(), len(modules))
        if net[name].calls
    }
    every: dict[str, LayerMoments | AsideMoments] = {**moments, **others}
    with _capturing(every), evaluating(copied), torch.set_grad_enabled(scalar is not None):
        parts = _parts(net.example, batches, samples, chunk_size(net, outputs))
        for inputs, targets, held in track(parts, "observing"):
            padding = Padding(net.example, inputs)
            for m in every.values():
                m.held, m.padding = held, padding
            output = net.example.run(copied, inputs)
            value = None if scalar is None else scalar(output, inputs, fresh(targets, device_of(copied)))
            _backward(value, every)
    layers = pooled_statistics(model, {name: _finished(moments.pop(name)) for name in modules}, samples)
    seen = {name: _finished(others.pop(name)) for name in aside if name in others}
    unit = "loss" if any(s.outputs is not None for s in (*layers.values(), *seen.values())) else "relative output error"
    if unit == "loss" and scalar is not None:
        for known in (layers, seen):
            silent = [name for name, s in known.items() if s.outputs is None]
            known |= {name: _calibrated(net[name], known[name], copied, batches[0][0], net, scalar) for name in silent}
    kinds = () if scalar is None else tuple(scalar.kinds)
    asides = {name: (aside[name], seen.get(name) or _unseen(net[name])) for name in aside}
    tally = tallied(net.example, batches)
    return Statistics(net, modules, layers, kinds, unit, samples, real=tally, asides=asides)


def _unseen(layer: Layer) -> LayerStatistics:
    """What is known of a layer without data; what is never called loses nothing, whatever becomes of it."""
    return LayerStatistics() if layer.calls else LayerStatistics(scale=0.0)


def _finished(moments: LayerMoments | AsideMoments) -> LayerStatistics:
    if isinstance(moments, AsideMoments):
        return moments.finish()
    weighting, outputs, positions, taylor = moments.finish()
    known = LayerStatistics(weighting, outputs, positions, taylor, held=moments.patches())
    if moments.met is None:
        return known
    return pooled_groups(known, moments.met.tolist(), moments.moved.tolist(), moments.samples)


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
                (
                    (example.samples.cut(inputs, side, whole), example.samples.part_of_targets(targets, side, whole)),
                    held,
                )
                for side, held in sides
            ]
        parts += [(*chunk, held) for piece, held in pieces for chunk in chunks(example, [piece], size)]
    return parts if any(held for *_, held in parts) else [(*chunk, None) for *chunk, _ in parts]


def _backward(value: Tensor | None, moments: Mapping[str, LayerMoments | AsideMoments]) -> None:
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
def _capturing(moments: Mapping[str, LayerMoments | AsideMoments]) -> Iterator[None]:
    """Hooks that hand inputs and outputs to the moments; outputs are cloned, for in-place ReLUs that follow."""

    def hook(m: LayerMoments | AsideMoments) -> Callable[..., Tensor]:
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
    before, after = (answers_of(net.example, output, inputs) for output in (before, after))
    scale = divergence(scalar.kinds, before, after) / share if scalar.kinds else 1.0
    return replace(stats, outputs=None, scale=scale)

"""Narrower layers: what is left of each, and whether the network around them still computes the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from taut.core.example import Example, TautControl
from taut.core.modes import evaluating
from taut.core.tensors import tensors
from taut.errors import ModelError
from taut.nn import Pick, StateLinear
from taut.structure.patches import groups_of, weight_of
from taut.structure.sameness import finite, outputs_match

Trail = dict[str, list[Tensor]]
"""What every layer gave for a probe, call by call; the model's own output is under ""."""


@dataclass(frozen=True, eq=False)
class Cut:
    """What is left of a layer.

    Attributes:
        outputs, inputs: indices of the kept ones.
        pick: which of the channels that arrive are kept, where these are more than `inputs`; None: all that arrive.
        bias: (all outputs,), with the constants of dead inputs in it; None: as it was.
        live: which of `outputs` somebody reads: one that nobody reads stays where a layer would be left without any.
    """

    outputs: Tensor
    inputs: Tensor
    pick: Tensor | None = None
    bias: Tensor | None = None
    live: Tensor | None = None

    @property
    def widths(self) -> tuple[int, int, int]:
        """Outputs, inputs, and 1 where a `Pick` stands before the layer."""
        return len(self.outputs), len(self.inputs), int(self.pick is not None)


def composed(first: Mapping[str, Cut], then: Mapping[str, Cut]) -> dict[str, Cut]:
    """Two cuts one after the other, in indices of the layers before the first."""
    both = {
        name: Cut(first[name].outputs[cut.outputs], first[name].inputs[cut.inputs]) if name in first else cut
        for name, cut in then.items()
    }
    return {**first, **both}


def channel_axis(layer: nn.Module, x: Tensor) -> int:
    """The axis of an input or output of a layer on which its channels lie."""
    return x.ndim - max(weight_of(layer).ndim - 2, 0) - 1


def left_of(module: nn.Module, cut: Cut) -> dict[str, Tensor]:
    """The tensors of the narrower layer by name: slices, but for a bias that took something over."""
    own = {**module._parameters, **module._buffers}
    held = {key: t.detach() for key, t in own.items() if t is not None}
    if cut.bias is not None:
        held["bias"] = cut.bias.to(held["bias"])
    kept = held.pop("kept", None) if isinstance(module, StateLinear) else None
    left = {key: _part(module, t, cut) for key, t in held.items()}
    if isinstance(module, StateLinear):
        left["kept"] = cut.inputs if kept is None else kept.index_select(0, cut.inputs.to(kept.device))
    return left


def _part(module: nn.Module, t: Tensor, cut: Cut) -> Tensor:
    if t.ndim == 0:
        return t.clone()
    outputs, inputs = cut.outputs.to(t.device), cut.inputs.to(t.device)
    if isinstance(module, nn.Embedding):
        return t.index_select(1, outputs)
    if isinstance(module, _ConvTransposeNd) and t.ndim > 1:
        grouped = groups_of(module) > 1
        return t.index_select(0, outputs) if grouped else t.index_select(1, outputs).index_select(0, inputs)
    rows = t.index_select(0, outputs)
    read = t.ndim > 1 and len(inputs) < t.shape[1] == weight_of(module).shape[1]
    return rows.index_select(1, inputs) if read else rows


def narrowed(model: nn.Module, cuts: Mapping[str, Cut]) -> nn.Module:
    """`model` itself, its layers cut in place: to be run and thrown away."""
    for name, cut in cuts.items():
        module = model.get_submodule(name)
        for key, t in left_of(module, cut).items():
            if key in module._parameters:
                module._parameters[key] = nn.Parameter(t, requires_grad=False)
            else:
                module._buffers[key] = t
        if cut.pick is not None:
            pick = Pick(cut.pick, weight_of(module).ndim - 2).to(weight_of(module).device)
            module.register_forward_pre_hook(_before(pick))
    return model


def _before(pick: Pick) -> Any:
    return lambda _, args: (pick(args[0]), *args[1:])


def trail(model: nn.Module, example: Example, probe: Any, names: Sequence[str]) -> Trail | None:
    """What the named layers and the model give for the probe; None where it cannot run, or gives nothing finite."""
    found: Trail = {name: [] for name in names}

    def note(name: str) -> Any:
        return lambda _, __, output: found[name].extend(t.clone() for t in tensors(output))

    try:
        with _hooked(model, {name: note(name) for name in names}), torch.no_grad():
            found[""] = tensors(example.run(model, probe))
    except ModelError:
        return None
    return found if finite(found[""]) else None


class Departure(NamedTuple):
    """Where a narrowed model begins to compute something else.

    Attributes:
        layer: "" where nothing says which one.
        end: "in": what it reads is to blame; "out": the model raises behind it.
    """

    layer: str
    end: Literal["in", "out"] = "in"


class _Departed(TautControl):
    """A layer gave something else than before."""


def departure(
    model: nn.Module, example: Example, probe: Any, before: Trail, cuts: Mapping[str, Cut]
) -> Departure | None:
    """The first layer of the narrowed model that does not give what is left of what it gave; None where all do.

    Compared while it runs, which ends there, so that no second trail is held.

    Args:
        model: narrowed.
        example: how it is called.
        probe: what it is called with.
        before: what the layers of the original gave for the probe.
        cuts: what is left of every layer that is not as it was.
    """
    calls: Counter[str] = Counter()
    reached = Departure("")

    def enter(name: str) -> Any:
        def hook(*_: Any) -> None:
            nonlocal reached
            reached = Departure(name)

        return hook

    def compare(name: str) -> Any:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            nonlocal reached
            new = tensors(output)
            old = before[name][calls[name] : calls[name] + len(new)]
            calls[name] += len(new)
            cut = cuts.get(name)
            if cut is not None and cut.live is not None:  # the outputs that somebody reads
                live = cut.live.nonzero().flatten()
                old, new = _of(module, old, cut.outputs[live]), _of(module, new, live)
            if not outputs_match(old, new):
                raise _Departed
            reached = Departure(name, "out")

        return hook

    names = [name for name in before if name]
    entering = [model.get_submodule(name).register_forward_pre_hook(enter(name)) for name in names]
    try:
        with _hooked(model, {name: compare(name) for name in names}), torch.no_grad():
            outputs = tensors(example.run(model, probe))
    except (_Departed, ModelError):
        return reached
    finally:
        for handle in entering:
            handle.remove()
    missed = next((name for name in names if calls[name] != len(before[name])), None)
    if missed is not None:
        return Departure(missed)
    return None if outputs_match(before[""], outputs) else Departure("")


@contextmanager
def _hooked(model: nn.Module, hooks: Mapping[str, Any]) -> Iterator[None]:
    """The model in eval mode, with forward hooks."""
    handles = [model.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        with evaluating(model):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _of(layer: nn.Module, outputs: list[Tensor], index: Tensor) -> list[Tensor]:
    """Some channels of what a layer gave."""
    return [t.index_select(channel_axis(layer, t), index.to(t.device)) for t in outputs]

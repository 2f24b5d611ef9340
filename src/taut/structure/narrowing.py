"""Narrower layers: what is left of each, and whether the network around them still computes the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from taut.calls import Example, evaluating, tensors
from taut.errors import ModelError
from taut.nn import Pick
from taut.structure.patches import weight_of
from taut.structure.sameness import alike

Trail = dict[str, list[Tensor]]
"""What every layer gave, call by call; the model's own output is under ""."""


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


def channel_axis(layer: nn.Module, x: Tensor) -> int:
    """The axis of an input or output of a layer on which its channels lie."""
    return x.ndim - max(weight_of(layer).ndim - 2, 0) - 1


def left_of(module: nn.Module, cut: Cut) -> dict[str, Tensor]:
    """The tensors of the narrower layer by name: slices, but for a bias that took something over."""
    own = {**module._parameters, **module._buffers}
    held = {key: t.detach() for key, t in own.items() if t is not None}
    if cut.bias is not None:
        held["bias"] = cut.bias.to(held["bias"])
    found = {key: t.index_select(0, cut.outputs.to(t.device)) if t.ndim else t.clone() for key, t in held.items()}
    if found["weight"].ndim > 1:
        found["weight"] = found["weight"].index_select(1, cut.inputs.to(found["weight"].device))
    return found


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


def trail(model: nn.Module, example: Example, probes: list[Any], names: Sequence[str]) -> Trail | None:
    """What the named layers and the model give for the probes; None where it cannot run."""
    found: Trail = {name: [] for name in ("", *names)}

    def note(name: str) -> Any:
        return lambda _, __, output: found[name].extend(t.clone() for t in tensors(output))

    for name in names:
        model.get_submodule(name).register_forward_hook(note(name))
    try:
        with evaluating(model), torch.no_grad():
            for probe in probes:
                found[""] += tensors(example.run(model, probe))
    except ModelError:
        return None
    return found


def same(model: nn.Module, before: Trail, after: Trail, cuts: Mapping[str, Cut]) -> bool:
    """Whether all that is left computes what it did."""
    for name, old in before.items():
        cut = cuts.get(name)
        live = None if cut is None or cut.live is None else cut.live.nonzero().flatten()
        if cut is None or live is None:
            if not alike(old, after[name]):
                return False
        elif not alike(_of(model, name, old, cut.outputs[live]), _of(model, name, after[name], live)):
            return False
    return True


def _of(model: nn.Module, name: str, outputs: list[Tensor], index: Tensor) -> list[Tensor]:
    """Some channels of what a layer gave."""
    layer = model.get_submodule(name)
    return [t.index_select(channel_axis(layer, t), index.to(t.device)) for t in outputs]

"""Running the example under observation: which layers are called how, and which are used behind their back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from taut.calls import Example, evaluating, map_tensors, tensors
from taut.errors import ModelError
from taut.structure.patches import weight_of
from taut.structure.surgery import shallow, swap
from taut.types import Invocation


def record_calls(model: nn.Module, example: Example) -> tuple[dict[str, list[Invocation]], set[str]]:
    """Every call of every module while the example runs, by module name; and the modules called with keywords only."""
    copied = shallow(model)
    calls: dict[str, list[Invocation]] = defaultdict(list)
    keywords: set[str] = set()

    def hook(name: str) -> Any:
        def record(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given, made = tensors((args, kwargs)), tensors(output)
            if given and made and not tensors(args):
                keywords.add(name)
            if given and made:
                calls[name].append(Invocation(tuple(given[0].shape), tuple(made[0].shape)))

        return record

    for name, module in copied.named_modules():
        module.register_forward_hook(hook(name), with_kwargs=True)
    with evaluating(copied):
        example.run(copied)
    return calls, keywords


class Probe(nn.Module):
    """Stands in for a layer: forwards to it, and notes when somebody reads one of its attributes.

    A replacement will not have those attributes (`self.fc.weight`, `conv.stride`), so the layer must stay.
    """

    def __init__(self, inner: nn.Module) -> None:
        """Wrap `inner`."""
        super().__init__()
        self.inner = inner
        self.read: set[str] = set()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer computes."""
        return self.inner(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Attributes of the wrapped layer, noted."""
        modules = self.__dict__.get("_modules", {})
        if name == "inner":
            return modules["inner"]
        value = getattr(modules["inner"], name)
        self.read.add(name)
        return value


def read_by_others(model: nn.Module, example: Example, names: list[str]) -> dict[str, str]:
    """The layers of which other code reads an attribute while the example runs, and one such attribute.

    No hooks are attached, so fused fast paths (torch's TransformerEncoderLayer) run as they do for the user.
    """
    copied = shallow(model)
    probes: dict[str, Probe] = {}
    for name in names:
        inner = copied.get_submodule(name)
        probes[name] = Probe(inner)
        swap(copied, inner, probes[name])
    with evaluating(copied):
        try:
            example.run(copied)
        except ModelError:
            return {}  # code that checks types; the forward pass after each rewrite will tell
    return {name: min(probe.read) for name, probe in probes.items() if probe.read}


def live_ranges(model: nn.Module, example: Example, names: list[str]) -> dict[str, list[Tensor]]:
    """Per convolution and kernel axis: a mask over the input's extent, True where it can differ from zero.

    A run on NaN marks everything that depends on the input; what stays zero there, on the example and on noise, is
    padding that the model adds itself. Nothing is claimed for inputs that are not floating point.
    """
    if not all(t.is_floating_point() for t in tensors(example.value)):
        return {}
    noise = torch.Generator().manual_seed(0)
    runs = (
        example.value,
        map_tensors(lambda t: torch.full_like(t, float("nan")), example.value),
        map_tensors(lambda t: torch.randn(t.shape, generator=noise).to(t), example.value),
    )
    found: dict[str, list[Tensor]] = {}
    for inputs in runs:
        try:
            masks = _nonzero_extents(model, example, inputs, names)
        except ModelError:
            return {}
        for name, axes in masks.items():
            old = found.get(name, axes)
            if any(a.shape != b.shape for a, b in zip(old, axes, strict=True)):
                return {}
            found[name] = [a | b for a, b in zip(old, axes, strict=True)]
    return found


def _nonzero_extents(model: nn.Module, example: Example, inputs: Any, names: list[str]) -> Mapping[str, list[Tensor]]:
    copied = shallow(model)
    extents: dict[str, list[Tensor]] = {}

    def hook(name: str, axes: int) -> Any:
        def record(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            used = args[0].detach() != 0  # NaN differs from zero
            masks = [used.movedim(-axes + axis, 0).flatten(1).any(1) for axis in range(axes)]
            old = extents.setdefault(name, masks)
            extents[name] = [
                a | b if a.shape == b.shape else torch.ones_like(b) for a, b in zip(old, masks, strict=True)
            ]

        return record

    for name in names:
        module = copied.get_submodule(name)
        module.register_forward_pre_hook(hook(name, weight_of(module).ndim - 2))
    with evaluating(copied):
        example.run(copied, inputs)
    return extents

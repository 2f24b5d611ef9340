"""Whether a network computes the same, and trains the same, with layers in the place of weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taut.core.example import Example
from taut.core.modes import device_of, evaluating, generator
from taut.core.tensors import tensors
from taut.errors import ModelError
from taut.structure.coverage import seeded
from taut.structure.product_uses import Multiplied, Where, as_product, matrix_of
from taut.structure.sameness import IN_FLOAT64, IN_OTHER_LAYERS, few, finite, outputs_match, outputs_of, probes_of
from taut.structure.surgery import hold, part, shallow

Ran = tuple[list[Tensor], list[Tensor] | None]
"""Outputs, and what is seen of gradients."""


class Proof:
    """The network with layers in the place of weights against the network as it is.

    In float64, on random inputs; in its own dtype, on the example and what takes other paths, where some operation of
    it, such as torch's grouped products, knows no float64. Under autocast it has to run as the network does,
    with outputs of the same dtypes.

    It holds one copy of the network in float64 at a time, and one gradient: of each what it gives for a random vector
    is enough to tell two apart.
    """

    def __init__(self, model: nn.Module, example: Example, where: Where, found: Mapping[str, Multiplied]) -> None:
        """`where` are the parameters, `found` what layers there are to be in their places."""
        self.model, self.example, self.where, self.found = model, example, where, found
        self.wide, self.probes = True, probes_of(example) if found else []
        self.wanted = self._ran({}) if found else None
        if found and self.wanted is None:
            self.wide, self.probes = False, [example.value, *example.paths]
            self.wanted = self._ran({})
        self.cast = self._kinds({}) if found else None

    def same(self, names: Sequence[str]) -> bool:
        """Whether outputs and gradients are the same with layers in the place of all of these."""
        if not names:
            return True
        if self.wanted is None:
            return False
        outputs, gradients = self.wanted
        layers = {name: self.found[name] for name in names}
        if self.cast is not None and self._kinds(layers) != self.cast:
            return False
        present = self._ran(layers)
        tolerance = IN_FLOAT64 if self.wide else IN_OTHER_LAYERS
        if present is None or not outputs_match(outputs, present[0], tolerance):
            return False
        return gradients is None or outputs_match(gradients, present[1], tolerance)

    def _with(self, layers: Mapping[str, Multiplied], *, wide: bool) -> nn.Module:
        """A copy of the network with layers in the place of these weights, on its memory where it is not in float64."""
        copied = shallow(self.model)
        for name, one in layers.items():
            weight: Any = part(copied, self.where[name]).weight
            product = as_product(
                weight.double() if wide else weight, one.summed, one.rows, stacked=one.stacked, trial=True
            )
            hold(copied, self.where[name], product.train(copied.training))
            del weight
        return copied.double() if wide else copied

    def _kinds(self, layers: Mapping[str, Multiplied]) -> list[Any] | None:
        """Dtypes and shapes of the outputs under autocast; None where the network does not run so."""
        example, device = few(self.example), device_of(self.model)
        copied = self._with(layers, wide=False)
        try:
            with evaluating(copied), seeded(), torch.autocast(device.type, torch.bfloat16):
                return [(t.dtype, t.shape) for t in tensors(example.run(copied, example.value))]
        except (ModelError, RuntimeError):  # autocast knows only some devices
            return None

    def _ran(self, layers: Mapping[str, Multiplied]) -> Ran | None:
        """Outputs in eval mode, and in train mode outputs and what is seen of the gradients of all weights."""
        copied = self._with(layers, wide=self.wide)
        outputs = outputs_of(copied, self.example, self.probes) if self.wide else self._own_outputs(copied)
        return None if outputs is None else (outputs, self._gradients(copied, layers))

    def _own_outputs(self, copied: nn.Module) -> list[Tensor] | None:
        """Outputs in the network's own dtype; None where it does not run, or says nothing."""
        try:
            with evaluating(copied), seeded():
                outputs = [t for inputs in self.probes for t in tensors(self.example.run(copied, inputs))]
        except ModelError:
            return None
        return outputs if finite(outputs) else None

    def _gradients(self, copied: nn.Module, layers: Mapping[str, Multiplied]) -> list[Tensor] | None:
        """Outputs in train mode, and the gradients of the weights by a random vector; None where there are none."""
        seen: dict[str, dict[int, Tensor]] = {name: {} for name in self.found}
        held: dict[str, list[Tensor]] = {}
        for name, one in self.found.items():
            summed = (1,) if name in layers else one.summed
            held[name] = [p.requires_grad_() for p in part(copied, self.where[name]).parameters()]
            for number, p in enumerate(held[name]):
                p.register_post_accumulate_grad_hook(_noting(seen[name], number, summed))  # type: ignore[no-untyped-call]
        try:
            with evaluating(copied, training=True), seeded(), torch.enable_grad():
                outputs = [t for t in tensors(self.example.run(copied, self.probes[0])) if t.requires_grad]
                loss = torch.stack([(t * _ramp(t)).sum() for t in outputs]).sum()
                loss.backward(inputs=[p for parameters in held.values() for p in parameters])  # type: ignore[no-untyped-call]
        except (ModelError, RuntimeError):
            return None
        made = [t.detach() for t in outputs]
        for name, one in self.found.items():
            summed = (1,) if name in layers else one.summed
            zeros = (torch.zeros_like(matrix_of(p, summed)[:, 0]) for p in held[name])
            made.append(torch.cat([seen[name].get(number, zero) for number, zero in enumerate(zeros)]).detach())
        return made


def _noting(seen: dict[int, Tensor], number: int, summed: Sequence[int]) -> Callable[[Tensor], None]:
    """Notes what a weight's gradient gives for a random vector as soon as it is there, and lets it go."""

    def note(p: Tensor) -> None:
        if p.grad is not None:
            gradient = matrix_of(p.grad, summed)
            vector = torch.randn(gradient.shape[1], generator=generator(4), dtype=torch.float64).to(gradient.device)
            wide = torch.promote_types(gradient.dtype, torch.float32)
            seen[number] = (gradient.to(wide) @ vector.to(wide)).to(gradient.dtype)
            p.grad = None

    return note


def _ramp(t: Tensor) -> Tensor:
    """Other numbers for every value of a tensor, near 1."""
    return torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype, device=t.device).reshape(t.shape)

"""Whether an edited network still computes the same: a float64 copy on random inputs like the example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taut.calls import Example, evaluating, generator, map_tensors, tensors
from taut.errors import ModelError
from taut.structure.surgery import clone

TOLERANCE = 1e-9
"""Largest change of the output in float64, as a share of its largest value, that is still rounding."""

PROBES = 2


def probes_of(example: Example) -> list[Any]:
    """Two batches of random inputs shaped like the example, in float64."""
    return [_probe(example, seed) for seed in range(PROBES)]


def _probe(example: Example, seed: int) -> Any:
    """Random inputs shaped like the example, in float64; the example itself may say nothing (zeros)."""
    noise = generator(seed)

    def like(t: Tensor) -> Tensor:
        if not t.is_floating_point() or not t.numel():
            return t
        size = t.double().std() if t.numel() > 1 else torch.zeros(())
        drawn = torch.randn(t.shape, generator=noise, dtype=torch.float64).to(t.device)
        return drawn * (size if float(size) > 0 else 1.0) + t.double().mean()

    return map_tensors(like, example.value)


def outputs_of(
    model: nn.Module, example: Example, probes: list[Any], watched: Sequence[str] = ()
) -> list[Tensor] | None:
    """What a copy in float64, and its `watched` layers, give for the probes; None where it cannot run.

    In float64 rounding is far below any real change.
    """
    found: list[Tensor] = []
    try:
        wide = clone(model).double()
        for name in watched:
            wide.get_submodule(name).register_forward_hook(lambda _, __, output: found.extend(tensors(output)))
        with evaluating(wide), torch.no_grad():
            for probe in probes:
                found += tensors(example.run(wide, probe))
    except ModelError:
        return None
    return found


def alike(before: list[Tensor] | None, after: list[Tensor] | None) -> bool:
    """Whether two such lists differ by no more than rounding; False where one of them is missing."""
    if before is None or after is None or [t.shape for t in before] != [t.shape for t in after]:
        return False
    for a, b in zip(before, after, strict=True):
        scale = float(a.double().abs().max()) if a.numel() else 0.0
        if a.numel() and not float((a.double() - b.double()).abs().max()) <= TOLERANCE * max(scale, 1e-300):
            return False
    return True

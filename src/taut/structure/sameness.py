"""Whether an edited network still computes the same: a float64 copy on random inputs like the example."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taut.core.example import Example
from taut.core.modes import evaluating, generator
from taut.core.tensors import map_tensors, tensors
from taut.errors import ModelError
from taut.structure.surgery import clone

TOLERANCE = 1e-9
"""Largest change of the output in float64, as a share of its largest value, that is still rounding."""

PROBES = 2
"""Batches of random inputs; where there are integers or masks, one more, in which these are random, too."""

SAMPLES = 2
"""Samples of the example that are enough to tell whether something changed."""


def few(example: Example) -> Example:
    """The first samples of the example, where it has more; whether the model runs on so few is not said."""
    if example.batch <= SAMPLES or not example.divisible:
        return example
    part = copy.copy(example)
    part.value = example.samples.cut(example.value, slice(SAMPLES), example.batch)
    part.batch = SAMPLES
    return part


def probes_of(example: Example) -> list[Any]:
    """Batches of random inputs shaped like the example, in float64.

    Integers and masks are those of the example in the first two, and drawn in a third, on which a model need not run.
    """
    whole = all(t.is_floating_point() for t in tensors(example.value))
    return [_probe(example, seed, drawn=seed >= PROBES) for seed in range(PROBES if whole else PROBES + 1)]


def _probe(example: Example, seed: int, *, drawn: bool) -> Any:
    """Random inputs shaped like the example, in float64; the example itself may say nothing (zeros)."""
    noise = generator(seed)

    def like(t: Tensor) -> Tensor:
        if not t.numel() or t.is_complex():
            return t
        if not t.is_floating_point():
            return _drawn(t, noise).to(t) if drawn else t
        size = t.double().std() if t.numel() > 1 else torch.zeros(())
        normal = torch.randn(t.shape, generator=noise, dtype=torch.float64).to(t.device)
        return normal * (size if float(size) > 0 else 1.0) + t.double().mean()

    return map_tensors(like, example.value)


def _drawn(t: Tensor, noise: torch.Generator) -> Tensor:
    """Integers between the least and the largest of `t`; in masks, half of every row, so that no row is without."""
    low, high = int(t.min()), int(t.max())
    if not 0 <= low <= high <= 1:
        return torch.randint(low, high + 1, t.shape, generator=noise)
    if not high and t.dtype != torch.bool and t.device.type != "cpu":
        return t  # it may be an index into one row, and one out of range ends the process's use of a GPU
    if not t.ndim or t.shape[-1] == 1:
        return 1 - t.int()
    return torch.rand(t.shape, generator=noise).argsort(-1).argsort(-1) % 2


def finite(outputs: Any) -> bool:
    """Whether a run says something: NaN hides all changes, and infinities most."""
    return all(bool(t.isfinite().all()) for t in tensors(outputs))


def outputs_of(
    model: nn.Module, example: Example, probes: list[Any], watched: Sequence[str] = ()
) -> list[Tensor] | None:
    """What a copy in float64, and its `watched` layers, give for the probes; None where it runs on none of them.

    In float64 rounding is far below any real change. Probes on which the model does not run, or which give no finite
    output, are left out.
    """
    found: list[Tensor] = []
    try:
        wide = clone(model).double()
    except ModelError:
        return None
    noted: list[Tensor] = []
    for name in watched:
        wide.get_submodule(name).register_forward_hook(lambda _, __, output: noted.extend(tensors(output)))
    with evaluating(wide), torch.no_grad():
        for probe in probes:
            noted.clear()
            try:
                made = tensors(example.run(wide, probe))
            except ModelError:
                continue
            found += [*noted, *made] if finite(made) else []
    return found or None


def alike(before: list[Tensor] | None, after: list[Tensor] | None) -> bool:
    """Whether two such lists differ by no more than rounding; False where one of them is missing."""
    if before is None or after is None or [t.shape for t in before] != [t.shape for t in after]:
        return False
    for a, b in zip(before, after, strict=True):
        scale = float(a.double().abs().max()) if a.numel() else 0.0
        if a.numel() and not float((a.double() - b.double()).abs().max()) <= TOLERANCE * max(scale, 1e-300):
            return False
    return True

"""Parameters, multiply-accumulates and bytes of a model, counted and not estimated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from taut.core import text
from taut.core.example import Example
from taut.core.modes import evaluating, quietly
from taut.measure.storage import file_bytes, refuse_lazy, stored_tensors
from taut.measure.tally import Tally
from taut.types import Cost

LISTED = 3
"""Notes on one operation that name a module each, before the rest is one sentence."""


@dataclass(frozen=True)
class Count:
    """Multiply-accumulates of one run of the example.

    Attributes:
        total: of the whole model, per sample.
        by_module: per sample in all calls of each module, submodules included; the model itself is "". A module that
            the example does not call is missing; one that has several names is under its first.
        notes: one sentence for every module whose recurrent MACs taut counted itself, and for every operation that may
            multiply, above all with a parameter, and is not counted.
        own: what each module does itself, without the calls of its submodules.
    """

    total: int
    by_module: dict[str, int]
    notes: tuple[str, ...] = ()
    own: dict[str, int] = field(default_factory=dict)


@quietly
def count_macs(model: nn.Module, example: Example) -> Count:
    """Multiply-accumulates per sample, counted in one run over the batch.

    The model runs in eval mode, eagerly where it is compiled, and without torch's fused encoder layers, so that every
    module is called. What an operation costs is in `taut.measure.formulas`; most of it is half of what torch's
    FlopCounterMode counts.

    Raises:
        ModelError: the model cannot be run on the example, or is not initialized.
    """
    refuse_lazy(model.named_parameters())
    tally = Tally(model)
    # attention as plain matrix products, which the counter sees alike on every device
    with evaluating(model), sdpa_kernel(SDPBackend.MATH), _uncompiled(), tally.watching(model):
        example.run(model)

    def per_sample(macs: dict[str, int]) -> dict[str, int]:
        return {name: round(number / example.batch) for name, number in macs.items()}

    notes = tuple(
        f"{name or '(model)'}: {text.count(macs / example.batch)} MACs counted by taut "
        "(torch's counter does not see recurrent cells)"
        for name, macs in tally.recurrent.items()
    )
    by_module, own = per_sample(tally.by_module), per_sample(tally.own)
    return Count(round(tally.macs / example.batch), by_module, notes + _uncounted(tally.uncounted), own)


def _uncounted(reads: dict[tuple[str, str], dict[str, None]]) -> tuple[str, ...]:
    """Sentences on operations that are not counted, a few per operation."""
    by_operation: dict[str, list[str]] = {}
    for (module, operation), parameters in reads.items():
        names = ", ".join(f"'{name}'" for name in parameters)
        reading = f"reads parameter{'s' if len(parameters) > 1 else ''} {names}" if names else "is not known to taut"
        sentence = f"{module or '(model)'}: {operation} {reading}, its multiply-accumulates are not counted"
        by_operation.setdefault(operation, []).append(sentence)
    notes = []
    for operation, sentences in by_operation.items():
        notes += sentences[:LISTED]
        if len(sentences) > LISTED:
            notes.append(f"{operation} is not counted in {len(sentences) - LISTED} more modules")
    return tuple(notes)


@quietly
def count(model: nn.Module, example: Example) -> Cost:
    """What the model costs: unique parameters, those that are not zero, MACs per sample, bytes of model.safetensors.

    Raises:
        ModelError: the model cannot be run on the example or cannot be stored as tensors.
    """
    parameters, nonzero = count_parameters(model)
    return Cost(parameters, nonzero, count_macs(model, example).total, file_bytes(stored_tensors(model)[0]))


@quietly
def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Elements of the unique parameters, and how many of them are not zero (NaN is not zero).

    Raises:
        ModelError: the model is not initialized.
    """
    refuse_lazy(model.named_parameters())
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(_nonzero(p) for p in parameters)


def _nonzero(tensor: Tensor) -> int:
    try:
        return int(torch.count_nonzero(tensor))
    except NotImplementedError:  # float8 and the wider unsigned integers
        return int(torch.count_nonzero(tensor.to(torch.float64)))


@contextmanager
def _uncompiled() -> Iterator[None]:
    """What torch.compile made runs as it was written: one operation after the other, each of which is seen."""
    if not hasattr(torch.compiler, "set_stance"):  # before torch 2.6
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield

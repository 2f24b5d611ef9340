"""Samples held out of the calibration data: they judge between plans that the others refit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from taut.core.data import chunks
from taut.core.example import Example

Batches = Sequence[tuple[Any, Any]]
"""Inputs and targets."""

HELD_OUT = 4
"""One sample in so many judges, the others refit."""

JUDGES = 512
"""Samples that judge at most."""

PIECES = 8
"""The judging samples are as many pieces of the batches, so that their number comes out as meant."""


def divided(example: Example, data: Batches | None) -> tuple[Batches | None, list[Any] | None]:
    """Batches to refit on, and inputs to judge with."""
    if data is None:
        return None, None
    total = sum(example.samples.size(inputs) for inputs, _ in data)
    size = min(JUDGES, total // HELD_OUT)
    if not size:
        return data, [inputs for inputs, _ in data]
    pieces = list(chunks(example, data, max(1, size // PIECES)))
    if len(pieces) == 1:
        return data, [inputs for inputs, _ in data]
    held, seen = len(pieces), 0
    while seen < size and held > 1:
        held -= 1
        seen += example.samples.size(pieces[held][0])
    return pieces[:held], [inputs for inputs, _ in pieces[held:]]

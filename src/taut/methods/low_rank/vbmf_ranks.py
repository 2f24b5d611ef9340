"""Ranks that a layer's own weights decide when the step is carried out: empirical variational Bayes times a knob."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from taut.errors import CallError
from taut.types import Layer


def undecided(method: str, vbmf: float | None, ranks: Mapping[str, int | None]) -> bool:
    """Whether the weights still have to decide: a knob is set and no rank is given.

    Args:
        method: its name, for errors.
        vbmf: the knob.
        ranks: setting -> value.

    Raises:
        CallError: the knob is no number above 0, or some ranks are given and others are left to it.
    """
    if vbmf is None:
        return False
    if isinstance(vbmf, bool) or not isinstance(vbmf, int | float) or not 0 < vbmf < math.inf:
        raise CallError(f"The 'vbmf' of {method} must be a number above 0. Got {vbmf!r} instead.")
    missing = [key for key, value in ranks.items() if value is None]
    if missing and len(missing) < len(ranks):
        raise CallError(
            f"The '{missing[0]}' of {method} must be given together with the other rank, or both be left to 'vbmf'. "
            f"Got {', '.join(f'{key}={value}' for key, value in ranks.items())} instead."
        )
    return bool(missing)


def scaled(vbmf: float | None, found: int, limit: int) -> int:
    """The knob times the rank that was found, within 1 ... `limit`."""
    return max(1, min(limit, round(min((vbmf or 1) * found, limit))))


def built_ranks(layer: Layer, shapes: Mapping[str, tuple[int, ...]], parts: int) -> list[int]:
    """Ranks per group between the `parts` layers in a row that stand for `layer`; 1 where it was left as it was.

    Args:
        layer: as the step found it.
        shapes: of the parameters under its name, as the step left them.
        parts: how many layers the method builds.
    """
    for key in shapes:
        place = key.removesuffix("0.weight")
        sizes = [shapes.get(f"{place}{part}.weight", ()) for part in range(parts)]
        if key != place and _fits(layer, sizes):
            return [size[0] // layer.groups for size in sizes[:-1]]
    return [1] * (parts - 1)


def _fits(layer: Layer, sizes: Sequence[tuple[int, ...]]) -> bool:
    return all(sizes) and (sizes[-1][0], sizes[0][1]) == layer.weight[:2]

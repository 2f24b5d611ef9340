"""What a network costs and what it may cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from pydantic import ConfigDict

from taut.errors import CallError

FORBID = ConfigDict(extra="forbid")
"""Read from JSON, an unknown key is an error and not a silently ignored wish."""


@dataclass(frozen=True)
class Cost:
    """What a layer, a group or a network costs. Integers, so that equality is exact.

    Attributes:
        params: unique parameters, biases included.
        nonzero: parameters that are not zero (`params` where nothing is known about the values).
        macs: multiply-accumulates per sample on the example: half of torch's FlopCounterMode, and of what that lacks
            or gets wrong (`taut.measure.formulas`); where nothing is known, the network's notes name the operation.
        bytes: tensor bytes as stored.
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID
    params: int = 0
    nonzero: int = 0
    macs: int = 0
    bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        """Field by field."""
        return Cost(*(a + b for a, b in zip(self.values(), other.values(), strict=True)))

    def __sub__(self, other: Cost) -> Cost:
        """Field by field."""
        return Cost(*(a - b for a, b in zip(self.values(), other.values(), strict=True)))

    def values(self) -> tuple[int, int, int, int]:
        """The four numbers in the order of the fields."""
        return (self.params, self.nonzero, self.macs, self.bytes)

    def lowers(self, other: Cost) -> bool:
        """Whether at least one of params, nonzero and macs is below `other`'s and none is above."""
        mine, theirs = self.values()[:3], other.values()[:3]
        return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))


@dataclass(frozen=True)
class Budget:
    """What the result may cost. Several keys: the least damage within all of them, checked on the final model.

    A float in (0, 1] is the fraction KEPT of the original, an int is absolute.

    Attributes:
        params: unique parameters of the whole model.
        macs: multiply-accumulates per sample on the example.
        bytes: size of model.safetensors.
        latency: time of one run of the example, in the runtime that suits the model best here, as a share of the
            original's; measured side by side.
        drop: how far `evaluate` may fall below the original's value, on the data that `evaluate` uses; alone: the
            smallest model within it.
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID
    params: float | int | None = None
    macs: float | int | None = None
    bytes: float | int | None = None
    latency: float | None = None
    drop: float | None = None

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None:
                _check_budget(f.name, value)
        if all(getattr(self, f.name) is None for f in fields(self)):
            raise CallError(f"A budget needs at least one of {', '.join(f.name for f in fields(self))}. Got none.")

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read "macs=0.25,params=100000": a number with a point is a fraction, one without is absolute."""
        known = [f.name for f in fields(cls)]
        values: dict[str, Any] = {}
        for part in text.split(","):
            key, _, value = (piece.strip() for piece in part.partition("="))
            if key not in known:
                raise CallError(f"Unknown budget key '{key}'. Known: {', '.join(known)}.")
            if key in values:
                raise CallError(f"The budget '{key}' is given twice.")
            try:
                values[key] = float(value) if key in MEASURED or not value.isdigit() else int(value)
            except ValueError:
                raise CallError(f"The budget '{key}' must be a number. Got '{value}' instead.") from None
        return cls(**values)

    def limits(self, original: Cost) -> dict[str, float]:
        """The ceiling of every key but `drop` that is set: absolute, but for `latency`, which stays a share."""
        ceilings: dict[str, float] = {} if self.latency is None else {"latency": self.latency}
        for key in ("params", "macs", "bytes"):
            value = getattr(self, key)
            if value is not None:
                ceilings[key] = value if isinstance(value, int) else math.floor(value * getattr(original, key))
        return ceilings


MEASURED = ("latency", "drop")
"""Keys that no count gives: always with a fraction."""


def _check_budget(key: str, value: float | int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CallError(f"The budget '{key}' must be a number. Got {value!r} instead.")
    if key == "drop":
        if not 0 <= value < math.inf:
            raise CallError(f"The budget 'drop' must be at least 0. Got {value} instead.")
    elif isinstance(value, int) and key not in MEASURED:
        if value < 1:
            raise CallError(f"The budget '{key}' as an int is absolute and must be at least 1. Got {value} instead.")
    elif not 0 < value <= 1:
        raise CallError(
            f"The budget '{key}' as a float is the fraction kept and must be in (0, 1]. Got {value} instead."
        )

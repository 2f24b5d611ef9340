"""What a network costs and what it may cost."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

from pydantic import ConfigDict

from taut.core.text import brief
from taut.errors import CallError
from taut.types.amounts import RIGHT_CALLS, read_amount, unknown_key

T = TypeVar("T")

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


def _known_keys(kind: type[T]) -> type[T]:
    """The class with an `__init__` that knows what others call its keys."""
    plain = kind.__init__

    @functools.wraps(plain)
    def init(self: T, *args: Any, **values: Any) -> None:
        known = [f.name for f in fields(self)]  # type: ignore[arg-type] # a dataclass
        for key in values:
            if key not in known:
                raise unknown_key(key, known)
        plain(self, *args, **values)

    kind.__init__ = init  # type: ignore[assignment, method-assign]
    return kind


@_known_keys
@dataclass(frozen=True)
class Budget:
    """What the result may cost. Several keys: the least damage within all of them, checked on the final model.

    A float in (0, 1] is the fraction KEPT of the original, an int is absolute, and so is a whole float of at least
    1,000, as 1e6. Where a budget is asked for, {"macs": 0.5} and "macs=50%,bytes=500kB" are budgets, too.

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
        """Read what is written, and refuse values outside their range."""
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None:
                object.__setattr__(self, f.name, read_amount(f.name, value))
        if all(getattr(self, f.name) is None for f in fields(self)):
            raise CallError(f"A budget needs at least one of {', '.join(f.name for f in fields(self))}. Got none.")

    @classmethod
    def of(cls, value: Any) -> Budget:
        """The budget that is meant: a `Budget`, a mapping of its keys, or text as on the command line.

        Raises:
            CallError: it is none of these, or does not say of what it is the amount; the message holds the right call.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, str) and "=" in value:
            return cls.parse(value)
        if isinstance(value, Mapping):
            known = [f.name for f in fields(cls)]
            for key in value:
                if key not in known:
                    raise unknown_key(key, known)
            return cls(**value)
        calls = "; ".join(list(RIGHT_CALLS.values())[:4])
        raise CallError(
            "The budget must be a taut.Budget, or a mapping or text that says of what: taut.Budget(macs=0.5), "
            f'{{"macs": 0.5}} or "macs=50%". Got {brief(value)}. {calls}.'
        )

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read "macs=0.25,params=100000": 0.25 and 25% are fractions, whole numbers, 1M and 500kB are absolute."""
        known = [f.name for f in fields(cls)]
        values: dict[str, Any] = {}
        for part in text.split(","):
            key, _, value = (piece.strip() for piece in part.partition("="))
            if key not in known:
                raise unknown_key(key, known)
            if key in values:
                raise CallError(f"The budget '{key}' is given twice.")
            values[key] = value
        return cls(**values)

    def limits(self, original: Cost) -> dict[str, float]:
        """The ceiling of every key but `drop` that is set: absolute, but for `latency`, which stays a share."""
        ceilings: dict[str, float] = {} if self.latency is None else {"latency": self.latency}
        for key in ("params", "macs", "bytes"):
            value = getattr(self, key)
            if value is not None:
                ceilings[key] = value if isinstance(value, int) else math.floor(value * getattr(original, key))
        return ceilings


BudgetLike = Budget | Mapping[str, float | int | str] | str
"""What `Budget.of` reads."""

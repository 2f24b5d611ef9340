"""Every error that taut raises on purpose.

TautError                 message names the layer, the value and what to do
├── CallError             the call is wrong: an unknown key, method or layer, a bad setting (exit 2)
├── BudgetError           the budget cannot be met; `.best` is the closest Result (exit 3)
├── DataError             calibration data, batches or `evaluate` are unusable (exit 4)
├── ModelError            the model cannot be run or holds NaN or Inf (exit 4)
└── ArtifactError         a saved folder is damaged, foreign or does not match its base (exit 4)

Where the user's own code is to blame (`evaluate`, a loss, a loader, a factory), the message names it and `__cause__` is
its error. What was finished by then is not lost: it is the error's `.result`.
"""

from __future__ import annotations

from typing import ClassVar


class TautError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line returns.

    Attributes:
        result: what was finished when it was raised: of `taut.compress` a `taut.Result` of counted costs alone, of
            `taut.explore` the `taut.Front` of the points measured, of `taut.finetune` the model with the best weights
            so far; else None.
    """

    exit_code: ClassVar[int] = 4
    result: object | None = None


class CallError(TautError, ValueError):
    """The call itself is wrong."""

    exit_code = 2


class BudgetError(TautError):
    """No plan meets the budget.

    Attributes:
        best: the `taut.Result` that comes closest, or None if there is none.
    """

    exit_code = 3

    def __init__(self, message: str, best: object | None = None) -> None:
        """Keep the message and the closest result."""
        super().__init__(message)
        self.best = best


class DataError(TautError):
    """Calibration data, a batch or the user's `evaluate` cannot be used."""


class ModelError(TautError):
    """The model cannot be run on the example, or its weights are not finite."""


class ArtifactError(TautError):
    """A saved folder is damaged, was not written by taut, or does not fit the base model."""

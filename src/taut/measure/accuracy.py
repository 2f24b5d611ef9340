"""The user's own metric: what `evaluate(model)` returns, read strictly, with an interval where the data allow one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from taut.core.copying import deep_copy
from taut.core.modes import evaluating
from taut.core.tensors import describe
from taut.core.user_code import call
from taut.errors import DataError

Z = 1.96
"""Half-width of a 95 % interval in standard errors."""

FORMS = "Return a number, a dict with the deciding metric first, taut.Metric(value, n), or one score per sample."


@dataclass(frozen=True)
class Metric:
    """A value (higher is better) with the number of samples it is a mean over.

    Attributes:
        value: the metric. A rate in [0, 1] with `n` gets a 95 % interval.
        n: samples, or None if unknown.
    """

    value: float
    n: int | None = None


@dataclass(frozen=True)
class Score:
    """What `evaluate` said about a model.

    Attributes:
        name: key of the deciding metric, else the name of the function.
        value: the deciding metric; higher is better.
        low, high: 95 % interval, or None.
        n: samples, where known.
        others: the other entries of the dict.
        samples: the per-sample scores, where `evaluate` returned them.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    others: dict[str, float] = field(default_factory=dict)
    samples: NDArray[np.float64] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Difference:
    """Second score minus first; the 95 % interval is None unless both have scores of the same samples."""

    value: float
    low: float | None = None
    high: float | None = None


def measure(evaluate: Callable[[nn.Module], object], model: nn.Module, what: str = "evaluate") -> Score:
    """What the user's `evaluate` says about a copy of `model` in eval mode: it may train, halve or change what it gets.

    The interval of a rate p over n samples is Wilson's, (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n); of other
    per-sample scores mean ± z sd/√n; z = 1.96.

    Args:
        evaluate: the user's metric, higher is better.
        model: is not changed.
        what: the user knows the function by, in messages.

    Raises:
        DataError: `evaluate` raised, or returned NaN, Inf or something else than the forms above.
    """
    copied = deep_copy(model)
    with evaluating(copied), _own_random_state():
        result = call(what, evaluate, copied)
    name = getattr(evaluate, "__name__", "metric")
    name = "metric" if name in {"<lambda>", "evaluate"} else name
    if not isinstance(result, Mapping):
        return _read(name, result)
    if not result:
        raise DataError(f"evaluate returned an empty dict. {FORMS}")
    first, *rest = (_read(str(key), value) for key, value in result.items())
    others = {score.name: score.value for score in rest}
    return Score(first.name, first.value, first.low, first.high, first.n, others, first.samples)


def difference(before: Score, after: Score) -> Difference:
    """How the second score differs: mean of the paired differences d ± 1.96 sd(d)/√n where both have samples."""
    if before.samples is None or after.samples is None or before.samples.shape != after.samples.shape:
        return Difference(after.value - before.value)
    return Difference(*_normal(after.samples - before.samples))


def wilson(rate: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a rate over n samples."""
    center = rate + Z * Z / (2 * n)
    half = Z * math.sqrt(rate * (1 - rate) / n + Z * Z / (4 * n * n))
    scale = 1 + Z * Z / n
    return max(0.0, (center - half) / scale), min(1.0, (center + half) / scale)


def _normal(samples: NDArray[np.float64]) -> tuple[float, float, float]:
    mean = float(samples.mean())
    half = Z * float(samples.std(ddof=1)) / math.sqrt(samples.size)
    return mean, mean - half, mean + half


def _own_random_state() -> AbstractContextManager[Any]:
    """Two models evaluated one after the other draw the same random numbers."""
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.random.fork_rng(range(torch.cuda.device_count()) if started else ())


def _read(name: str, result: object) -> Score:
    """One metric in any of its forms."""
    if isinstance(result, Metric):
        return _read_metric(name, result)
    array = _array(result)
    if array is None or array.ndim > 1 or array.size == 0:
        raise DataError(f"evaluate returned {describe(result)} for '{name}'. {FORMS}")
    bad = int((~np.isfinite(array)).sum())
    if bad:
        what = repr(float(array.reshape(-1)[0])) if array.size == 1 else f"{bad} scores of {array.size} as NaN or Inf"
        raise DataError(f"evaluate returned {what} for '{name}'. The metric must be finite.")
    if array.size == 1:
        return Score(name, float(array.reshape(-1)[0]))
    mean, low, high = _normal(array)
    if bool(np.isin(array, (0.0, 1.0)).all()):
        low, high = wilson(mean, array.size)
    return Score(name, mean, low, high, array.size, samples=array)


def _read_metric(name: str, metric: Metric) -> Score:
    value = _read(name, metric.value).value
    if metric.n is None:
        return Score(name, value)
    if not isinstance(metric.n, Integral) or isinstance(metric.n, bool) or metric.n < 1:
        raise DataError(f"The n of taut.Metric for '{name}' must be a positive whole number. Got {metric.n!r} instead.")
    n = int(metric.n)
    low, high = wilson(value, n) if 0 <= value <= 1 else (None, None)
    return Score(name, value, low, high, n)


def _array(result: object) -> NDArray[np.float64] | None:
    """A number or a list, array or tensor of real numbers as float64; None for anything else."""
    if isinstance(result, Tensor):
        result = None if result.is_complex() else result.detach().cpu().double().numpy()
    if isinstance(result, list):
        numbers = all(isinstance(item, Real) or (isinstance(item, Tensor) and item.numel() == 1) for item in result)
        result = np.array([_float(item) for item in result]) if numbers else None
    if isinstance(result, np.ndarray):
        return result.astype(np.float64) if result.dtype.kind in "fiub" else None
    if isinstance(result, Real) and not isinstance(result, bool):
        return np.asarray(_float(result))
    return None


def _float(number: Any) -> float:
    """As a float: infinite where an int has too many digits for one."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf

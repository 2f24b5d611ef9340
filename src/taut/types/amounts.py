"""Amounts as people write them: 0.25, "50%", "1M", "500kB", 1e6; what may mean two things is refused with the call."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

from taut.errors import CallError

SHARES = ("latency", "drop")
"""Keys that no count gives: a share of the time, and a distance in the units of `evaluate`."""

OTHER_WORDS: Mapping[str, str] = {
    **dict.fromkeys(("flops", "flop", "mac", "gmacs", "gflops", "madds", "compute"), "macs"),
    **dict.fromkeys(("param", "parameters", "weights", "sparsity", "ratio", "compression"), "params"),
    **dict.fromkeys(("size", "byte", "mb", "memory", "disk"), "bytes"),
    **dict.fromkeys(("time", "ms", "speed", "speedup", "faster"), "latency"),
    **dict.fromkeys(("accuracy", "acc", "loss", "metric", "drops"), "drop"),
}
"""What others call the keys of a budget."""

RIGHT_CALLS: Mapping[str, str] = {
    "params": "params=0.5 keeps half of the parameters",
    "macs": "macs=0.5 keeps half of the multiply-accumulates, and so of the FLOPs",
    "bytes": "bytes=0.5 keeps half of the file",
    "latency": "latency=0.5 keeps half of the time",
    "drop": "drop=0.01 lets `evaluate` fall by 0.01",
}

UNITS: Mapping[str, int] = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "b": 10**9}
BINARY: Mapping[str, int] = {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}

LEAST_WHOLE = 1000.0
"""A float from here on is an amount, as in 1e6; below, 2.0 or 50.0 may be meant as a ratio or as per cent."""

_WRITTEN = re.compile(r"([+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*(%|[a-z]*)", re.IGNORECASE)


def read_amount(key: str, value: Any) -> float | int:
    """The value of a budget's key: a float is a fraction, an int is absolute.

    Raises:
        CallError: it is no number, or means nothing for this key; the message holds the right call.
    """
    if isinstance(value, str):
        value = _read_text(key, value)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise CallError(f"The budget '{key}' must be a number. Got {value!r} instead. {_advice(key)}")
    number: float | int = int(value) if isinstance(value, Integral) else float(value)
    if key == "drop":
        if not 0 <= number < math.inf:
            raise CallError(f"The budget 'drop' must be at least 0. Got {number} instead. {_advice(key)}")
        return number
    if isinstance(number, float) and key not in SHARES and LEAST_WHOLE <= number < math.inf and number.is_integer():
        number = int(number)
    if isinstance(number, int) and key not in SHARES:
        return _checked_count(key, number)
    if not 0 < number <= 1:
        raise CallError(
            f"The budget '{key}' as a float is the fraction kept and must be in (0, 1]. Got {number} instead. "
            f"{_advice(key)}"
        )
    return number


def unknown_key(key: object, known: list[str]) -> CallError:
    """The error about a key that no budget has, with the one that is probably meant."""
    text = str(key).strip()
    word = text.lower().strip("<>: ")
    meant, near = word if word in known else OTHER_WORDS.get(word), get_close_matches(word, known, 1, 0.7)
    advice = ""
    if meant is not None:
        advice = f" Here that is '{meant}': {RIGHT_CALLS[meant]}."
    elif near:
        advice = f" Did you mean '{near[0]}'? {RIGHT_CALLS[near[0]]}."
    elif not text.strip("0123456789_.%"):
        advice = " A comma stands between keys, as in macs=50%,params=100000, and not in numbers or at the end."
    return CallError(f"Unknown budget key '{key}'. Known: {', '.join(known)}.{advice}")


def percent_note(limits: Mapping[str, float], whole: Mapping[str, float]) -> str:
    """What to say of a limit that cannot be met and looks like per cent; "" where none does."""
    for key, limit in limits.items():
        if key not in SHARES and 1 < limit <= 100 and limit < whole[key] / 100:
            return f" {key}={limit:.0f} is absolute; for {limit:.0f} % of the original say {key}={limit / 100:g}."
    return ""


def _checked_count(key: str, number: int) -> int:
    if number < 1:
        raise CallError(f"The budget '{key}' as an int is absolute and must be at least 1. Got {number} instead.")
    if number == 1:
        what = {"params": "one parameter", "macs": "one multiply-accumulate", "bytes": "one byte"}[key]
        raise CallError(
            f"The budget '{key}' as an int is absolute: 1 is {what}. Say {key}=1.0 to keep all, {key}=0.5 for a half, "
            "or a larger int."
        )
    return number


def _read_text(key: str, text: str) -> float | int:
    """The number that is written.

    Raises:
        CallError: none is, or its unit means nothing for this key.
    """
    refused = CallError(f"The budget '{key}' must be a number. Got '{text}' instead. {_advice(key)}")
    match = _WRITTEN.fullmatch(text.strip())
    if match is None:
        if text.strip().lower() in {"nan", "inf", "-inf", "+inf", "infinity"}:
            return float(text)
        raise refused
    digits, unit = match[1], match[2].lower()
    plain = digits.replace("_", "").lstrip("+").isdigit()
    number: float | int = int(digits) if plain and key not in SHARES else float(digits)
    if unit == "%" and key != "drop":
        return number / 100
    if not unit:
        return number
    factor = None if key in SHARES else _factor(key, unit)
    if factor is None:
        raise refused
    return math.floor(round(number * factor, 3))


def _factor(key: str, unit: str) -> int | None:
    """What "k", "M", "kB" or "MiB" multiplies by; only bytes have the unit B, elsewhere it is a billion."""
    if key != "bytes":
        return UNITS.get(unit)
    scale = unit.removesuffix("b")
    return {**UNITS, **BINARY, "b": None}.get(scale)


def _advice(key: str) -> str:
    """How the key is written."""
    if key == "latency":
        return (
            "It is a share of the original's time, since milliseconds are another number on every machine: latency=0.5 "
            "or '50%' keeps half of it, which is 2x as fast."
        )
    if key == "drop":
        return "It is in the units of `evaluate`: drop=0.01 lets it fall by 0.01."
    amount = "500kB" if key == "bytes" else "1M"
    return f"It is what is kept: {key}=0.5 or '50%' for a half (2x fewer), an int or '{amount}' for an amount in all."

"""What a study is asked for, as it is written on a command line: methods with settings, and sizes."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from taut.errors import CallError
from taut.methods import resolve
from taut.methods.factorization import Unplanned
from taut.studies.grid import Cell
from taut.types import Looking, Method, Slimming, Step

AUTO = "auto"
"""In the place of a method: all that `taut.compress` uses by default, and its planner chooses."""

HOW_FAR = ("macs", "params", "sparsity", "latency", "counts")
"""Settings of a method that takes out channels that say how many: then no size does."""

ORIGINAL, CONTROL = "original", "control"
"""Rows that no method made: the model as it is, and trained like the compressed ones."""


@dataclass(frozen=True)
class Grid:
    """What a study runs: methods x sizes x seeds.

    Attributes:
        methods: `auto` or names of methods, with settings where wished: "tucker(metric=fisher)".
        sizes: fractions kept, in (0, 1]: of the parameters, or for masks of the weights that are not zero. Methods
            that no size steers, or whose settings say how far they go, run once per seed, as they are set.
        seeds: how many, from 0.
        epochs: of training after the compression; None for none.
        keep: layers that are left alone, or not below a share, as in `taut.compress`: by name, glob or kind.
    """

    methods: tuple[str, ...] = (AUTO, "magnitude")
    sizes: tuple[float, ...] = (0.5, 0.25, 0.125)
    seeds: int = 1
    epochs: int | None = None
    keep: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what no run can mean.

        Raises:
            CallError: an unknown method or setting, a size outside (0, 1], or a number of seeds or epochs below 1.
        """
        if not self.methods or not self.sizes:
            raise CallError("A study needs at least one method and one size.")
        for method in self.methods:
            read_method(method)
        for size in self.sizes:
            if isinstance(size, bool) or not isinstance(size, int | float) or not 0 < size <= 1:
                raise CallError(f"A size of a study is the fraction kept, in (0, 1]. Got {size!r} instead.")
        for key, value in (("seeds", self.seeds), ("epochs", 1 if self.epochs is None else self.epochs)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise CallError(f"The '{key}' of a study must be a whole number, at least 1. Got {value!r} instead.")

    def cells(self) -> list[Cell]:
        """All runs, the original and the controls first."""
        seeds = range(self.seeds)
        found = [_cell(ORIGINAL, None, 0)] + [_cell(CONTROL, None, seed) for seed in seeds if self.epochs]
        for name in dict.fromkeys(self.methods):
            sizes: Iterable[float | None] = dict.fromkeys(self.sizes) if sized(read_method(name)) else (None,)
            found += [_cell(name, size, seed) for size in sizes for seed in seeds]
        return found


def _cell(method: str, size: float | None, seed: int) -> Cell:
    return {"method": method, "size": size, "seed": seed}


def planned(method: Method | None) -> bool:
    """Whether the planner cuts it to a budget."""
    if method is None:
        return True
    if isinstance(method, Slimming):  # channels
        return not _decided(method, *HOW_FAR)
    return not (method.masks or method.exact or isinstance(method, Looking | Unplanned))


def sized(method: Method | None) -> bool:
    """Whether a size steers it."""
    return method is None or planned(method) or pruned_to_size(method) or shares_size(method)


def pruned_to_size(method: Method) -> bool:
    """Whether the size is the share of the weights that are not zero."""
    return method.masks and getattr(method, "select", "") != "threshold"


def shares_size(method: Method) -> bool:
    """Whether a method over the whole network takes the `share` of the weights that it stores, and was given none."""
    return isinstance(method, Looking) and hasattr(method, "share") and not _decided(method, "share", "rank", "ranks")


def _decided(method: Method, *keys: str) -> bool:
    return any(getattr(method, key, None) is not None for key in keys)


def read_method(text: str) -> Method | None:
    """The method that "name" or "name(key=value, ...)" means; None for `auto`.

    Raises:
        CallError: it is written otherwise, or the method or a setting is unknown or wrong.
    """
    name, bracket, inside = text.strip().partition("(")
    if bracket and not inside.endswith(")"):
        raise CallError(f"A method of a study is written name or name(key=value,...). Got '{text}'.")
    settings: dict[str, Any] = {}
    for part in split(inside[:-1]) if inside[:-1].strip() else ():
        key, sign, value = (piece.strip() for piece in part.partition("="))
        if not sign or not key or not value or key in settings:
            raise CallError(f"A setting of '{name}' is written key=value, once. Got '{part}'.")
        settings[key] = _value(value)
    if name == AUTO:
        if settings:
            raise CallError(f"'{AUTO}' has no settings: it takes the default methods. Got '{text}'.")
        return None
    method = resolve(Step((), name, settings))
    if method.masks and "sparsity" in settings:
        raise CallError(f"The 'sparsity' of {name} is what the sizes of the study say: leave it out of '{text}'.")
    return method


def split(text: str) -> tuple[str, ...]:
    """The parts between the commas that stand in no brackets, without blanks around them."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return tuple(part.strip() for part in parts)


def _value(text: str) -> Any:
    """A number, true, null, a list, as in JSON or Python; else the word itself."""
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError):
            return read(text)
    return text


def read_sizes(text: str) -> tuple[float, ...]:
    """The fractions in "0.5,25%".

    Raises:
        CallError: a part is no number.
    """
    try:
        return tuple(_fraction(part.strip()) for part in text.split(","))
    except ValueError:
        raise CallError(f"The sizes of a study are fractions such as 0.5,25%. Got '{text}' instead.") from None


def _fraction(text: str) -> float:
    return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)

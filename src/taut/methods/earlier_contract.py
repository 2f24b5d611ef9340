"""Method classes that users wrote against an earlier contract: they work, and say what to change."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from taut.core.deprecation import warn_author


class Needs:
    """`needs`: names of the statistics that a method uses. These were all or none; it is `uses_statistics` now."""

    def __get__(self, method: Any, kind: type[Any]) -> frozenset[str]:
        """As it was."""
        warnings.warn("The 'needs' of a method is now uses_statistics.", DeprecationWarning, stacklevel=2)
        uses = (kind if method is None else method).uses_statistics
        return frozenset({"inputs", "outputs"}) if uses is True else frozenset()


def accept(kind: type[Any]) -> None:
    """Give a class that was written against an earlier contract what that did not ask for, once.

    Args:
        kind: may have `needs` where today's contract has `uses_statistics`, and no `rank_settings`.
    """
    if kind.__module__.partition(".")[0] == "taut":
        return
    named = (vars(base) for base in kind.__mro__ if {"needs", "uses_statistics"} & vars(base).keys())
    nearest: Mapping[str, Any] = next(named, {})
    if "uses_statistics" not in nearest and not isinstance(nearest.get("needs"), Needs):
        warn_author(
            kind,
            f"The method {kind.__name__} says with 'needs' which statistics it uses: the contract now asks for "
            "uses_statistics = True or False.",
        )
        kind.uses_statistics = property(lambda method: bool(getattr(method, "needs", False)))
    if "rank_settings" not in vars(kind):
        ranks = (f.name for f in fields(kind) if f.name.startswith("rank"))
        kind.rank_settings = tuple(dict.fromkeys((*getattr(kind, "rank_settings", ()), *ranks)))

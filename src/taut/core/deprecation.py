"""Old names of public things: they work, and warn."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def forward_names(package: str, renamed: Mapping[str, tuple[Any, str]]) -> Callable[[str], Any]:
    """A module's `__getattr__` under which old names lead to what has a new one.

    Args:
        package: the name of the module.
        renamed: old name -> the object, and what it is called now.
    """

    def find(name: str) -> Any:
        if name not in renamed:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        value, new = renamed[name]
        warnings.warn(f"{package}.{name} is now {new}.", DeprecationWarning, stacklevel=2)
        return value

    return find


def warn_author(kind: type[Any], message: str) -> None:
    """A DeprecationWarning in the place of a user's class, where Python's own filters show it."""
    try:
        file, line = inspect.getsourcefile(kind) or "<unknown>", inspect.getsourcelines(kind)[1]
    except (OSError, TypeError):
        file, line = "<unknown>", 1
    warnings.warn_explicit(message, DeprecationWarning, file, line, module=kind.__module__)

"""Old names of public things: they work, and warn."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any


def forward_names(package: str, renamed: Mapping[str, Any]) -> Callable[[str], Any]:
    """A module's `__getattr__` under which old names lead to what has a new one.

    Args:
        package: the name of the module.
        renamed: old name -> the object, which knows its new name.
    """

    def find(name: str) -> Any:
        if name not in renamed:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        new = renamed[name]
        warnings.warn(f"{package}.{name} is now {package}.{new.__name__}.", DeprecationWarning, stacklevel=2)
        return new

    return find

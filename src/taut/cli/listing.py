"""What the methods are, read from their source: to list them, torch need not be imported."""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

METHODS = "taut.methods"


CHANNELS = "channels"
"""The method that is tried unasked where samples are enough to judge by."""

PLAIN_FORM = "PlainForm"
"""The base of the methods that are carried out before all others."""


def method_rows() -> list[tuple[str, str, str]]:
    """Name, when it is tried, and what it does: of every method, in the order of the registry."""
    tree = _parsed(METHODS)
    table = next(node.value for node in ast.walk(tree) if isinstance(node, ast.AugAssign))
    if not isinstance(table, ast.Dict):
        return []
    rows = []
    for key, kind in zip(table.keys, table.values, strict=True):
        if isinstance(key, ast.Constant) and isinstance(kind, ast.Name):
            module, definition = _class(METHODS, kind.id)
            summary = (ast.get_docstring(definition) or "").partition("\n")[0]
            when = f"from {_judged()} samples" if key.value == CHANNELS else _when(module, definition)
            rows.append((str(key.value), when, summary))
    return rows


@cache
def _parsed(module: str) -> ast.Module:
    """A module of ours; its parents are found without being run, as they would import torch."""
    root = importlib.util.find_spec("taut")
    if root is None or root.origin is None:
        return ast.Module([], [])
    path = Path(root.origin).parent.joinpath(*module.split(".")[1:])
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8"))


def _class(module: str, name: str) -> tuple[str, ast.ClassDef]:
    """Where a class that a module speaks of is defined."""
    for node in _parsed(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
        for alias in node.names if isinstance(node, ast.ImportFrom) else ():
            if isinstance(node, ast.ImportFrom) and node.module and (alias.asname or alias.name) == name:
                return _class(node.module, alias.name)
    raise LookupError(name)


def _judged() -> int:
    """Calibration samples from which on channels are candidates unasked."""
    for node in _parsed("taut.search.session").body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "JUDGED":
            return int(ast.literal_eval(node.value))
    raise LookupError("JUDGED")


def _when(module: str, definition: ast.ClassDef) -> str:
    if any(isinstance(base, ast.Name) and base.id == PLAIN_FORM for base in definition.bases):
        return "first, always"
    return "default" if _default(module, definition) else "on request"


def _default(module: str, definition: ast.ClassDef) -> bool:
    """Its `default`, or that of the first base of ours that has one."""
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "default":
            return isinstance(node.value, ast.Constant) and bool(node.value.value)
    for base in definition.bases:
        name = base.value if isinstance(base, ast.Subscript) else base
        if isinstance(name, ast.Name):
            try:
                return _default(*_class(module, name.id))
            except (LookupError, FileNotFoundError):  # a base that is not ours
                continue
    return True

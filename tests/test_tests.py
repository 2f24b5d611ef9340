"""Every test can fail: it asserts, expects an error or a warning, or calls a helper that does."""

from __future__ import annotations

import ast
from pathlib import Path

HERE = Path(__file__).parent
EXPECTS = {"raises", "warns", "assert_close", "assert_allclose", "assert_array_equal", "deprecated_call", "fail"}


def functions() -> dict[str, list[ast.FunctionDef]]:
    """Every function and method of the tests, by name; several may have one."""
    by_name: dict[str, list[ast.FunctionDef]] = {}
    for path in HERE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                by_name.setdefault(node.name, []).append(node)
    return by_name


def called(node: ast.AST) -> set[str]:
    """Names of the functions that are called, and of the methods; "fail" for a command that must succeed."""
    calls = [n for n in ast.walk(node) if isinstance(n, ast.Call)]
    names = {c.func.id for c in calls if isinstance(c.func, ast.Name)}
    names |= {c.func.attr for c in calls if isinstance(c.func, ast.Attribute)}
    strict = any(k.arg == "check" and getattr(k.value, "value", False) is True for c in calls for k in c.keywords)
    return names | ({"fail"} if strict else set())


def test_every_test_can_fail() -> None:
    by_name = functions()
    calls = {name: set[str]().union(*map(called, nodes)) for name, nodes in by_name.items()}
    checks = {
        name
        for name, nodes in by_name.items()
        if calls[name] & EXPECTS or any(isinstance(n, ast.Assert) for node in nodes for n in ast.walk(node))
    }
    while True:  # helpers of helpers
        more = {name for name, names in calls.items() if names & checks} - checks
        if not more:
            break
        checks |= more
    silent = sorted(name for name in by_name if name.startswith("test_") and name not in checks)
    assert not silent, silent

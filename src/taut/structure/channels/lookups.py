"""Which code finds attributes by names that are computed, or goes through all parts of a module."""

from __future__ import annotations

import dis
from functools import cache
from types import CodeType

DYNAMIC = frozenset(
    {
        *("get_submodule", "get_parameter", "get_buffer", "children", "named_children", "modules", "named_modules"),
        *("named_parameters", "named_buffers", "_modules", "_parameters", "_buffers", "__dict__", "__getattribute__"),
        *("vars", "attrgetter", "methodcaller", "eval", "exec"),
    }
)
"""What code names that may give it any part of a module."""

LOOKUPS = {"getattr": 1, "__getattr__": 0}
"""What gives an attribute by a name: which of its arguments that is."""


def looks_up(code: CodeType) -> bool:
    """Whether code may look up an attribute by a name that is no constant."""
    inner = any(looks_up(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    if inner or not any(word in code.co_names for word in LOOKUPS):
        return inner
    steps = list(dis.get_instructions(code))
    return any(
        step.argval in LOOKUPS and step.opname.startswith("LOAD_") and not _names_constant(steps[at:])
        for at, step in enumerate(steps)
    )


def _names_constant(steps: list[dis.Instruction]) -> bool:
    """Whether the name that is looked up first is a string; whatever computes something on the way says no."""
    end = next((at for at, step in enumerate(steps) if step.opname in {"PRECALL", "CALL"}), 0)
    between = [step for step in steps[1:end] if step.opname not in {"PUSH_NULL", "EXTENDED_ARG"}]
    if not end or not all(step.opname.startswith("LOAD_") for step in between):
        return False
    values = [step for step in between if step.opname not in {"LOAD_ATTR", "LOAD_METHOD"}]
    at = LOOKUPS[steps[0].argval]
    return len(values) == steps[end].argval > at and values[at].opname == "LOAD_CONST"


LOADS = frozenset({"LOAD_ATTR", "LOAD_METHOD"})
"""What reads an attribute of what was loaded before."""


@cache
def reads(code: CodeType, own: str | None = None) -> frozenset[str]:
    """Attributes that code reads of something else than its first argument, and strings, which may name some.

    Args:
        code: of a function.
        own: the name of the first argument where the code around it has one.
    """
    own = own or next(iter(code.co_varnames[: code.co_argcount]), None)
    steps = list(dis.get_instructions(code))
    found = {
        step.argval
        for before, step in zip([None, *steps], steps, strict=False)
        if step.opname in LOADS and not (before is not None and before.opname in VARIABLES and before.argval == own)
    }
    inner = (reads(constant, own) for constant in code.co_consts if isinstance(constant, CodeType))
    strings = {constant for constant in code.co_consts if isinstance(constant, str)}
    return frozenset(found | strings).union(*inner)


VARIABLES = frozenset({"LOAD_FAST", "LOAD_DEREF", "LOAD_FAST_BORROW", "LOAD_FAST_CHECK", "LOAD_CLASSDEREF"})
"""What loads a variable of a function."""

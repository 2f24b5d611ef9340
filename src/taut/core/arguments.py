"""Arguments of the public verbs that are handed on from one to the next."""

from __future__ import annotations

from taut.core.text import brief
from taut.errors import CallError


def expect(value: object, kind: type, origin: str) -> None:
    """Refuse an argument that is not what an earlier verb gives.

    Args:
        value: the argument.
        kind: what it must be.
        origin: how to get one, as "taut.trace(model, example)".

    Raises:
        CallError: it is something else.
    """
    if not isinstance(value, kind):
        raise CallError(f"A {kind.__name__} is asked for here, as {origin} gives it. Got {brief(value)} instead.")

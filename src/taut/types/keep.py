"""What a user wants left alone: layers by name, glob, kind or as the module itself, whole or down to a share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any

from taut.core.text import some
from taut.errors import CallError

Keep = Any
"""A name ("head"), a glob of dotted names ("head.*"), a kind (`nn.Linear` or "Linear"), a module of the model, several
of these, or a mapping of them to the share that has to stay, in (0, 1]; 1 leaves a layer alone."""

AS_ASKED = "kept: as asked"
"""The reason of a layer that is left alone because the user wants it so."""


@dataclass(frozen=True)
class Candidate:
    """A module that may be meant.

    Attributes:
        name: dotted, in the model. kinds: names of its class and of the classes that this derives from.
        module: itself, where it is at hand.
        parts: names of the layers that its plain form has; "name.*" where they are numbers and not known yet.
    """

    name: str
    kinds: frozenset[str]
    module: Any = None
    parts: tuple[str, ...] = ()


def read_keep(keep: Keep, candidates: Sequence[Candidate]) -> dict[str, float]:
    """The share that has to stay of every module that is meant, and of those inside it; of several the strictest.

    Where all parts of a module's plain form are meant, it is itself.

    Args:
        keep: see `Keep`; None: nothing.
        candidates: the modules that there are.

    Raises:
        CallError: nothing is called so, or a share is outside (0, 1].
    """
    shares: dict[str, float] = {}
    known = {one.name for one in candidates}
    parts = dict.fromkeys(part for one in candidates for part in one.parts if part not in known)
    candidates = [*candidates, *(Candidate(part, frozenset()) for part in parts)]
    for key, share in _entries(keep):
        for named in _named(key, candidates):
            inside = (one.name for one in candidates if one.name.startswith(f"{named}.") or not named)
            for name in {named, *inside}:
                shares[name] = max(share, shares.get(name, 0.0))
    for one in candidates:
        if one.parts and all(part in shares for part in one.parts):
            shares[one.name] = max(min(shares[part] for part in one.parts), shares.get(one.name, 0.0))
    return shares


def check_share(key: object, share: Any) -> float:
    """A share as a float.

    Raises:
        CallError: it is no number in (0, 1].
    """
    if isinstance(share, str) and share.strip().endswith("%"):
        with suppress(ValueError):
            share = float(share.strip().removesuffix("%")) / 100
    if isinstance(share, bool) or not isinstance(share, Real) or not 0 < float(share) <= 1:
        raise CallError(
            f"What keep= leaves of {_shown(key)} must be a share in (0, 1]; 1 leaves it alone. Got {share!r} instead."
        )
    return float(share)


def parse_keep(texts: Iterable[str]) -> dict[str, float]:
    """Read "head.*" and "features.0=0.5": a name, a glob or a kind, and the share that has to stay; 1 where none is.

    Raises:
        CallError: a share is no number in (0, 1], or a name is given twice.
    """
    shares: dict[str, float] = {}
    for text in texts:
        name, sign, value = (part.strip() for part in text.rpartition("="))
        if not sign:
            name, value = text.strip(), "1"
        if not name or name in shares:
            raise CallError(f"keep names '{name}' twice." if name else f"keep names no layer in '{text}'.")
        try:
            number: object = value if value.endswith("%") else float(value)
        except ValueError:
            number = value
        shares[name] = check_share(name, number)
    return shares


def written_keep(value: Any) -> dict[str, float]:
    """What a file says is kept: a name, a list of names, or a mapping of names to the share that stays.

    Raises:
        CallError: it says something else, or a share is no number in (0, 1].
    """
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {name: check_share(name, share) for name, share in value.items()}
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        keys = list(value) if isinstance(value, Mapping | list) else [value]
        number = next((key for key in keys if type(key) is int), None)
        quoted = "" if number is None else f' A name that is a number stands in quotes: "{number}".'
        raise CallError(f"'keep' must be names of layers, or name: share. Got {value!r:.80} instead.{quoted}")
    return parse_keep(names)


def _entries(keep: Keep) -> list[tuple[Any, float]]:
    if keep is None:
        return []
    if isinstance(keep, Mapping):
        return [(key, check_share(key, share)) for key, share in keep.items()]
    keys = [keep] if isinstance(keep, str | type) or hasattr(keep, "named_modules") else keep
    if isinstance(keys, Iterable):
        entries = [(key, 1.0) for key in keys]
        if any(isinstance(key, str) and not key.strip() for key, _ in entries):
            raise CallError("keep= names no layer: its name is empty. Leave keep= out to keep nothing.")
        return entries
    raise CallError(
        "keep= must be a layer (its name, a glob of names, its kind or the module itself), a list of these, or a "
        f"mapping of these to the share that stays. Got {keep!r:.80} instead."
    )


def _named(key: Any, candidates: Sequence[Candidate]) -> list[str]:
    """The names of the modules that a key means."""
    if isinstance(key, str):
        names = _by_text(key, candidates)
    elif isinstance(key, type):
        wanted = _kinds_below(key)
        names = [
            one.name
            for one in candidates
            if (wanted & one.kinds if one.module is None else isinstance(one.module, key))
        ]
    else:
        names = [one.name for one in candidates if one.module is key]
    if not names:
        raise CallError(f"keep= names {_shown(key)}, but {_nearest(key, candidates)}")
    return names


def _by_text(key: str, candidates: Sequence[Candidate]) -> list[str]:
    """By name, else by glob, else by kind."""
    names = [one.name for one in candidates]
    owner, _, number = key.rpartition(".")
    if key in names or (number.isdigit() and f"{owner}.*" in names):
        return [key]
    if any(sign in key for sign in "*?["):
        return [name for name in names if name and fnmatchcase(name, key)]
    if any(name.startswith(f"{key}.") for name in names):
        return [name for name in names if name.startswith(f"{key}.")]
    return [one.name for one in candidates if key in one.kinds]


def _kinds_below(kind: type) -> set[str]:
    """Names of a class and of all that derive from it."""
    below: list[type] = type.__subclasses__(kind)
    return {kind.__name__}.union(*(_kinds_below(derived) for derived in below))


def _nearest(key: Any, candidates: Sequence[Candidate]) -> str:
    names = [one.name for one in candidates if one.name and not one.name.endswith(".*")]
    kinds = sorted({kind for one in candidates for kind in one.kinds})
    if isinstance(key, str):
        close = get_close_matches(key.strip("*."), names + kinds, 3, 0.5)
        hint = f"Did you mean {some(close)}?" if close else f"Its layers are {some(names, 8)}."
        return f"the model has no such layer. {hint}"
    if isinstance(key, type):
        return f"the model has no layer of that kind. Its kinds are {', '.join(kinds[:12])}."
    if hasattr(key, "named_modules"):
        return "it is no module of this model: give the layer's name, or the module that stands in the model itself."
    return "a layer is given by its name, a glob of names, its kind, or as the module itself."


def _shown(key: object) -> str:
    if isinstance(key, type):
        return f"the kind {key.__name__}"
    if isinstance(key, str):
        return f"'{key}'"
    return f"a {type(key).__name__}" if hasattr(key, "named_modules") else f"{key!r:.60}"

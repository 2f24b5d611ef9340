"""What a saved folder says of itself: plain data, checked before anything else in the folder is believed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, SerializerFunctionWrapHandler, TypeAdapter, ValidationError, model_serializer

from taut.core.files import one_line, read, seal, sha256, size_of, unseal
from taut.errors import ArtifactError, CallError
from taut.types import Kept, Plan, Step
from taut.types.budget import FORBID

MANIFEST, WEIGHTS, COMPARISON = "manifest.json", "model.safetensors", "comparison.json"
OURS = frozenset({MANIFEST, WEIGHTS, COMPARISON})
"""Every name that taut writes into the folder; no other is ever read."""

FORMAT = 1


@dataclass(frozen=True)
class Stamp:
    """What a file must be."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json: nothing that differs between two saves of the same model and plan.

    Attributes:
        format: version of this layout.
        taut: version of the package that wrote it.
        files: every file that must be there, as it must be.
        steps: what was done to the original model, in order, settings and shapes resolved.
        rolled_back: layers of the plan that are as they were, with the reason.
        ties: {name of a tied tensor: name under which it is stored}.
        layouts: {name: order of its dimensions in memory}, for tensors that are not stored as they lie in memory.
        plan: the whole plan, to replay.
        earlier: how many of the steps, at the front, made the model of which the plan was made.
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID
    format: int
    taut: str
    files: dict[str, Stamp]
    steps: tuple[Step, ...]
    rolled_back: tuple[Kept, ...]
    ties: dict[str, str]
    layouts: dict[str, tuple[int, ...]]
    plan: Plan
    earlier: int = 0

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As plain data, `earlier` only where there is something: earlier versions do not know it."""
        written: dict[str, Any] = write(self)
        if not self.earlier:
            del written["earlier"]
        return written

    def to_bytes(self) -> bytes:
        """Sealed JSON.

        Raises:
            ValueError: a number is NaN or Inf.
        """
        return seal(_ADAPTER.dump_python(self, mode="json"))

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """What `to_bytes` wrote.

        Raises:
            ArtifactError: a byte differs, it is of another format, or does not hold what it must.
        """
        found = unseal(data, MANIFEST)
        if "taut" not in found or found.get("format") != FORMAT:
            raise ArtifactError(
                f"{MANIFEST} is of format {one_line(repr(found.get('format')), 40)}; this version of taut reads "
                f"format {FORMAT}."
            )
        try:
            manifest = _ADAPTER.validate_python(found)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ArtifactError(f"{MANIFEST}: '{one_line(where, 100)}' is wrong: {one_line(first['msg'])}.") from None
        if set(manifest.files) != {WEIGHTS}:
            names = one_line(", ".join(repr(name) for name in manifest.files))
            raise ArtifactError(f"{MANIFEST} must name the file '{WEIGHTS}' and no other. It names: {names}.")
        return manifest


_ADAPTER = TypeAdapter(Manifest)


def taut_version() -> str:
    """The installed version of taut."""
    try:
        return version("taut")
    except PackageNotFoundError:
        return "unknown"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder, after its files were found to be what it says.

    Raises:
        ArtifactError: something is missing, damaged or foreign.
    """
    if not (folder / MANIFEST).exists():
        raise ArtifactError(f"'{folder}' holds no {MANIFEST}: it is not a folder that taut saved.")
    manifest = Manifest.from_bytes(read(folder / MANIFEST))
    for name, stamp in manifest.files.items():
        size = size_of(folder / name)
        if size != stamp.bytes:
            raise ArtifactError(f"'{folder / name}' is damaged: it holds {size} bytes instead of {stamp.bytes}.")
        if sha256(folder / name) != stamp.sha256:
            raise ArtifactError(f"'{folder / name}' is damaged: its SHA-256 is not the one in {MANIFEST}.")
    if (folder / COMPARISON).exists():
        unseal(read(folder / COMPARISON), COMPARISON)
    return manifest


def has_manifest(folder: Path) -> bool:
    """Whether `folder` holds an undamaged manifest of ours, of whatever format."""
    try:
        return {"format", "taut"} <= set(unseal(read(folder / MANIFEST), MANIFEST))
    except ArtifactError:
        return False


def sealed_comparison(comparison: object) -> bytes:
    """A comparison (anything with `to_dict`, or plain data) as sealed JSON, its own keys on the top level.

    Raises:
        CallError: it holds something else than plain data.
    """
    to_dict = getattr(comparison, "to_dict", None)
    try:
        content = _plain(comparison if to_dict is None else to_dict())
        return seal(content if isinstance(content, dict) and content else {"comparison": content})
    except (TypeError, ValueError) as error:
        raise CallError(f"The comparison cannot be written as JSON: {one_line(error)}.") from None


def _plain(value: Any) -> Any:
    """JSON has no NaN and no Inf: None in their place."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def finite(plan: Plan) -> Plan:
    """The plan without damages that are NaN or Inf: nobody should lose a model over a number that only explains."""
    steps = [s if s.damage is None or math.isfinite(s.damage) else replace(s, damage=None) for s in plan.steps]
    return replace(plan, steps=tuple(steps))

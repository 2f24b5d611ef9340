"""Finished points of a front as files of a folder, and beside them the models of those that wait to be timed."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from torch import nn
from typing_extensions import TypedDict  # pydantic needs this one below Python 3.12

from taut.artifact.checkpoint import load, save
from taut.core.files import guarded, write_atomic
from taut.errors import ArtifactError
from taut.search.front import Point


class _Record(TypedDict):
    fingerprint: str
    point: Point


class Store:
    """A folder of points, each with the digest of the model and the settings it belongs to."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        """Nothing is read or written yet."""
        self.folder, self.fingerprint = folder, fingerprint

    def read(self) -> dict[float, Point]:
        """Points of this model and these settings; damaged files count as missing."""
        return {point.ratio: point for path in sorted(self.folder.glob("point-*.json")) for point in self._points(path)}

    def write(self, point: Point) -> None:
        """Keep a point.

        Raises:
            ArtifactError: the folder cannot be written.
        """
        with guarded(f"Cannot keep the front in '{self.folder}'"):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._write(self.folder / f"point-{point.ratio:g}.json", point)
        shutil.rmtree(self._beside(point.ratio), ignore_errors=True)

    def untimed(self, original: nn.Module) -> dict[float, tuple[Point, nn.Module]]:
        """What `write_untimed` kept; what is damaged counts as missing.

        Args:
            original: what the networks were made of.
        """
        found = {}
        for path in sorted(self.folder.glob("untimed-*/point.json")):
            for point in self._points(path):
                with suppress(ArtifactError):
                    found[point.ratio] = point, load(path.parent, base=original)
        return found

    def write_untimed(self, point: Point, model: nn.Module) -> None:
        """Keep a point that waits to be timed.

        Raises:
            ArtifactError: the folder cannot be written.
        """
        place = self._beside(point.ratio)
        shutil.rmtree(place, ignore_errors=True)
        with guarded(f"Cannot keep the front in '{self.folder}'"):
            self.folder.mkdir(parents=True, exist_ok=True)
        save(model, point.plan, place)
        self._write(place / "point.json", point)

    def _beside(self, ratio: float) -> Path:
        return self.folder / f"untimed-{ratio:g}"

    def _points(self, path: Path) -> list[Point]:
        """The one that a file holds, or none."""
        try:
            record = TypeAdapter(_Record).validate_json(path.read_bytes())
        except (ValidationError, OSError):
            return []
        return [record["point"]] if record["fingerprint"] == self.fingerprint else []

    def _write(self, path: Path, point: Point) -> None:
        record = _Record(fingerprint=self.fingerprint, point=point)
        write_atomic(path, TypeAdapter(_Record).dump_json(record, indent=1))

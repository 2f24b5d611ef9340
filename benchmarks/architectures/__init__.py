"""Architectures of well-known libraries: small where they can be, with random weights as if they had been trained."""

from __future__ import annotations

from architectures import images, language, own, sound
from architectures.making import Architecture, build

ARCHITECTURES: dict[str, Architecture] = {
    name: make for room in (images, language, sound, own) for name, make in room.ARCHITECTURES.items()
}

__all__ = ["ARCHITECTURES", "Architecture", "build"]

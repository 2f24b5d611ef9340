"""Layers that went with a block: what later steps of a plan still mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from taut.types.network import Group
from taut.types.plan import Step


def gone_blocks(done: Sequence[Step]) -> tuple[str, ...]:
    """Names of the blocks that these steps took out."""
    layers = (layer for step in done if step.group is not None for layer in step.group.layers)
    return tuple(layer.name for layer in layers if layer.block is not None)


def without_gone(step: Step, blocks: Sequence[str]) -> Step | str:
    """A step without the layers that went with blocks; the name of such a block where all of them did."""
    around = {name: next((block for block in blocks if name.startswith(f"{block}.")), None) for name in step.layers}
    stay = [place for place, name in enumerate(step.layers) if around[name] is None]
    if len(stay) == len(step.layers):
        return step
    if not stay:
        return str(next(iter(around.values())))
    asked = dict(step.settings)
    if isinstance(floors := asked.get("floors"), list):
        asked["floors"] = [floors[place] for place in stay]
    if isinstance(spare := asked.get("spare"), list):
        places = {place % len(step.layers) for place in spare if isinstance(place, int)}
        asked["spare"] = [number for number, place in enumerate(stay) if place in places]
    if isinstance(heads := asked.get("heads"), dict):
        inside = tuple(f"{block}." for block in blocks)
        asked["heads"] = {key: pair for key, pair in heads.items() if not key.startswith(inside)} or None
    group = None if step.group is None else Group(tuple(step.group.layers[place] for place in stay))
    before = step.before if group is None else group.cost
    return replace(step, layers=tuple(step.layers[place] for place in stay), group=group, settings=asked, before=before)

"""A plan's steps against a network: which of them it really holds, and building the same structure again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace as replace_fields

import torch
from torch import nn

from taut.core.modes import device_of
from taut.core.text import shape
from taut.errors import ArtifactError, CallError
from taut.methods import resolve, settings
from taut.nn import Answering, Rebuilt, Reorder
from taut.structure.reordering import sides
from taut.structure.rules import UNIT, narrowed_unit
from taut.structure.surgery import answering, forget_hooks, locate, part, renumber, renumbered, replace
from taut.types import Fitting, Group, Kept, Layer, Plan, Renumbering, Restoring, Step
from taut.types.gone import gone_blocks, without_gone

Shapes = dict[str, tuple[int, ...]]
"""Parameter name -> shape."""


def split(model: nn.Module, plan: Plan) -> tuple[dict[int, Step], tuple[Kept, ...]]:
    """The steps of `plan` that `model` holds, by their places there, and the layers whose step was rolled back.

    Steps are undone on the parameters' shapes from the last to the first, so that each meets what it left.

    Raises:
        CallError: a step has no group, or settings that are not resolved.
        ArtifactError: a layer is neither what its step builds nor what it was before.
    """
    shapes: Shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    held: dict[int, Step] = {}
    kept: list[Kept] = []
    gone: list[str] = []
    for number, wanted in reversed(list(enumerate(plan.steps))):
        blocks = [name for name in gone_blocks(plan.steps[:number]) if not _below(shapes, name)]
        left = without_gone(wanted, blocks)
        if isinstance(left, str):
            kept += [Kept(name, f"it went with '{left}'") for name in wanted.layers]
            continue
        step = _fitted(with_sides(model, left), shapes, renumbered(model))
        places = _places(shapes, step, gone)
        if places is None:
            reason = f"{step.method} was rolled back, or would not shrink it: the layer has its original shape"
            kept += [Kept(name, reason, step.before or _layer(step, name).cost) for name in step.layers]
            continue
        held[number] = step
        for name, place in places.items():
            _undo(shapes, place, _layer(step, name))
            gone += [] if _layer(step, name).block is None else [f"{name}."]
    return dict(sorted(held.items())), tuple(reversed(kept))


def replay(model: nn.Module, steps: Iterable[Step]) -> None:
    """Give `model` in place the structure that the steps build, with weights still to be filled.

    Raises:
        ArtifactError: a step cannot be resolved, or the model does not have the layer that it was made for.
    """
    for step in steps:
        try:
            method = resolve(step)
            places = {layer.name: _located(model, layer) for layer in _group(step).layers if layer.skip != UNIT}
            for name, module in _skeleton(step).items():
                place = places[name]
                old = part(model, place)
                if isinstance(method, Restoring):
                    replace(model, place, method.restored(old))
                    continue
                layer = next(layer for layer in _group(step).layers if layer.name == name)
                replace(model, place, answering(module.to(device_of(old)), layer))
            for name, sizes in getattr(resolve(step), "units", _no_units)(_group(step)).items():
                replace(model, name, _unit(model.get_submodule(name), name, sizes))
            renumber(model, method.renumbered() if isinstance(method, Renumbering) else {})
        except CallError as error:
            raise ArtifactError(f"The base does not fit the saved folder: {error}") from None
        except Exception as error:  # settings of a wrong type or size, found by torch
            raise ArtifactError(
                f"The step {step.method} on layer {step.layers} cannot be rebuilt: {type(error).__name__}: "
                f"{str(error).strip().partition(chr(10))[0]}"
            ) from None


def _no_units(group: Group) -> Mapping[str, tuple[int, int]]:
    del group
    return {}


def _unit(module: nn.Module, name: str, sizes: tuple[int, int]) -> nn.Module:
    """A module of the user's with fewer channels, whose weights are still to be filled.

    Raises:
        CallError: no rule says how it is made narrower.
    """
    built = narrowed_unit(module, *(torch.arange(size) for size in sizes))
    if built is None:
        kind = type(module).__name__
        raise CallError(
            f"'{name}' has fewer channels, and is a {kind} of your own: say with "
            f"taut.register_channel_rule({kind}, ...), as before it was compressed, which parameters have them."
        )
    forget_hooks(built)
    return built


def chain_of(model: nn.Module, step: Step) -> nn.Sequential:
    """The layers that a step put in the place of its one layer, whatever steps came before or behind.

    Raises:
        CallError: there is none.
    """
    (name,) = step.layers
    wanted = [type(part) for part in _skeleton(step)[name].children() if not isinstance(part, Reorder)]
    for chain in model.get_submodule(name).modules():
        found = [part for part in chain.children() if not isinstance(part, Reorder)]
        if not isinstance(chain, nn.Sequential) or len(found) != len(wanted):
            continue
        if all(_became(part, kind) for part, kind in zip(found, wanted, strict=True)):
            return chain
    raise CallError(f"The layer '{name}' was not rewritten by {step.method}.")


def _became(part: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `part` is what was built, or what a later step put in its place: a chain, or another form of weight."""
    return type(part) in {kind, nn.Sequential} or isinstance(part, Rebuilt | Answering)


def with_sides(model: nn.Module, step: Step) -> Step:
    """The step with the channel orders that are left in `model`: neighbouring layers may have taken them over."""
    if not hasattr(resolve(step), "reorders"):
        return step
    try:
        return replace_fields(step, settings={**step.settings, "reorders": sides(chain_of(model, step))})
    except (AttributeError, CallError):
        return step  # no such layer, or a step that was rolled back: whoever asked finds out


def _fitted(step: Step, shapes: Shapes, counting: str | None) -> Step:
    """The step with the settings that what it built tells, where the plan at hand is the one from before `apply`.

    Args:
        step: of the plan.
        shapes: of all parameters.
        counting: a module of which heads went, if there is one.

    Raises:
        CallError: shapes do not tell how many went.
    """
    method = resolve(step)
    if not isinstance(method, Fitting):
        return step
    found = method.fitted(_group(step), {name: _below(shapes, name) for name in step.layers})
    if isinstance(method, Renumbering) and found != method and counting is not None:
        raise CallError(
            f"How many heads '{counting}' has is told by the plan that made it alone: save that one, as it was applied "
            "or as the plan of a taut.Result."
        )
    return replace_fields(step, settings=settings(found))


def _located(model: nn.Module, layer: Layer) -> str:
    """Where the layer stands; checked before its skeleton is built, which so never takes more memory than it does."""
    place = locate(model, layer)
    here = part(model, place)
    groups = getattr(here, "groups", getattr(here, "num_groups", 1))
    if groups != layer.groups:
        raise CallError(f"The layer '{layer.name}' has {groups} groups in the base and {layer.groups} in the folder.")
    return place


def _group(step: Step) -> Group:
    """The layers as the step found them.

    Raises:
        CallError: the step does not say, or says it of others.
    """
    if step.group is None:
        raise CallError(
            f"The step {step.method} on layer '{', '.join(step.layers)}' does not know the layer's shape: "
            "make the plan with Plan.of(network, steps)."
        )
    if step.group.names != tuple(step.layers):
        raise CallError(f"The step {step.method} on layers {step.layers} has the group of {step.group.names}.")
    return step.group


def _layer(step: Step, name: str) -> Layer:
    return next(layer for layer in _group(step).layers if layer.name == name)


def _skeleton(step: Step) -> Mapping[str, nn.Module]:
    return resolve(step).skeleton(_group(step))


def _places(shapes: Shapes, step: Step, gone: Sequence[str] = ()) -> dict[str, str] | None:
    """Where each layer of the step stands; None if all are as they were.

    Args:
        shapes: of all parameters.
        step: the step.
        gone: what the names start with of layers that a later step took out with their block.
    """
    modules = {name: module for name, module in _skeleton(step).items() if not name.startswith(tuple(gone))}
    built = {name: _own_shapes(module) for name, module in modules.items()}
    found = {name: _find(shapes, name, wanted) for name, wanted in built.items()}
    places = {name: place for name, place in found.items() if place is not None}
    if len(places) == len(built):
        return places
    if all(_is_original(_below(shapes, name), _layer(step, name)) for name in built):
        return None
    name = next(name for name in built if name not in places)
    raise ArtifactError(
        f"The layer '{name}' is neither what its step {step.method} builds ({_words(built[name])}) nor what it was "
        f"before ({shape(_layer(step, name).weight)}): it holds {_words(_below(shapes, name))}. "
        "Save the model together with the plan that made it."
    )


def _own_shapes(module: nn.Module) -> Shapes:
    return {name: tuple(p.shape) for name, p in module.named_parameters(remove_duplicate=False)}


def _below(shapes: Shapes, place: str) -> Shapes:
    below = {name.removeprefix(f"{place}."): sizes for name, sizes in shapes.items() if name.startswith(f"{place}.")}
    return below or ({"": shapes[place]} if place in shapes else {})


def _find(shapes: Shapes, name: str, wanted: Shapes) -> str | None:
    """The layer's own place, or the first inside of what an earlier step put there, that has the wanted parameters."""
    places = [name]
    for inner in _below(shapes, name):
        parts = inner.split(".")[:-1]
        places += [".".join([name, *parts[: depth + 1]]) for depth in range(len(parts))]
    return next((place for place in places if _below(shapes, place) == wanted), None)


def _is_original(found: Shapes, layer: Layer) -> bool:
    if layer.summed:
        return layer.weight in {found.get("weight"), found.get("")}
    if layer.block is not None:
        return bool(found)
    plain = not any("." in name for name in found)
    return plain and found.get("weight", ()) == layer.weight and ("bias" in found) == layer.bias


def _undo(shapes: Shapes, place: str, layer: Layer) -> None:
    for name in _below(shapes, place):
        del shapes[f"{place}.{name}" if name else place]
    if layer.summed:
        shapes[place] = layer.weight
        return
    if layer.weight:
        shapes[f"{place}.weight"] = layer.weight
    if layer.bias:
        shapes[f"{place}.bias"] = layer.bias_shape


def _words(shapes: Shapes) -> str:
    return ", ".join(f"{name} {shape(sizes)}" for name, sizes in shapes.items()) or "nothing"

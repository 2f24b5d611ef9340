"""Weights that a network's code multiplies by in its own way: which they are, and whether layers do the same."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from taut.core.example import Example
from taut.core.modes import evaluating
from taut.errors import ModelError
from taut.nn.answering import TENSORS
from taut.structure.coverage import seeded
from taut.structure.form_parts import parts_of_rows
from taut.structure.product_proof import Proof
from taut.structure.product_uses import Multiplied, Uses, Where, uses_of
from taut.structure.sameness import blamed
from taut.structure.support import COMPUTED_WITH, MULTIPLIED, OTHER_KIND, OVERRIDDEN, PARAMETER, UNCALLED
from taut.structure.surgery import part, shallow
from taut.types import Layer, Network


def with_products(model: nn.Module, example: Example, layers: Sequence[Layer]) -> list[Layer]:
    """The layers of a network, where those whose weight code multiplies by are known for it, and so are parameters.

    Args:
        model: the network.
        example: how it is called.
        layers: as they are without regard to that.

    Returns:
        Layers that are left alone for another reason by now, and more layers: parameters of modules of other kinds.
    """
    where = _candidates(model, layers)
    found, reasons = multiplied_in(model, example, where, example.paths) if where else ({}, {})
    made: list[Layer] = []
    for layer in layers:
        bare = [n for n in (*found, *reasons) if n != layer.name and where[n].rpartition(".")[0] == layer.name]
        own = [_layer_of(model, name, where[name], found.get(name), reasons.get(name), example.batch) for name in bare]
        params, macs = sum(one.params for one in own), sum(one.macs for one in own)
        layer = replace(layer, params=layer.params - params, macs=max(0, layer.macs - macs))  # noqa: PLW2901
        if layer.name in found:
            facts = _layer_of(model, layer.name, where[layer.name], found[layer.name], None, example.batch)
            known = {key: getattr(facts, key) for key in ("summed", "rows", "stacked", "calls", "macs")}
            inside = where[layer.name].removeprefix(layer.name).removeprefix(".")
            layer = replace(layer, skip=MULTIPLIED, parts=parts_of_rows(facts.rows, inside), **known)  # noqa: PLW2901
        called = layer.skip is None or not layer.skip.startswith(("it is never called", "modules of type"))
        reason = None if called else reasons.get(layer.name)
        made += [replace(layer, skip=reason or layer.skip), *own]
    return _without(made, {name: layer.macs for layer in made if (name := layer.name) in found})


def _without(layers: Sequence[Layer], macs: Mapping[str, int]) -> list[Layer]:
    """What ran as a layer's code is not counted as that of the module around it as well."""
    rest = {layer.name: layer.macs for layer in layers}
    for name, amount in macs.items():
        around = name.rpartition(".")[0]
        if around in rest and around not in macs and any(x.name == name and x.kind != PARAMETER for x in layers):
            rest[around] = max(0, rest[around] - amount)
    return [replace(layer, macs=rest[layer.name]) for layer in layers]


def products_on(model: nn.Module, example: Example, net: Network, paths: Sequence[Any]) -> Network:
    """The network with regard to other paths: a weight that is used otherwise there is left alone.

    Args:
        model: the network.
        example: how it is called.
        net: what is known of it.
        paths: inputs that take other paths.
    """
    known = {layer.name: layer for layer in net.layers if layer.skip == MULTIPLIED}
    where = {name: name if one.kind == PARAMETER else f"{name}.weight" for name, one in known.items()}
    reasons: dict[str, str] = {}
    for inputs in paths if known else ():
        uses = uses_of(model, example, where, inputs)
        for name, layer in known.items():
            judged = _fitting(uses[name], layer) if name in uses else UNWATCHED
            reasons |= {} if judged is None else {name: judged}
    return replace(
        net,
        layers=tuple(
            replace(layer, skip=reasons[layer.name], summed=(), rows=(), parts=(), stacked=False)
            if layer.name in reasons
            else layer
            for layer in net.layers
        ),
    )


def _fitting(uses: Uses, layer: Layer) -> str | None:
    """Why uses of a weight are not what its layers do."""
    if uses.others:
        return OTHERWISE.format(name=min(uses.others))
    if uses.summed - {layer.summed}:
        return BOTH_SIDES
    if layer.stacked:
        return OTHER_ROWS if uses.apart else None
    parts = layer.rows or (math.prod(layer.weight) // math.prod(layer.weight[axis] for axis in layer.summed),)
    ends = {sum(parts[:k]) for k in range(len(parts) + 1)}
    return None if {end for rows in uses.rows for end in rows} <= ends else OTHER_ROWS


def _candidates(model: nn.Module, layers: Sequence[Layer]) -> dict[str, str]:
    """The parameters that may be multiplied by, by the names of their layers; those of other modules by their own."""
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    where = {}
    for layer in layers:
        module = model.get_submodule(layer.name)
        reasons = (
            UNCALLED,
            *(COMPUTED_WITH.format(attribute=attribute, name=layer.name) for attribute in TENSORS),
            OTHER_KIND.format(kind=type(module).__name__),
            OVERRIDDEN.format(kind=type(module).__name__, name="forward"),
        )
        if layer.skip not in reasons or isinstance(module, _ConvNd):
            continue
        fitting = {key: p for key, p in module._parameters.items() if p is not None and _fits(p, owners)}
        for key in fitting:
            parameter = f"{layer.name}.{key}" if layer.name else key
            alone = list(fitting) == ["weight"] and not module._modules and layer.name
            where[layer.name if alone else parameter] = parameter
    return where


def _fits(parameter: Tensor, owners: Mapping[int, int]) -> bool:
    """Whether a parameter can be a matrix of a layer's own."""
    sizes = [size for size in parameter.shape if size != 1]
    plain = type(parameter) is nn.Parameter and parameter.dtype in FLOATS and not parameter.is_meta
    return plain and len(sizes) > 1 and 0 not in sizes and owners[id(parameter)] == 1


FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def _layer_of(
    model: nn.Module, name: str, parameter: str, one: Multiplied | None, reason: str | None, batch: int
) -> Layer:
    """A weight that is multiplied by, or nearly, as a layer."""
    weight: Any = part(model, parameter).weight
    layer = Layer(name, PARAMETER, tuple(weight.shape), batch=batch, itemsize=weight.element_size())
    layer = replace(layer, skip=reason, params=weight.numel())
    if one is None:
        return layer
    macs = sum(math.prod(call.input) * call.output[-1] for call in one.calls)
    layer = replace(layer, skip=MULTIPLIED, parts=parts_of_rows(one.rows), stacked=one.stacked)
    return replace(layer, summed=one.summed, rows=one.rows, calls=one.calls, macs=layer.per_sample(macs))


def multiplied_in(
    model: nn.Module, example: Example, where: Where, paths: Sequence[Any]
) -> tuple[dict[str, Multiplied], dict[str, str]]:
    """The weights in whose place layers compute the same.

    Args:
        model: the network.
        example: how it is called.
        where: the parameters that may be such.
        paths: inputs that take all paths through the code; the first is the example.

    Returns:
        Beside them why others are none, where code multiplies by them.
    """
    runs = [uses_of(model, example, where, inputs) for inputs in paths] if where else []
    if not runs:
        return {}, {}
    if _trains(model, example, paths[0]):
        runs.append(uses_of(model, example, {n: where[n] for n in runs[0]}, paths[0], training=True))
    found, reasons = dict[str, Multiplied](), dict[str, str]()
    for name, parameter in where.items():
        seen = [run[name] for run in runs if name in run]
        if not any(uses.summed for uses in seen):
            reasons |= _unused_stack(part(model, parameter).weight, name, seen, whole=len(seen) == len(runs))  # type: ignore[arg-type]
            continue
        judged = _judged(part(model, parameter).weight, seen) if len(seen) == len(runs) else UNWATCHED  # type: ignore[arg-type]
        if isinstance(judged, str):
            reasons[name] = judged
        elif judged is not None:
            found[name] = judged
    whole = uses_of(model, example, {n: where[n] for n in found}, example.value) if found else {}
    found = {n: replace(one, calls=tuple(whole[n].calls)) for n, one in found.items() if n in whole}
    wrong = blamed(list(found), Proof(model, example, where, found).same)
    reasons |= dict.fromkeys(wrong, WRONG)
    return {name: one for name, one in found.items() if name not in wrong}, reasons


def _unused_stack(weight: Tensor, name: str, seen: Sequence[Uses], *, whole: bool) -> dict[str, str]:
    """Why a stack of matrices, as experts are, is left alone of which no product is seen; nothing of other weights."""
    if sum(size != 1 for size in weight.shape) < 3:
        return {}
    others = sorted(set().union(*(uses.others for uses in seen)))
    if others:
        return {name: NEEDED.format(name=others[0])}
    return {} if whole else {name: UNWATCHED}


def _trains(model: nn.Module, example: Example, inputs: Any) -> bool:
    """Whether a network runs in train mode on what it is called with; some want targets then."""
    try:
        with evaluating(copied := shallow(model), training=True), seeded():
            example.run(copied, inputs)
    except ModelError:
        return False
    return True


UNWATCHED = "other code multiplies by its weight, and needs a tensor there: call a torch.nn.Linear instead"

OTHERWISE = (
    "other code multiplies by its weight, and needs its values besides, in torch's '{name}': call a torch.nn.Linear "
    "instead, or keep the two uses in parameters of their own"
)

NEEDED = (
    "other code needs its values, in torch's '{name}': take its matrices by w[e], by one number or a tensor of them "
    "with one axis, or hold a torch.nn.Linear for each"
)

BOTH_SIDES = "other code multiplies by its weight from both sides: give each of the two a torch.nn.Linear of its own"

OTHER_ROWS = "other code multiplies by its weight, and by other rows of it on other inputs: call a torch.nn.Linear"

WRONG = (
    "other code multiplies by its weight, and computes something else where that is a layer: call a torch.nn.Linear "
    "instead"
)


def _judged(weight: Tensor, seen: Sequence[Uses]) -> Multiplied | str | None:
    """One matrix, of which products are made, or why there is none; None where nothing is to be gained."""
    others = sorted(set().union(*(uses.others for uses in seen)))
    if others:
        return OTHERWISE.format(name=others[0])
    ways = set().union(*(uses.summed for uses in seen))
    if len(ways) > 1:
        return BOTH_SIDES
    (summed,) = ways
    inputs = math.prod(weight.shape[axis] for axis in summed)
    whole = weight.numel() // inputs
    if min(inputs, whole) < 2:
        return None
    if any(uses.at_once for uses in seen) and not any(uses.apart for uses in seen):
        return Multiplied(summed, (), stacked=True)
    ends = {0, whole, *(end for uses in seen for rows in uses.rows for end in rows)}
    if any(uses.stacked for uses in seen) and 0 not in summed:
        ends |= set(range(0, whole, whole // weight.shape[0]))
    rows = tuple(last - first for first, last in pairwise(sorted(ends)))
    return Multiplied(summed, rows if len(rows) > 1 else ())

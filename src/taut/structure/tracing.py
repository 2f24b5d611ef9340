"""`trace`: what a network is made of, from one run of the example; no demands on the model's code."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from taut.core.data import collect
from taut.core.example import Example
from taut.core.modes import quietly
from taut.errors import ModelError
from taut.measure.counting import count_macs, count_parameters
from taut.measure.storage import file_bytes, stored_tensors
from taut.nn import StateLinear
from taut.nn.answering import TENSORS
from taut.structure import own_forms
from taut.structure.admission import admit
from taut.structure.attention_form import unlike, unlike_in_use
from taut.structure.baking import computed, sources
from taut.structure.blocks import blocks_covered, blocks_of
from taut.structure.calling import read_example
from taut.structure.channels.mentions import named_in_code
from taut.structure.coverage import covering
from taut.structure.form_parts import parts_of
from taut.structure.live_taps import live_taps
from taut.structure.outputs import Outputs
from taut.structure.own_kinds import in_their_words, shared_with_others, sized
from taut.structure.patches import groups_of, weight_of
from taut.structure.probing import (
    LayerAnswers,
    StandInCheck,
    kind_matters,
    live_ranges,
    read_by_others,
    record_calls,
    training,
)
from taut.structure.products import products_on, with_products
from taut.structure.rules import UNIT, module_rule
from taut.structure.support import (
    ATTENTION,
    COMPUTED,
    COMPUTED_WITH,
    NORMS,
    OF_THEIR_OWN,
    PACKED,
    RECURRENT,
    SHARED_WEIGHT,
    STILL_NARROWED,
    SUPPORTED,
    UNCALLED,
    base_kind,
    is_aside,
    refusal,
    tied_kind,
    whole_kind,
)
from taut.structure.surgery import nests, shallow
from taut.structure.ties import Ties, for_all, tied_layers
from taut.structure.wrappers import unwrapped
from taut.types import Cost, Invocation, Layer, Network

SAMPLES = 1024
"""Samples of the data at most whose paths are looked at."""


@quietly
def trace(model: nn.Module, example: Any, data: Any = None) -> Network:
    """Layers, shapes, calls and costs of `model`, and for every layer that cannot be rewritten the reason.

    Args:
        model: any module; it is run in eval mode on the example and left as it was.
        example: fixes how the model is called (`taut.core.example.Example`).
        data: batches that may take other paths through the model's code than the example does: what happens to layers
            there counts, too. `taut.observe` looks at its data in the same way.

    Returns:
        The network; costs are per sample of the example.

    Raises:
        CallError: `model` is no module.
        ModelError: it cannot be run on the example, or holds NaN, Inf or uninitialized weights.
    """
    model = unwrapped(model)
    admit(model)
    check_finite(model)
    call = read_example(model, example)
    fresh = not call.witnesses
    covering(model, call)
    if fresh:
        Outputs(model, call)  # refuses a model that gives nothing finite
    calls, keywords = record_calls(model, call)
    counted = count_macs(shallow(model), call)
    forms: dict[str, own_forms.Known] = {}
    reasons = _reasons(model, calls, forms)
    uncalled = [name for name, reason in reasons.items() if reason == UNCALLED]
    reasons |= dict.fromkeys({*uncalled} - {*named_in_code(model, uncalled)}, UNUSED)
    free = [name for name, reason in reasons.items() if reason is None]
    reasons |= {name: "it is called with keyword arguments" for name in free if name in keywords}
    asked = [name for name in free if name not in keywords and not isinstance(model.get_submodule(name), StateLinear)]
    used, answers = _used_otherwise(model, call, asked, call.paths)  # recurrent layers of our own know theirs
    reasons |= used
    reasons |= _forms_that_stay(model, call, reasons, call.paths, forms)
    ties = tied_layers(model, calls)
    apart, more = _wholes(model, call, {name: reason for name, reason in reasons.items() if reason}, keywords, ties)
    answers = {**answers, **more}
    convs = [name for name in free if reasons[name] is None and weight_of(model.get_submodule(name)).ndim > 2]
    extents = live_ranges(model, call, convs)
    owned = _owned_parameters(model)
    layers = []
    described = shallow(model).eval()  # a weight that is computed may change what it is computed from when it is read
    for name, module in described.named_modules():
        if name in reasons:
            layer = describe_layer(name, module, tuple(calls.get(name, ())), call.batch)
            facts: dict[str, Any] = {
                "skip": reasons[name],
                "whole": apart.get(name),
                "tied": ties.get(name, ()),
                "macs": counted.own.get(name, 0),
                "params": owned[name],
            }
            layer = replace(layer, **facts)
            layers.append(replace(layer, live=live_taps(layer, extents.get(name))))
    layers = with_products(model, call, layers)
    params, nonzero = count_parameters(model)
    cost = Cost(params, nonzero, counted.total, file_bytes(stored_tensors(model)[0]))
    blocks = blocks_of(model, call, counted, layers)
    net = Network(tuple(layers), cost, counted.notes, call, blocks=blocks, forms=forms)
    net = net.answering(answers)
    return net if data is None else covered(net, model, collect(call, data, SAMPLES))


def check_finite(model: nn.Module) -> None:
    """Refuse weights that no decomposition survives.

    Raises:
        ModelError: a parameter holds NaN or Inf (named, with the count).
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.numel() and not _is_finite(parameter):
            bad = int((~torch.isfinite(parameter)).sum())
            if bad:
                raise ModelError(
                    f"The parameter '{name}' holds {bad} NaN or Inf of {parameter.numel()} values: "
                    "load weights that are finite."
                )


def _is_finite(parameter: Tensor) -> bool:
    """Whether no value is NaN or Inf, without a temporary as large as the parameter."""
    low, high = torch.aminmax(parameter.detach())
    return math.isfinite(float(low)) and math.isfinite(float(high))


def _owned_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters held by each module itself; a tied one counts where it first occurs."""
    seen: set[int] = set()
    owned: dict[str, int] = {}
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        if isinstance(getattr(module, "parametrizations", None), nn.Module):
            own += [p for p in module.parametrizations.parameters() if id(p) not in seen]
        seen |= {id(p) for p in own}
        owned[name] = sum(p.numel() for p in own)
    return owned


def _reasons(
    model: nn.Module, calls: dict[str, list[Invocation]], forms: dict[str, own_forms.Known]
) -> dict[str, str | None]:
    """For every module that owns parameters why it is skipped, None where it is not; `forms` takes in plain forms."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].append(name)
        for parameter in (p for key in computed(module) for p in sources(module, key)):
            if name not in owners[id(parameter)]:
                owners[id(parameter)].append(name)
    reasons: dict[str, str | None] = {}
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        parametrized = hasattr(module, "parametrizations") and not isinstance(module, nn.ParameterList)
        own += [p for key in computed(module) for p in sources(module, key)]
        if (not own and not parametrized and not isinstance(module, NORMS)) or ".parametrizations." in f".{name}.":
            continue
        tied = [other for p in own for other in owners[id(p)] if other != name and ".parametrizations." not in other]
        what = "bias" if _shares_bias_alone(module, name, owners) else "weight"
        reason, use = refusal(module), _refuse_use(name, tied, calls, what)
        if reason == PACKED and use is None:
            reason = _shared_output(name, module, owners) or unlike(module) or ATTENTION
        elif reason not in {None, UNIT} and use is None:
            reason = own_forms.own_form(module, name, forms) or reason
        reasons[name] = use or reason if reason in {*STILL_NARROWED, COMPUTED, RECURRENT} else reason or use
    return reasons


UNUSED = "it is never called on the example; taken as unused: no code of the model names it"


def _shared_output(name: str, module: nn.Module, owners: dict[int, list[str]]) -> str | None:
    """Why an attention stays of which the output projection is somebody else's, too."""
    own = {f"{name}.out_proj"}
    others = [other for p in module.get_submodule("out_proj").parameters() for other in owners[id(p)]]
    other = next((other for other in others if other not in own), None)
    return None if other is None else f"the weight of its output projection is shared with '{other}'"


def _forms_that_stay(
    model: nn.Module,
    call: Example,
    reasons: Mapping[str, str | None],
    paths: Sequence[Any],
    forms: Mapping[str, own_forms.Known],
) -> dict[str, str]:
    """Why layers with a plain form stay as they are: on what they are given, or seen from other code, it would not do.

    Args:
        model: the network.
        call: how it is called.
        reasons: why its layers are left alone.
        paths: the inputs.
        forms: what was shown of the plain forms of its layers.
    """
    attentions = [name for name, reason in reasons.items() if reason == ATTENTION]
    stay = unlike_in_use(model, call, attentions, paths)
    unpacked = [name for name, reason in reasons.items() if reason in {ATTENTION, RECURRENT} and name not in stay]
    stay |= _kinds_matter(model, call, unpacked, paths, {})
    others = [name for name, reason in reasons.items() if reason in own_forms.FORMS]
    return stay | own_forms.unlike_in_use(model, call, others, paths, forms)


def _shares_bias_alone(module: nn.Module, name: str, owners: dict[int, list[str]]) -> bool:
    """Whether a module shares its bias, and no other parameter."""
    own = [key for key, p in module._parameters.items() if p is not None and set(owners[id(p)]) != {name}]
    return own == ["bias"]


def _refuse_use(name: str, tied: list[str], calls: dict[str, list[Invocation]], what: str) -> str | None:
    if not name:
        return "the model itself is this layer: wrap it in a torch.nn.Sequential"
    if tied:
        return SHARED_WEIGHT.format(tied[0]).replace("weight", what, 1)
    if not calls.get(name):
        return UNCALLED
    if any(math.prod(call.output) == 0 for call in calls[name]):
        return "its output on the example is empty"
    return None


def _used_otherwise(
    model: nn.Module, call: Example, free: list[str], paths: Sequence[Any], known: LayerAnswers | None = None
) -> tuple[dict[str, str], LayerAnswers]:
    """Why layers cannot be replaced of which other code uses an attribute or asks the kind, on any of the inputs.

    Args:
        model: the network.
        call: how it is called.
        free: the layers.
        paths: the inputs.
        known: what other inputs ask of them.

    Returns:
        Beside the reasons what the other layers are asked, and their replacements have to answer.
    """
    used, answers = read_by_others(model, call, free, paths)
    if paths and paths[0] is call.paths[0]:
        trained, more = read_by_others(model, call, free, paths[:1], training)
        used, answers = trained | used, _both(answers, more)
    answers = _both(known or {}, {name: asked for name, asked in answers.items() if name not in used})
    reasons = {name: _read(name, attribute) for name, attribute in used.items()}
    reasons |= _kinds_matter(model, call, [name for name in free if name not in reasons], paths, answers)
    return reasons, answers


def _kinds_matter(
    model: nn.Module, call: Example, names: list[str], paths: Sequence[Any], answers: LayerAnswers
) -> dict[str, str]:
    """Why layers cannot be replaced of which other code asks the kind."""
    kind = (
        "other code asks what kind of layer '{}' is, or calls it from another place than its own: with a replacement "
        "the model computes something else"
    )
    blamed = kind_matters(model, call, names, paths, answers)
    return {name: FUSED if _is_fused(model, name) else kind.format(name) for name in blamed}


FUSED = (
    "torch's fused encoder fills padded positions with zeros, which other code reads, or is of a class of its own; its "
    "layers alone do not: build it with enable_nested_tensor=False"
)


def _is_fused(model: nn.Module, name: str) -> bool:
    """Whether a layer is in an encoder that may take nested tensors."""
    encoders = (path for path, module in model.named_modules() if nests(module))
    return any(name.startswith(f"{path}." if path else "") for path in encoders)


def _wholes(
    model: nn.Module, call: Example, reasons: Mapping[str, str], keywords: set[str], ties: Ties
) -> tuple[dict[str, str], LayerAnswers]:
    """Why tables, transposed convolutions and layers of one weight cannot be replaced; what the others must answer."""
    names = [name for name, reason in reasons.items() if reason in OF_THEIR_OWN or name in ties]
    kinds = {name: (tied_kind if name in ties else whole_kind)(model.get_submodule(name)) for name in names}
    apart = {name: whole for name, whole in kinds.items() if whole is not None}
    apart |= {name: "it is called with keyword arguments" for name in names if name in keywords}
    used, answers = (
        _used_otherwise(model, call, [n for n in names if n not in apart], call.paths) if names else ({}, {})
    )
    used = in_their_words(model, used) | sized(model, call, list(used), call.paths)
    return for_all(apart | used, ties) | shared_with_others(model, reasons), answers


def _read(name: str, attribute: str) -> str:
    """Why a layer stays of which other code uses an attribute."""
    if attribute in TENSORS:
        return COMPUTED_WITH.format(attribute=attribute, name=name)
    return f"other code reads its attribute '{attribute}', which a replacement for '{name}' would not have"


def _both(first: LayerAnswers, second: LayerAnswers) -> LayerAnswers:
    return {name: {**first.get(name, {}), **second.get(name, {})} for name in (*first, *second)}


def covered(net: Network, model: nn.Module, batches: list[tuple[Any, Any]]) -> Network:
    """The network with regard to the paths that the batches take.

    Raises:
        ModelError: the model cannot be run on a batch.
    """
    before = len(net.example.paths)
    free = [layer for layer in net.layers if layer.skip is None and layer.kind != "StateLinear"]
    others = [layer for layer in net.layers if is_aside(layer)]
    check = StandInCheck(model, net.example, [*free, *others])
    covering(model, net.example, batches, check)
    paths = (*net.example.paths[before:], *check.differing)
    if not paths:
        return net
    net = products_on(model, net.example, net, paths)
    known = {layer.name: layer.answers for layer in free}
    reasons, answers = _used_otherwise(model, net.example, [layer.name for layer in free], paths, known)
    skips = {layer.name: layer.skip for layer in net.layers}
    stay = _forms_that_stay(model, net.example, skips, paths, net.forms)
    layers = tuple(replace(layer, skip=stay.get(layer.name, layer.skip)) for layer in net.layers)
    net = replace(net, layers=layers).skipping(reasons).answering(answers)
    return _wholes_covered(blocks_covered(net, model, paths), model, paths)


def _wholes_covered(net: Network, model: nn.Module, paths: Sequence[Any]) -> Network:
    """The network with regard to what other inputs ask of layers that methods of their own rewrite."""
    names = [layer.name for layer in net.layers if is_aside(layer)]
    if not names:
        return net
    known = {name: net[name].answers for name in names}
    reasons, answers = _used_otherwise(model, net.example, names, paths, known)
    reasons = in_their_words(model, reasons) | sized(model, net.example, list(reasons), paths)
    reasons = for_all(reasons, {layer.name: layer.tied for layer in net.layers if layer.tied})
    layers = tuple(replace(layer, whole=layer.whole or reasons.get(layer.name)) for layer in net.layers)
    return replace(net, layers=layers).answering(answers)


def describe_layer(name: str, module: nn.Module, calls: tuple[Invocation, ...], batch: int) -> Layer:
    """Shapes and settings of one module as a `Layer`; costs and skip reason are the tracer's."""
    weight = getattr(module, "weight", None)
    weight = weight if isinstance(weight, Tensor) else None
    fields: dict[str, Any] = {
        "name": name,
        "kind": base_kind(module),
        "weight": () if weight is None else tuple(weight.shape),
        "bias": isinstance(getattr(module, "bias", None), Tensor),
        "calls": calls,
        "batch": batch,
        "itemsize": 4 if weight is None else weight.element_size(),
        "computed": computed(module),
        "parts": parts_of(module),
    }
    if isinstance(module, SUPPORTED) and not isinstance(module, nn.Linear):
        flat = module._reversed_padding_repeated_twice
        fields |= {
            "stride": tuple(module.stride),
            "padding": tuple((flat[i], flat[i + 1]) for i in range(len(flat) - 2, -1, -2)),
            "dilation": tuple(module.dilation),
            "groups": module.groups,
            "padding_mode": module.padding_mode,
        }
    elif (rule := module_rule(module)) is not None:
        sizes = rule.sizes(module) if rule.held(module) else ()
        alone = rule.mixes and any(rule.parameters[key][1] is None for key in rule.held(module))
        fields |= {"weight": sizes if rule.mixes else sizes[:1], "bias": alone}
    elif isinstance(module, nn.GroupNorm):
        fields["groups"] = module.num_groups
    elif weight is not None and weight.ndim > 2:
        fields["groups"] = groups_of(module)
    return Layer(**fields)

"""`nn.MultiheadAttention` as layers: `taut.nn.Attention` with its weights, and the proof that both compute the same."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from taut.core.copying import deep_copy
from taut.core.example import Example
from taut.core.modes import generator, looked_into
from taut.core.tensors import tensors
from taut.nn.attention import PROJECTIONS, Attention
from taut.structure import in_use
from taut.structure.baking import computed
from taut.structure.coverage import seeded
from taut.structure.sameness import IN_FLOAT64, outputs_match
from taut.structure.support import PACKED

OTHERWISE = f"{PACKED}, and it computes something else than torch's MultiheadAttention"
MORE = f"{PACKED}, and it owns more than torch's MultiheadAttention does"

HELD = {"in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight", "bias_k", "bias_v"}
"""The parameters of `nn.MultiheadAttention`."""

CASES = 2, 3, 4
"""Samples, queries and keys of the calls on which the two are compared."""

FEW = 2
"""Samples of a call of the network's own on which they are compared."""


def unlike(module: nn.MultiheadAttention) -> str | None:
    """Why a module cannot be taken apart; None where layers in its place compute the same.

    Shown by running both in float64 with random weights, in eval and in train mode: self- and cross-attention, masks of
    every kind, with and without weights, one sample alone.
    """
    out, own = module._modules.get("out_proj"), {name for name, p in module._parameters.items() if p is not None}
    more = own - HELD or set(module._modules) - {"out_proj"} or any(b is not None for b in module._buffers.values())
    if more or not isinstance(out, nn.Linear) or computed(out) or (out.bias is None) != (module.in_proj_bias is None):
        return MORE
    held = [*module.parameters(recurse=False), *out.parameters(recurse=False)]
    if len({(p.dtype, p.device) for p in held}) != 1 or not held[0].is_floating_point() or held[0].is_meta:
        return MORE
    plain = Attention(**settings_of(module), device="meta").state_dict()
    if {key: t.shape for key, t in plain.items()} != {
        key: t.shape for key, t in attention_form(module, shared=True).state_dict().items()
    }:
        return MORE
    kind, settings = type(module), settings_of(module)
    if kind is not nn.MultiheadAttention or "forward" in vars(module):
        return _compared(module)
    return _known(kind.forward, **_small(settings))


def _small(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings for as few channels as there may be: what torch's own class computes does not hang on them."""
    heads, widths = settings["num_heads"], [settings[key] for key in ("embed_dim", "kdim", "vdim")]
    sizes = {width: 2 * heads + place for place, width in enumerate(dict.fromkeys(widths))}
    return {**settings, **{key: sizes[settings[key]] for key in ("embed_dim", "kdim", "vdim")}}


@cache
def _known(forward: Any, **settings: Any) -> str | None:
    """What a comparison says of torch's own class; `forward` is its present code."""
    del forward
    return _compared(nn.MultiheadAttention(**settings))


def _compared(module: nn.MultiheadAttention) -> str | None:
    """Why a module computes something else than its layers, as far as random calls tell."""
    random = generator(0)
    wide: Any = deep_copy(module).double()
    with torch.no_grad():
        for parameter in wide.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random, dtype=torch.float64) * 0.3)
    form = attention_form(wide)
    with torch.no_grad(), looked_into(fused=False):
        same = [_same(wide.train(mode), form.train(mode), *call) for call in _calls(wide) for mode in (False, True)]
    return None if all(verdict is not False for verdict in same) and any(same) else OTHERWISE


def unlike_in_use(model: nn.Module, example: Example, names: Sequence[str], paths: Sequence[Any]) -> dict[str, str]:
    """Which modules compute something else than layers in their places on what they are given, and why they stay.

    Args:
        model: the network.
        example: how it is called.
        names: the modules.
        paths: inputs of the network.
    """

    def same(name: str, wide: Any, args: Any, kwargs: Any) -> bool:
        del name
        return bool(_same(wide, attention_form(wide), args, kwargs))

    return dict.fromkeys(in_use.unlike_in_use(model, example, names, paths, same, _few), OTHERWISE)


def attention_form(module: nn.MultiheadAttention, *, shared: bool = False) -> Attention:
    """The layers of which a module consists, with its weights.

    Args:
        module: torch's.
        shared: whether the weights are the module's own memory.
    """
    form = Attention(**settings_of(module), device="meta")
    packed = module.in_proj_weight
    own = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    weights = own if packed is None else list(packed.chunk(3))
    trained = [t.requires_grad for t in (weights if packed is None else [packed] * 3)]
    bias = module.in_proj_bias
    biases = [None] * 3 if bias is None else list(bias.chunk(3))

    def parameter(t: Tensor, *, trained: bool) -> nn.Parameter:
        return nn.Parameter(t.detach() if shared else t.detach().clone(), requires_grad=trained)

    for name, weight, one, learns in zip(PROJECTIONS, weights, biases, trained, strict=True):
        layer = form.get_submodule(name)
        layer.weight = parameter(weight, trained=learns)
        layer.bias = None if one is None else parameter(one, trained=bool(bias.requires_grad))
    for key, value in module.out_proj._parameters.items():
        form.out_proj.register_parameter(key, None if value is None else parameter(value, trained=value.requires_grad))
    for key in ("bias_k", "bias_v"):
        value = getattr(module, key)
        setattr(form, key, None if value is None else parameter(value, trained=value.requires_grad))
    return form.train(module.training)


def packed(form: Attention) -> dict[str, Tensor]:
    """The values of plain layers by the names that torch's module has for them."""
    projections: list[Any] = [form.get_submodule(name) for name in PROJECTIONS]
    weights = [layer.weight for layer in projections]
    held: dict[str, list[Any]] = {
        "in_proj_bias": [layer.bias for layer in projections],
        "out_proj.weight": [form.out_proj.weight],
        "out_proj.bias": [form.out_proj.bias],
        **{f"{name}_weight": [weight] for name, weight in zip(PROJECTIONS, weights, strict=True)},
        **{name: [getattr(form, name)] for name in ("bias_k", "bias_v")},
    }
    if len({weight.shape[1] for weight in weights}) == 1:
        held["in_proj_weight"] = weights
    return {name: torch.cat(parts).detach() for name, parts in held.items() if all(p is not None for p in parts)}


def settings_of(module: nn.MultiheadAttention) -> dict[str, Any]:
    """What `taut.nn.Attention` is made with in a module's place."""
    return {
        "embed_dim": module.embed_dim,
        "num_heads": module.num_heads,
        "dropout": float(module.dropout),
        "bias": module.in_proj_bias is not None,
        "add_bias_kv": module.bias_k is not None,
        "add_zero_attn": bool(module.add_zero_attn),
        "kdim": module.kdim,
        "vdim": module.vdim,
        "batch_first": bool(module.batch_first),
    }


def _same(module: Any, form: Attention, args: Any, kwargs: Any) -> bool | None:
    """Whether both give the same for a call; None where the module does not take it."""
    try:
        with seeded():
            wanted = module.forward(*args, **kwargs)
    except Exception:  # whatever it says to a call that it was not made for
        return None
    try:
        with seeded():
            output = form(*args, **kwargs)
    except Exception:  # a call that only the user's subclass takes
        return False
    both = isinstance(wanted, tuple) and len(wanted) == 2 and (wanted[1] is None) == (output[1] is None)
    return both and outputs_match(tensors(wanted), tensors(output), IN_FLOAT64)


def _calls(module: nn.MultiheadAttention) -> Iterator[tuple[tuple[Tensor, ...], dict[str, Any]]]:
    """Calls of every kind, of random inputs."""
    batch, queries, keys = CASES
    random = generator(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(module.out_proj.weight.device)

    def sequence(length: int, width: int) -> Tensor:
        return draw(batch, length, width) if module.batch_first else draw(length, batch, width)

    padding = draw(batch, keys) > 0.7
    padding[:, 0] = False
    hidden = draw(queries, keys) > 0.7
    hidden[:, 0] = False
    added, each = draw(queries, keys), draw(batch * module.num_heads, queries, keys)
    causal = torch.ones(queries, queries, dtype=torch.bool, device=added.device).triu(1)
    q, k, v = sequence(queries, module.embed_dim), sequence(keys, module.kdim), sequence(keys, module.vdim)
    same = sequence(queries, module.embed_dim)
    for weights in (True, False):
        asked = {"need_weights": weights}
        yield (q, k, v), asked | {"average_attn_weights": False}
        yield (q, k, v), asked | {"key_padding_mask": padding}
        yield (q, k, v), asked | {"attn_mask": hidden, "key_padding_mask": padding}
        yield (q, k, v), asked | {"attn_mask": added}
        yield (q, k, v), asked | {"attn_mask": each, "key_padding_mask": draw(batch, keys)}
        yield (draw(queries, module.embed_dim), draw(keys, module.kdim), draw(keys, module.vdim)), asked
        if module.embed_dim == module.kdim == module.vdim:
            yield (same, same, same), asked
            yield (same, same, same), asked | {"attn_mask": causal, "is_causal": True}


def _few(module: nn.MultiheadAttention, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """A call cut to its first samples, where it is one of several and can be read."""
    try:
        bound = inspect.signature(nn.MultiheadAttention.forward).bind(module, *args, **kwargs)
    except TypeError:
        return args, kwargs
    values = bound.arguments
    if any(not isinstance(values[key], Tensor) or values[key].ndim != 3 for key in ("query", "key", "value")):
        return args, kwargs
    same: dict[int, Tensor] = {}
    for key in ("query", "key", "value"):
        t = values[key]
        values[key] = same.setdefault(id(t), t[:FEW] if module.batch_first else t[:, :FEW])
    for key, rows in (("key_padding_mask", FEW), ("attn_mask", FEW * module.num_heads)):
        mask = values.get(key)
        if mask is not None and (key == "key_padding_mask" or mask.ndim == 3):
            values[key] = mask[:rows]
    return bound.args[1:], bound.kwargs

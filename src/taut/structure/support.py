"""Which modules can be rewritten at all, and the reason in words where they cannot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from taut.nn import GroupedLinear, Product, Rebuilt, Recurrent, StateLinear, mask_of
from taut.structure.baking import computed, leftovers, lost_when_baked
from taut.structure.rules import UNIT, module_rule
from taut.structure.scaled_rows import scale_of
from taut.types import Layer
from taut.types.keep import AS_ASKED

SUPPORTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""The layers that methods rewrite; a subclass counts if it computes the same."""

TRANSPOSED_KINDS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)

UNFACTORIZED = NORMALIZATION, ACTIVATION = (
    "normalization has nothing to factorize",
    "an activation has nothing to factorize",
)
"""Reasons that hold for factorizations alone: such layers may still become narrower with those around them."""

PACKED = "its input projections are one packed parameter"
"""How reasons start why an `nn.MultiheadAttention` is left alone."""

OTHERS: Mapping[type[nn.Module], str] = {
    Rebuilt: "it holds its weight in another form already; its to_plain() is a dense layer",
    _ConvTransposeNd: "transposed convolutions are not factorized",
    nn.Embedding: "an embedding is a table: nothing is multiplied",
    nn.EmbeddingBag: "an embedding is a table: nothing is multiplied",
    nn.RNNBase: "recurrent layers of this kind hold all gates in one parameter",
    nn.RNNCellBase: "recurrent cells hold all gates in one parameter",
    nn.MultiheadAttention: PACKED,
    nn.Bilinear: "bilinear layers are not factorized",
    nn.PReLU: ACTIVATION,
}

OF_THEIR_OWN = TRANSPOSED, TABLE = OTHERS[_ConvTransposeNd], OTHERS[nn.Embedding]
"""Reasons that keep a layer from most methods, but not from those that are made for its kind."""

SHARED_WEIGHT = "its weight is shared with '{}'"
"""Why a layer is left alone that does not hold its weight alone; methods for such layers take all that hold it."""

STILL_NARROWED = (UNIT, *UNFACTORIZED, TRANSPOSED, TABLE)
"""Reasons that keep a layer from being factorized, but not from becoming narrower with those around it."""


COMPUTED = (
    "its weight is computed by a parametrization or a hook (weight norm, prune): taut.compress bakes it; elsewhere "
    "make it permanent first (a step 'bake')"
)
"""Why a layer is left alone until it is baked."""

COMPUTED_INSIDE = (
    "a parametrization or a hook (weight norm, prune) computes a parameter of it, and no step bakes modules of this "
    "kind: make it permanent first"
)
"""Why a layer is left alone that no step bakes."""

BAKED = frozenset(
    "Linear Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d Embedding EmbeddingBag LayerNorm "  # noqa: SIM905
    "RMSNorm GroupNorm BatchNorm1d BatchNorm2d BatchNorm3d InstanceNorm1d InstanceNorm2d InstanceNorm3d SyncBatchNorm "
    "PReLU Bilinear".split()
)
"""Kinds whose parameters are a weight and a bias of known shapes: these are baked."""

LINEAR = (
    "it computes a linear layer in its own way: taut.compress puts an nn.Linear in its place; elsewhere do that first "
    "(a step 'as_linear')"
)
"""Why a layer is left alone until it is an `nn.Linear`."""

CONVOLUTION = (
    "it computes an ordinary convolution in its own way (weights computed, or padding by size): taut.compress puts "
    "that in its place; elsewhere do that first (a step 'as_conv')"
)
"""Why a layer is left alone until it is an ordinary convolution."""

ATTENTION = (
    f"{PACKED}: taut.compress gives it layers of their own for queries, keys and values; elsewhere do that first (a "
    "step 'as_attention')"
)
"""Why an `nn.MultiheadAttention` is left alone until it is a `taut.nn.Attention`."""


RECURRENT = (
    "recurrent layers hold all gates in one parameter: taut.compress gives each weight a layer of its own; elsewhere "
    "do that first (a step 'as_recurrent')"
)
"""Why a recurrent layer is left alone until its weights are layers."""

JOINED = (
    "both directions of it become one layer, and only one of them is trained: train both or none, or name it in 'keep'"
)
"""Why a recurrent layer stays of which a part is frozen."""

MULTIPLIED = (
    "other code multiplies by its weight: taut.compress puts a layer there; elsewhere do that first (a step 'as_layer')"
)
"""Why a weight is left alone until it is a layer."""

UNCALLED = "it is never called on the example (other code may use its weight directly)"

TABLE_READ = (
    "other code multiplies by its weight, or computes with it otherwise: as an output layer take an nn.Linear head "
    "with head.weight = {name}.weight, which is compressed with it"
)
"""Why an embedding stays of which other code uses the weight."""

SHARED_WITH_OTHERS = (
    "its weight is shared with '{name}' of kind {kind}: only embeddings and linear layers of one weight are compressed "
    "together, where nothing else holds it"
)
"""Why a layer stays that holds its weight with what is no embedding and no linear layer."""

SIZED = "it is called with output_size: say the size by output_padding"
"""Why a transposed convolution stays whose output has the size that it is called with."""

COMPUTED_WITH = (
    "other code reads its attribute '{attribute}' and computes with it, so a replacement for '{name}' would not do: "
    "call the layer instead"
)

OTHER_KIND = "modules of type {kind} are not handled"

OVERRIDDEN = "{kind} overrides {name}: it may compute something else"

PARAMETER = "Parameter"
"""The kind of a layer that is a bare parameter, under the parameter's name."""


def base_kind(module: nn.Module) -> str:
    """The class name, or that of the supported layer of which it is a faithful subclass.

    Of a parametrized module that of the class that it had before: torch derives one for each such module.
    """
    for kind in (StateLinear, GroupedLinear, *SUPPORTED):
        if isinstance(module, kind) and _computes_as(module, kind):
            return kind.__name__
    if isinstance(module, nn.Embedding) and not parametrize.is_parametrized(module) and scale_of(module) is not None:
        return nn.Embedding.__name__
    own = type(module)
    return (own.__bases__[0] if parametrize.is_parametrized(module) else own).__name__


def _computes_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    return _overridden(module, kind) is None


def _overridden(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """What a subclass does in its own way: the forward, the call around it, the convolution inside it."""
    names = ("forward", "__call__", "_call_impl", *(("_conv_forward",) if issubclass(kind, _ConvNd) else ()))
    own = vars(module)
    return next((n for n in names if getattr(type(module), n) is not getattr(kind, n) or n in own), None)


def refusal(module: nn.Module) -> str | None:
    """Why a module that owns parameters cannot be rewritten, judged from the module alone; None if it can."""
    if mask_of(module) is not None:
        return "a mask holds its weight: taut.nn.bake the model first"
    if computed(module):
        return (lost_when_baked(module) or COMPUTED) if _holds_weight_alone(module) else COMPUTED_INSIDE
    if parametrize.is_parametrized(module):
        return "a parametrization computes something of it: remove_parametrizations first"
    if module_rule(module) is not None:
        return UNIT
    for known, refuse in ((SUPPORTED, _refuse_supported), (nn.RNNBase, _refuse_recurrent)):
        if isinstance(module, known):
            return refuse(module)
    kinds = (*OTHERS.items(), *((kind, NORMALIZATION) for kind in NORMS))
    other = OTHER_KIND.format(kind=type(module).__name__)
    return next((reason for kind, reason in kinds if isinstance(module, kind)), other)


def whole_kind(module: nn.Module) -> str | None:
    """Why a table or a transposed convolution computes what no two layers do; None where two layers may."""
    kind = next((kind for kind in (nn.Embedding, *TRANSPOSED_KINDS) if isinstance(module, kind)), None)
    if kind is None:
        kind_of_it = type(module).__name__
        return f"only nn.Embedding and torch's transposed convolutions are replaced, and it is of kind {kind_of_it}"
    overridden = _overridden(module, kind)
    if overridden == "forward" and isinstance(module, nn.Embedding) and scale_of(module) is not None:
        overridden = None
    if overridden is not None:
        return f"{type(module).__name__} overrides {overridden}: it may compute something else"
    if isinstance(module, nn.Embedding):
        return None if module.max_norm is None else "it renormalizes its rows at every call (max_norm)"
    return None if module.groups == 1 else "it has groups"


def tied_kind(module: nn.Module) -> str | None:
    """Why a layer that holds its weight together with others does not compute what two layers may; None if it does."""
    if isinstance(module, nn.Embedding):
        reason = refusal(module)
        return whole_kind(module) if reason == TABLE else reason
    return refusal(module)


def is_aside(layer: Layer) -> bool:
    """Whether methods of their own may rewrite a layer that all others leave alone."""
    return is_looked_at(layer) and layer.whole is None


def is_looked_at(layer: Layer) -> bool:
    """Whether it is observed beside the layers that all methods take: one that is given a size loses channels, too."""
    wanted = layer.skip in OF_THEIR_OWN or bool(layer.tied)
    return wanted and layer.whole in {None, SIZED} and layer.skip != AS_ASKED


def _holds_weight_alone(module: nn.Module) -> bool:
    """Whether a module with computed tensors has a weight and a bias of known shapes once they are plain."""
    names = {*computed(module), *module._parameters} - set(leftovers(module))
    others = [child for name, child in module.named_children() if name != "parametrizations"]
    return base_kind(module) in BAKED and names <= {"weight", "bias"} and not others


def _refuse_recurrent(module: Any) -> str:
    """Why a recurrent layer is left alone: for good, or until its weights are layers."""
    kind = next((kind for kind in (nn.LSTM, nn.GRU, nn.RNN) if isinstance(module, kind)), None)
    if kind is None:
        return OTHERS[nn.RNNBase]
    if (overridden := _overridden(module, kind)) is not None:
        return f"{type(module).__name__} overrides {overridden}: it may compute something else"
    if module.proj_size:
        return "recurrent layers that project their hidden states (proj_size) are left as they are"
    own = {**module._parameters, **module._buffers, **module._modules}
    if set(own) != set(module._flat_weights_names) or not all(isinstance(p, nn.Parameter) for p in own.values()):
        return (
            "its weights are no parameters, or it holds others besides: recurrent layers of that kind are not handled"
        )
    if {p.dtype for p in own.values()} & {torch.float16, torch.bfloat16, torch.float32, torch.float64} != {
        module._flat_weights[0].dtype
    }:
        return "recurrent layers with weights of this type are not handled"
    return JOINED if Recurrent.merges_trained(module) else RECURRENT


def _refuse_supported(module: Any) -> str | None:
    weight = module._parameters.get("weight")
    if isinstance(module._modules.get("weight"), Product):
        return "its weight is a layer of its own"
    if not isinstance(weight, nn.Parameter):
        return "its weight is no parameter, but computed by other code: make it one first"
    overridden = [_overridden(module, kind) for kind in (GroupedLinear, *SUPPORTED) if isinstance(module, kind)]
    if all(overridden):
        return OVERRIDDEN.format(kind=type(module).__name__, name=overridden[0])
    if weight.dtype not in {torch.float16, torch.bfloat16, torch.float32, torch.float64}:
        return f"weights of type {str(weight.dtype).removeprefix('torch.')} are not handled"
    if weight.numel() == 0:
        return "its weight is empty"
    return None

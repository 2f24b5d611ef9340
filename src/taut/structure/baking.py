"""Weights that are computed at every call (weight norm, spectral norm, masks of torch's pruning), made plain ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from taut.core.copying import deep_copy
from taut.core.modes import evaluating
from taut.nn import mask_of
from taut.structure.losses import PARTLY_TRAINED, ZEROS, always_zero, partly_trained

HOOKS = WeightNorm, SpectralNorm, BasePruningMethod
"""The objects by which torch's older norms and its pruning compute a tensor before every call."""

LEFTOVERS = "_g", "_v", "_u", "_orig", "_mask"
"""Endings of what such objects keep beside the tensor that they compute."""


def computing_hooks(module: nn.Module) -> Iterator[tuple[int, Any, str]]:
    """Key, hook and name of every tensor that a hook computes before a call."""
    for key, hook in module._forward_pre_hooks.items():
        if isinstance(hook, HOOKS):
            yield key, hook, str(getattr(hook, "_tensor_name", None) or getattr(hook, "name", "weight"))


def computed(module: nn.Module) -> tuple[str, ...]:
    """The tensors of a module that are computed at every call; those of taut's own masks do not count."""
    names = [name for *_, name in computing_hooks(module)]
    if parametrize.is_parametrized(module) and mask_of(module) is None:
        names += list(module.parametrizations)  # type: ignore[arg-type]
    return tuple(dict.fromkeys(names))


def sources(module: nn.Module, name: str) -> list[Tensor]:
    """The parameters from which a tensor is computed, without those of what computes it."""
    if parametrize.is_parametrized(module, name):
        return list(module.parametrizations[name].parameters(recurse=False))  # type: ignore[index, union-attr]
    return [p for key, p in module._parameters.items() if p is not None and key in {name + end for end in LEFTOVERS}]


def _trained_for(module: nn.Module, name: str) -> list[Tensor]:
    """The parameters that change a computed tensor when they are trained."""
    if parametrize.is_parametrized(module, name):
        return list(module.parametrizations[name].parameters())  # type: ignore[index, union-attr]
    return sources(module, name)


def lost_when_baked(module: nn.Module) -> str | None:
    """What a module would lose whose computed tensors become parameters, in words; None: nothing.

    Masks of torch's own pruning are made permanent by being baked, and lose nothing.
    """
    for name in computed(module):
        if partly_trained(_trained_for(module, name)):
            return PARTLY_TRAINED
        if parametrize.is_parametrized(module, name):
            steps: Any = module.parametrizations[name]  # type: ignore[index]
            if all(type(step).__module__.startswith("torch.") for step in steps):
                continue
            originals = [f"parametrizations.{name}.{key}" for key, _ in steps.named_parameters(recurse=False)]
            if _some_zero(module, name) and always_zero(module, originals, lambda copied: _value(copied, name)):  # noqa: B023
                return ZEROS
    return None


def _some_zero(module: nn.Module, name: str) -> bool:
    copied = deep_copy(module)
    with evaluating(copied), torch.no_grad():
        return bool((_value(copied, name) == 0).any())


def leftovers(module: nn.Module) -> frozenset[str]:
    """Names of what stands beside the computed tensors of a module, and goes when they are baked."""
    return frozenset(name + end for name in computed(module) for end in LEFTOVERS)


def baked(module: nn.Module) -> nn.Module:
    """A copy of a module whose computed tensors are parameters, with the values that they have in eval mode.

    Not by torch's own removal: that takes the weight's property from a class which copies of a module share.
    """
    names, gone = computed(module), leftovers(module)
    copied: Any = deep_copy(module)
    with evaluating(copied), torch.no_grad():
        values = {name: _value(copied, name).detach().clone() for name in names}
    trained = {name: any(p.requires_grad for p in _trained_for(copied, name)) for name in names}
    for key, _, _ in list(computing_hooks(copied)):
        del copied._forward_pre_hooks[key]
    if "parametrizations" in copied._modules:
        copied.__class__ = type(copied).__bases__[0]
        del copied._modules["parametrizations"]
    for hooks in (copied._state_dict_hooks, copied._load_state_dict_pre_hooks):
        for key, hook in list(hooks.items()):
            if "torch.nn.utils" in getattr(type(getattr(hook, "hook", hook)), "__module__", ""):
                del hooks[key]
    rest = {key: p for key, p in copied._parameters.items() if key not in gone}
    buffers = {key: b for key, b in copied._buffers.items() if key not in gone}
    for name in names:
        vars(copied).pop(name, None)
    parameters = {name: nn.Parameter(values[name], requires_grad=trained[name]) for name in names}
    order = sorted({*parameters, *rest}, key=lambda name: (name != "weight", name != "bias"))
    copied._parameters = {name: parameters.get(name, rest.get(name)) for name in order}
    copied._buffers = buffers
    plain: nn.Module = copied
    return plain


def _value(module: Any, name: str) -> Tensor:
    """A computed tensor as a forward pass in eval mode would see it."""
    value: Tensor
    for _, hook, mine in computing_hooks(module):
        if mine == name and isinstance(hook, WeightNorm):
            value = hook.compute_weight(module)
            return value
        if mine == name and isinstance(hook, SpectralNorm):
            value = hook.compute_weight(module, do_power_iteration=False)
            return value
        if mine == name:
            value = hook.apply_mask(module)
            return value
    value = getattr(module, name)
    return value

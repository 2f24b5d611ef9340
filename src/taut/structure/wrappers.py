"""Wrappers that are taken off a model: compiled, data parallel, averaged, with the hooks of Accelerate."""

from __future__ import annotations

import sys
from copy import copy
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from taut.core.copying import deep_copy
from taut.errors import ModelError
from taut.structure.admission import check_module


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without its wrappers, at the top or further in; itself where nothing wraps it.

    A compiled module hides its layers from hooks, or compiles these along. Parameters and buffers are the model's own,
    but for those that Accelerate has offloaded: these are loaded into a copy.

    Raises:
        CallError: it is no module.
        ModelError: weights that were offloaded cannot be loaded.
    """
    check_module(model)
    while (inner := wrapped_by(model)) is not None:
        model = inner
    wrappers = [module for module in model.modules() if wrapped_by(module) is not None]
    if wrappers:
        memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
        for wrapper in reversed(wrappers):  # the innermost first: those around it copy what is left of it
            memo[id(wrapper)] = _answering(deep_copy(cast(nn.Module, wrapped_by(wrapper)), memo), wrapper)
        model = deep_copy(model, memo)
    return _without_hooks(model) if any(hasattr(m, "_hf_hook") for m in model.modules()) else model


def wrapped_by(module: nn.Module) -> nn.Module | None:
    """What a wrapper holds, None where it is none; what was taken out of one answers to its names, and is none."""
    inner = getattr(module, "_orig_mod", None)  # of torch.compile
    if isinstance(inner, nn.Module) and inner is not module:
        return inner
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel | AveragedModel):
        return cast(nn.Module, module.module)
    return None


def _answering(inner: nn.Module, wrapper: nn.Module) -> nn.Module:
    """What a wrapper held, which code that knows the wrapper can still ask: for what it holds, and for its settings."""
    held: dict[str, Any] = {key: inner for key, child in wrapper._modules.items() if child is wrapped_by(wrapper)}
    own = {**vars(wrapper), **wrapper._buffers}
    held |= {key: copy(value) for key, value in own.items() if key not in COMMON and _is_setting(value)}
    vars(inner).update({key: value for key, value in held.items() if not hasattr(inner, key)})
    return inner


COMMON = frozenset(vars(nn.Module()))
"""What every module has."""


def _is_setting(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_setting, value))
    return isinstance(value, int | float | str | torch.device | Tensor | None)


def _without_hooks(model: nn.Module) -> nn.Module:
    """A copy without the hooks by which Accelerate moves weights where they are needed, with the weights in place."""
    hooks: Any = sys.modules.get("accelerate.hooks")
    if hooks is None:
        return model
    copied = deep_copy(model, {id(t): t for t in (*model.parameters(), *model.buffers()) if not t.is_meta})
    try:
        hooks.remove_hook_from_module(copied, recurse=True)
    except Exception as error:  # the files of weights on disk may be gone
        raise ModelError(
            f"The weights that Accelerate has offloaded cannot be loaded: {type(error).__name__}: {error}. Load the "
            "model without a device map."
        ) from error
    for module in copied.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, MethodType) and forward.__func__ is type(module).forward:
            del module.forward  # the class has it
    return copied

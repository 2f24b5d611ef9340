"""Models that nothing can be made of as they come: one line that says why, and what to hand in instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from taut.errors import CallError, ModelError

EXPORTED = "an exported program, in which the layers are gone: pass the module that was given to torch.export.export"

SHARDED = "FullyShardedDataParallel", "FSDPModule"


def check_module(model: Any) -> None:
    """Refuse what is no module.

    Raises:
        CallError: with the remedy.
    """
    if isinstance(model, nn.Module):
        return
    if isinstance(model, torch.export.ExportedProgram):
        raise CallError(f"The model is {EXPORTED}.")
    raise CallError(f"The model must be a torch.nn.Module. Got {_got(model)}.")


def _got(model: Any) -> str:
    """What was handed in instead of a module, and what to do."""
    name = type(model).__name__
    if isinstance(model, type):
        return f"the class {model.__name__} instead: pass an object of it, {model.__name__}(...), with its weights"
    if isinstance(model, Mapping):
        return f"{name} instead: where it is a state dict, load it into the model (load_state_dict), and pass that"
    if callable(model):
        return f"{name} instead: wrap it in a module whose forward calls it, with its parameters as attributes"
    return f"{name} instead"


def admit(model: nn.Module) -> None:
    """Refuse a model whose weights are somewhere else, or in a form that nothing here can read.

    Raises:
        ModelError: naming the part and the remedy.
    """
    if isinstance(model, torch.jit.ScriptModule):
        _refuse("(model)", "compiled TorchScript, which cannot be observed", SCRIPTED)
    if isinstance(model, torch.fx.GraphModule) and hasattr(model, "validate_inputs"):
        raise ModelError(f"The model is {EXPORTED}.")
    for name, module in model.named_modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if isinstance(module, torch.jit.ScriptModule):
            _refuse(name, "compiled TorchScript, which cannot be observed", SCRIPTED)
        if not kinds.isdisjoint(SHARDED):
            _refuse(
                name or "(model)", "sharded over processes (FSDP)", "load its full state dict into a model without it"
            )
        if ".quantized" in type(module).__module__ and "torch" in type(module).__module__.split("."):
            _refuse(
                name or "(model)", f"a quantized {type(module).__name__}, with packed integers for weights", QUANTIZED
            )
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        _check_tensor(name, t)


SCRIPTED = "pass the model as it was before torch.jit.script or torch.jit.trace"

QUANTIZED = "compress the model in floating point, and quantize the result"


def _refuse(name: str, what: str, remedy: str) -> None:
    raise ModelError(f"The module '{name}' is {what}: {remedy}.")


def _check_tensor(name: str, t: Tensor) -> None:
    if is_lazy(t):
        raise ModelError(
            f"The {'parameter' if isinstance(t, nn.Parameter) else 'buffer'} '{name}' is not initialized yet: run the "
            "lazy model on an input first."
        )
    if t.is_meta:
        raise ModelError(
            f"The tensor '{name}' is on the meta device and has no values: load the weights first "
            "(model.to_empty(device=...) and load_state_dict, or from_pretrained without a device map)."
        )
    if type(t).__name__ == "DTensor":
        raise ModelError(
            f"The tensor '{name}' is distributed over processes (DTensor): put its full_tensor() into a model of one "
            "process."
        )
    if t.is_quantized or _is_wrapped(t) or "bitsandbytes" in type(t).__module__:
        raise ModelError(f"The tensor '{name}' is a {_kind(t)}, not plain numbers: {QUANTIZED}.")


def _is_wrapped(t: Tensor) -> bool:
    """Whether a tensor runs operations of its own, on what it holds inside."""
    return type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__


def _kind(t: Tensor) -> str:
    return "quantized tensor" if t.is_quantized else type(t.data if type(t) is nn.Parameter else t).__name__

"""Weights held at zero while they train, and plain layers again afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from taut.errors import CallError


class Mask(nn.Module):
    """A parametrization that keeps pruned weights at zero, whatever an optimizer does to them.

    Their gradient is zero; momentum and weight decay do not bring them back.

    Args:
        keep: bool, True where a weight stays; shaped as the weight.
    """

    keep: Tensor

    def __init__(self, keep: Tensor) -> None:
        """See the class."""
        super().__init__()
        self.register_buffer("keep", keep)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight, zero where it is pruned."""
        return torch.where(self.keep, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))


def hold_zeros(model: nn.Module, names: Iterable[str] | None = None) -> nn.Module:
    """Hold the weights of `model` that are zero now at zero, in place, until `bake`; for training loops of your own.

    Args:
        model: a pruned model.
        names: of modules; None: every Linear and convolution.

    Returns:
        The model; layers without a zero, and those whose weight another parametrization computes, are left alone.

    Raises:
        CallError: a name is no module's.
    """
    wanted = None if names is None else {names} if isinstance(names, str) else set(names)
    unknown = sorted((wanted or set()) - {name for name, _ in model.named_modules()})
    if unknown:
        raise CallError(f"The model has no module '{unknown[0]}' whose zeros could be held.")
    for name, module in list(model.named_modules()):
        weight = module._parameters.get("weight")
        if weight is None or weight.ndim < 2 or (name not in wanted if wanted is not None else not _mixes(module)):
            continue
        keep = weight.detach() != 0
        if not bool(keep.all()):
            parametrize.register_parametrization(module, "weight", Mask(keep), unsafe=True)
    return model


def _mixes(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.modules.conv._ConvNd)


def bake(model: nn.Module) -> nn.Module:
    """Take the masks of `hold_zeros` off in place: plain layers again, with zeros in their weights."""
    for module in masked(model).values():
        _bake(module)
    return model


def _bake(module: nn.Module) -> None:
    """The weight with its zeros in the place, and of the identity, of the parameter behind the mask.

    torch's own removal deletes the computed weight from the class, which a copy of the module shares with it.
    """
    held: Any = module.parametrizations
    if len(held) > 1:
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        return
    weight = held["weight"].original
    weight.data = module.weight.detach()  # type: ignore[operator]
    others = dict(module._parameters)
    del module._modules["parametrizations"]
    module.__class__ = type(module).__bases__[0]
    module._parameters.clear()
    for name, parameter in {"weight": weight, **others}.items():
        module.register_parameter(name, parameter)


def masked(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose weight a `Mask` holds, by name."""
    return {name: module for name, module in model.named_modules() if mask_of(module) is not None}


def mask_of(module: nn.Module) -> Mask | None:
    """The mask that holds the weight of this very module, if there is one."""
    if not parametrize.is_parametrized(module, "weight"):
        return None
    held = list(module.parametrizations["weight"])  # type: ignore[index]
    return held[0] if len(held) == 1 and isinstance(held[0], Mask) else None


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that the model will have after `bake`."""
    state = model.state_dict()
    for name, module in masked(model).items():
        prefix = f"{name}." if name else ""
        for key in [key for key in state if key.startswith(f"{prefix}parametrizations.weight.")]:
            del state[key]
        state[f"{prefix}weight"] = module.weight.detach()  # type: ignore[operator]
    return state


def fill_plain(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what `plain_state` gave into a model that may hold masks; they stay."""
    given = dict(state)
    for name in masked(model):
        prefix = f"{name}." if name else ""
        held = f"{prefix}parametrizations.weight"
        given[f"{held}.original"] = given.pop(f"{prefix}weight")
        given[f"{held}.0.keep"] = model.get_buffer(f"{held}.0.keep")
    model.load_state_dict(given)

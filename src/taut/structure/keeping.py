"""Which layers of a model the user wants left alone."""

from __future__ import annotations

from torch import nn

from taut.structure.wrappers import unwrapped, wrapped_by
from taut.types.keep import Candidate, Keep, read_keep


def shares_of(model: nn.Module, keep: Keep) -> dict[str, float]:
    """The share that has to stay of every module that `keep` means, by its name in the model without wrappers.

    Args:
        model: as the user gives it.
        keep: see `taut.types.keep.Keep`.

    Raises:
        CallError: see `read_keep`.
    """
    if keep is None:
        return {}
    modules = list(_walk(model, ""))
    first: dict[int, str] = {}
    for name, module in modules:
        first.setdefault(id(module), name)
    shares = read_keep(keep, [_candidate(name, module) for name, module in modules])
    inner = {name for name, _ in unwrapped(model).named_modules()}
    kept: dict[str, float] = {}
    for name, module in modules:
        own = first[id(module)]  # a layer under two names is one
        if name in shares and own in inner:
            kept[own] = max(shares[name], kept.get(own, 0.0))
    return kept


def _candidate(name: str, module: nn.Module) -> Candidate:
    return Candidate(name, frozenset(kind.__name__ for kind in type(module).__mro__ if kind is not object), module)


def _walk(module: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """All modules, and wrappers under the names of what they hold."""
    inner = wrapped_by(module)
    if inner is not None:
        return [(name, module), *_walk(inner, name)]
    found = [(name, module)]
    for key, child in module._modules.items():
        if child is not None:
            found += _walk(child, f"{name}.{key}" if name else key)
    return found

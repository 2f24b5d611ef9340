"""Which layers of a model the user wants left alone."""

from __future__ import annotations

from torch import nn

from taut.core.text import some
from taut.errors import CallError
from taut.structure.form_parts import parts_of
from taut.structure.wrappers import unwrapped, wrapped_by
from taut.types import Network
from taut.types.keep import Candidate, Keep, read_keep

NUMBERED = "*"
"""Stands for the layers of a weight that code may multiply by: they have numbers, which a trace finds."""


def leaving(net: Network, model: nn.Module, keep: Keep) -> Network:
    """A traced network with what the user wants left alone, or not below a share.

    Args:
        net: what `trace` found in the model.
        model: as the user gives it.
        keep: see `taut.types.keep.Keep`.

    Raises:
        CallError: see `read_keep`; or a weight does not become the layer of this number.
    """
    shares = shares_of(model, keep)
    bare = unwrapped(model)
    known = {*net.parts(), *(name for name, _ in (*bare.named_modules(), *bare.named_parameters()))}
    for name in shares:
        owner, _, number = name.rpartition(".")
        if name not in known and number.isdigit():
            parts = [part for part in net.parts() if part.startswith(f"{owner}.")]
            there = f"Its layers are {some(sorted(parts))}." if parts else "It becomes no layers."
            raise CallError(f"keep= names '{name}', but '{owner}' has no such layer. {there}")
    return net.leaving(shares)


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
    named = _bare_parameters(unwrapped(model))
    candidates = [_candidate(name, module) for name, module in modules]
    candidates += [Candidate(name, frozenset({"Parameter"}), parts=(f"{name}.{NUMBERED}",)) for name in named]
    shares = read_keep(keep, candidates)
    inner = {name for name, _ in unwrapped(model).named_modules()}
    own = {name: first[id(module)] for name, module in modules}  # a layer under two names is one
    own |= {name: name for name in named}
    kept: dict[str, float] = {}
    for name, share in shares.items():
        path = next(path for path in _ways_up(name) if path in own)
        place = own[path] + name.removeprefix(path)
        if not place.endswith(f".{NUMBERED}") and own[path] in {*inner, *named}:
            kept[place] = max(share, kept.get(place, 0.0))
    around = {name: name.rpartition(".")[0] for name in named}
    return {**kept, **{name: max(kept[path], kept.get(name, 0.0)) for name, path in around.items() if path in kept}}


def _bare_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of modules that are not torch's: each may be a layer of its own."""
    return {
        f"{name}.{key}" if name else key: parameter
        for name, module in model.named_modules()
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim > 1 and not type(module).__module__.startswith("torch.nn.modules.")
    }


def _candidate(name: str, module: nn.Module) -> Candidate:
    kinds = frozenset(kind.__name__ for kind in type(module).__mro__ if kind is not object)
    parts = parts_of(module)
    weight = module._parameters.get("weight")
    if not parts and not module._modules and weight is not None and weight.ndim > 1:
        parts = (f"weight.{NUMBERED}",)
    return Candidate(name, kinds, module, tuple(f"{name}.{part}" if name else part for part in parts))


def _ways_up(name: str) -> list[str]:
    """A name, and those of the modules that it stands in, from the innermost on."""
    names = name.split(".")
    return [".".join(names[:count]) for count in range(len(names), -1, -1)]


def _walk(module: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """All modules, and wrappers under the names of what they hold; that again under the wrapper's names for it."""
    inner = wrapped_by(module)
    if inner is not None:
        held = _walk(inner, name)
        return [(name, module), *held, *_as_named_by(module, inner, name, held)]
    named = [(name, module)]
    for key, child in module._modules.items():
        if child is not None:
            named += _walk(child, f"{name}.{key}" if name else key)
    return named


def _as_named_by(
    wrapper: nn.Module, inner: nn.Module, name: str, held: list[tuple[str, nn.Module]]
) -> list[tuple[str, nn.Module]]:
    """What a wrapper holds, under the names that its own state dict has, as "module.head"; none where others have such.

    Args:
        wrapper: around `inner`.
        inner: what it holds.
        name: of both, without the wrapper.
        held: the modules inside, by their names without the wrapper.
    """
    key = next(key for key, child in wrapper._modules.items() if child is inner)
    prefix = f"{name}.{key}" if name else key
    if any(other == prefix or other.startswith(f"{prefix}.") for other, _ in held):
        return []
    rest = [(other.removeprefix(name).removeprefix("."), module) for other, module in held]
    return [(f"{prefix}.{path}" if path else prefix, module) for path, module in rest]

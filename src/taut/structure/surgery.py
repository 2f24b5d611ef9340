"""The only code that edits a network: copies that share tensors, and replacing a layer wherever it occurs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvTransposeNd

from taut.core.copying import deep_copy, modules_of
from taut.errors import CallError
from taut.nn import Skipped, Tied
from taut.nn.answering import Answering, read_attributes
from taut.nn.encoder import FilledEncoder
from taut.structure.baking import computed, computing_hooks
from taut.structure.rules import module_rule
from taut.structure.scaled_rows import scale_of
from taut.structure.support import base_kind
from taut.types import Layer

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
"""What a module remembers of its user's hooks; all of it moves to the replacement."""


def shallow(model: nn.Module) -> nn.Module:
    """A copy of the module tree on the SAME storage, its parameters without gradient: to hook and to probe.

    Nothing is copied but Python objects, so it costs no memory; editing the copy's tree leaves the model alone.
    """
    memo: dict[int, Any] = {}
    for module in modules_of(model):
        for p in module._parameters.values():
            if p is not None and id(p) not in memo:
                memo[id(p)] = nn.Parameter(_usable(p), requires_grad=False)
        for b in module._buffers.values():
            if b is not None and id(b) not in memo:
                memo[id(b)] = b.detach().clone()
    return deep_copy(model, memo)


def _usable(t: Tensor) -> Tensor:
    return t.detach().clone() if t.is_inference() else t.detach()


def clone(model: nn.Module, without: frozenset[str] = frozenset()) -> nn.Module:
    """A deep copy; the weights of the layers named in `without`, soon to be replaced, stay shared.

    Their biases do not: what replaces a layer may go on with its bias, which others may hold, too.
    """
    memo: dict[int, Any] = {}
    for name in without:
        memo |= {id(p): p for p in part(model, name).parameters(recurse=False) if p.ndim > 1}
    return deep_copy(model, memo)


def held_outside(model: nn.Module, names: Collection[str]) -> list[nn.Parameter]:
    """The parameters that modules hold beside those of these names, and beside what is inside of them."""
    found = []
    for path, module in model.named_modules():
        for key, parameter in module._parameters.items():
            name = f"{path}.{key}" if path else key
            if parameter is not None and not any(f"{name}.".startswith(f"{one}.") for one in names):
                found.append(parameter)
    return found


class Bare(nn.Module):
    """A parameter of a module, held as a layer is, so that a layer can take its place.

    Attributes:
        weight: the parameter. keys: the parameters of its owner, in their order.
    """

    def __init__(self, weight: nn.Parameter, keys: tuple[str, ...] = ()) -> None:
        """See the class."""
        super().__init__()
        self.weight, self.keys = weight, keys


def part(model: nn.Module, name: str) -> nn.Module:
    """What goes by a name: a module, or a parameter, which is handed out as `Bare`.

    Raises:
        CallError: neither is there.
    """
    owner, key = _owner(model, name)
    if owner is not None and isinstance(owner._parameters.get(key), nn.Parameter):
        return Bare(owner._parameters[key], tuple(owner._parameters))  # type: ignore[arg-type]
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise CallError(f"The model has no layer '{name}'.") from None


def _owner(model: nn.Module, name: str) -> tuple[nn.Module | None, str]:
    """The module that holds what goes by a name, and its name there."""
    path, _, key = name.rpartition(".")
    try:
        return model.get_submodule(path), key
    except AttributeError:
        return None, key


def hold(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a layer in the place of a parameter, or a parameter (`Bare`) in the place of such a layer."""
    owner, key = _owner(model, name)
    if owner is None:
        raise CallError(f"The model has no layer '{name}'.")
    if not isinstance(module, Bare):
        owner._parameters.pop(key, None)
        owner._modules[key] = module
        return
    owner._modules.pop(key, None)
    held = {**owner._parameters, key: module.weight}
    first = [k for k in module.keys if k in held]
    owner._parameters = {k: held[k] for k in (*first, *(k for k in held if k not in first))}


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` wherever the layer `name` occurs; it takes over hooks, train flag and frozen parameters.

    Raises:
        CallError: there is no layer `name`, or it is the model itself.
    """
    old = part(model, name)
    if isinstance(old, Bare) or isinstance(module, Bare):
        module.train(getattr(_owner(model, name)[0], "training", True))
        hold(model, name, module)
        return
    if old is model:
        raise CallError("The model itself is a single layer and cannot be replaced: wrap it in a torch.nn.Sequential.")
    carry(old, module)
    swap(model, old, module)


def swap(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` at every place of the tree where `old` stands."""
    swap_all(model, [(old, new)])


def swap_all(model: nn.Module, pairs: Sequence[tuple[nn.Module, nn.Module]]) -> None:
    """Put the second of each pair at every place of the tree where the first stands, in one walk through it."""
    wanted = {id(old): new for old, new in pairs}
    for parent in list(modules_of(model)):
        for key, child in list(parent._modules.items()):
            if id(child) in wanted:
                parent._modules[key] = wanted[id(child)]
    for encoder in modules_of(model):
        if isinstance(encoder, nn.TransformerEncoder):
            _settle(encoder)


def _settle(encoder: nn.TransformerEncoder) -> None:
    """Keep nested tensors from an encoder of which some layer has something else than torch's own layers inside.

    Its fused path asks the first layer alone, and hands such tensors to all of them. What it gives at padded positions
    stays, but for classes of a user's own.
    """
    kinds = {"linear1": nn.Linear, "linear2": nn.Linear, "self_attn": nn.MultiheadAttention}
    parts = ((getattr(layer, name, None), kind) for layer in encoder.layers for name, kind in kinds.items())
    plain = all(part is None or issubclass(type(part), kind) for part, kind in parts)
    before = vars(encoder).get(NESTED)
    if not plain and before is None:
        nested = getattr(encoder, "use_nested_tensor", False)
        setattr(encoder, NESTED, nested)
        encoder.use_nested_tensor = False
        if nested and type(encoder) is nn.TransformerEncoder:
            encoder.__class__ = FilledEncoder
    elif plain and before is not None:
        encoder.use_nested_tensor = before
        delattr(encoder, NESTED)
        if type(encoder) is FilledEncoder:
            encoder.__class__ = nn.TransformerEncoder  # type: ignore[assignment]


def nests(module: nn.Module) -> bool:
    """Whether a module is an encoder that takes nested tensors, or gives what one gives."""
    return isinstance(module, FilledEncoder) or bool(getattr(module, "use_nested_tensor", False))


def renumber(model: nn.Module, numbers: Mapping[str, Sequence[int]]) -> None:
    """Let modules hold other whole numbers, such as how many heads they have.

    Args:
        model: is changed.
        numbers: "module.attribute" -> what it is, and what it is to be.

    Raises:
        CallError: a module does not hold such a number; then none is changed.
    """
    for key, (before, _) in numbers.items():
        owner, attribute = _owner(model, key)
        value = None if owner is None else vars(owner).get(attribute)
        if type(value) is not int or value != before:
            raise CallError(f"'{key}' of the model is {value!r}, and not {before}.")
    for key, (_, after) in numbers.items():
        owner, attribute = _owner(model, key)
        held = vars(owner)
        first = {attribute: held[attribute], **held.pop(NUMBERED, {})}
        held[attribute] = after
        if changed := {name: number for name, number in first.items() if held[name] != number}:
            held[NUMBERED] = changed


def renumbered(model: nn.Module) -> str | None:
    """The first module that holds other whole numbers than it was made with, as far as `renumber` changed them."""
    return next((name for name, module in model.named_modules() if NUMBERED in vars(module)), None)


def answering(module: nn.Module, layer: Layer) -> nn.Module:
    """A replacement that answers what other code asks of the layer; itself where nobody asks, or it does anyway."""
    if not layer.answers or isinstance(module, Skipped):
        return module
    if isinstance(module, Answering):
        module.answers.update(layer.answers)
        return module
    if base_kind(module) == layer.kind:
        narrower = tuple(module.weight.shape[:2]) != layer.weight[:2] if isinstance(module.weight, Tensor) else True
        if narrower or read_attributes(module, set(layer.answers)) == layer.answers:
            return module  # what is narrower is asked for its own sizes
    parts = dict(module.named_children()) if type(module) is nn.Sequential else {"0": module}
    return Answering(OrderedDict(parts), answers=layer.answers)


def carry(old: nn.Module, new: nn.Module) -> None:
    """Hand hooks, train flag, frozen state, and the settings of a batch norm, to a layer's replacement."""
    gone = {key for key, *_ in computing_hooks(old)}
    for attribute in HOOKS:
        hooks = getattr(old, attribute, {}).items()
        getattr(new, attribute).update({key: hook for key, hook in hooks if key not in gone})
    new._is_full_backward_hook = old._is_full_backward_hook
    new.train(old.training)
    carry_settings(old, new)
    for key in ("weight", "bias"):
        value = None if key in computed(old) else getattr(old, key, None)
        if isinstance(value, Tensor) and not value.requires_grad:
            for name, parameter in new.named_parameters():
                if name.endswith("bias") == (key == "bias"):  # a weight may have become values, codes, scales
                    parameter.requires_grad = False


def forget_hooks(module: nn.Module) -> None:
    """Leave the hooks of a layer to its replacement."""
    for attribute in HOOKS:
        getattr(module, attribute).clear()


NUMBERED = "numbers_before"
"""The attribute that says which whole numbers a module held before heads went."""

NESTED = "nested_before"
"""The attribute that says whether an encoder used nested tensors before."""

SETTINGS: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (_NormBase, ("eps", "momentum", "track_running_stats")),
    ((nn.LayerNorm, nn.RMSNorm, nn.GroupNorm), ("eps",)),
    (_ConvTransposeNd, ("stride", "padding", "output_padding", "dilation", "padding_mode")),
    (nn.Embedding, ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")),
)
"""What a layer of the same kind takes over, since no shape tells it."""


def carry_settings(old: Any, new: Any) -> None:
    """Settings of a layer whose replacement is of its own kind, but narrower, or holds one that is."""
    if isinstance(new, Tied):
        new.scale = (scale_of(old) if isinstance(old, nn.Embedding) else None) or 1.0
        new = new.table
    for kind, keys in SETTINGS:
        if isinstance(old, kind) and isinstance(new, kind):
            for key in keys:
                setattr(new, key, getattr(old, key))
    if isinstance(old, _NormBase) and isinstance(new, _NormBase):
        for key, value in old._buffers.items():
            if value is None:
                new._buffers[key] = None
            elif new._buffers.get(key) is None:
                new._buffers[key] = torch.zeros(new.num_features if value.ndim else ()).to(value)


def locate(model: nn.Module, layer: Layer) -> str:
    """Where the layer stands now: its own name, or inside what an earlier step put there.

    Raises:
        CallError: nothing of the layer's kind and shape is found under its name.
    """
    here = part(model, layer.name)
    if layer.summed:
        place = layer.name if isinstance(here, Bare) else f"{layer.name}.weight"
        weight = here.weight if isinstance(here, Bare) else here._parameters.get("weight")
        if isinstance(weight, Tensor) and tuple(weight.shape) == layer.weight:
            return place
        raise CallError(f"Layer '{layer.name}' is no {layer.kind} of shape {layer.weight} (any more).")
    if not layer.weight and type(here).__name__ == layer.kind:
        return layer.name  # a norm without parameters
    rule = module_rule(here)
    if rule is not None and layer.weight == rule.sizes(here)[: len(layer.weight)]:
        return layer.name
    for path, module in here.named_modules():
        weight = None if isinstance(module, Answering) else getattr(module, "weight", None)
        if isinstance(weight, Tensor) and tuple(weight.shape) == layer.weight:
            return f"{layer.name}.{path}" if path else layer.name
    raise CallError(f"Layer '{layer.name}' is no {layer.kind} of shape {layer.weight} (any more).")

"""What users say of their own operators and modules: what these do to channels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from taut.errors import CallError, ModelError

KINDS = ("elementwise", "resizes", "concatenates", "reshapes", "mixes")
"""What an operator may do to channels, in words: see `register_channel_rule`."""

WITH_PARAMETERS = ("elementwise", "resizes", "mixes")

UNIT = "a channel rule says what it does: nothing to factorize"
"""The reason why modules with a rule are not factorized; they may still become narrower."""

Rule = str | Callable[..., Any]


Axes = tuple[int | None, int | None]
"""Of a parameter, on which its outputs lie and on which its inputs."""

OUTPUTS, INPUTS = "outputs", "inputs"


@dataclass(frozen=True, eq=False)
class ChannelRule:
    """A rule as it was registered; `remove` forgets it.

    Attributes:
        target: what it is for. name: of that. rule: see `register_channel_rule`.
        parameters: of a module, with the axes on which channels lie. attributes: that hold the number of channels, of
            the "outputs" or of the "inputs".
    """

    target: Any
    name: str
    rule: Rule
    parameters: Mapping[str, Axes] = field(default_factory=dict)
    attributes: Mapping[str, str] = field(default_factory=dict)

    def remove(self) -> None:
        """Forget the rule."""
        for key in [key for key, known in _RULES.items() if known is self]:
            del _RULES[key]

    @property
    def mixes(self) -> bool:
        """Whether a module gives channels of its own."""
        return self.rule == "mixes"

    def held(self, module: nn.Module) -> dict[str, Tensor]:
        """The parameters and buffers of a module that have values of channels."""
        own = {**module._parameters, **module._buffers}
        return {key: t for key in self.parameters if isinstance(t := own.get(key), Tensor)}

    def check(self, module: nn.Module) -> None:
        """Refuse names that a module does not have.

        Raises:
            ModelError: there is one.
        """
        for key in (*self.parameters, *self.attributes):
            if not hasattr(module, key):
                own = ", ".join({**module._parameters, **module._buffers}) or "none"
                raise ModelError(
                    f"The channel rule of {self.name} names '{key}', which a {self.name} does not have. Its parameters "
                    f"and buffers: {own}. Register the rule with the names of the class."
                )

    def sizes(self, module: nn.Module) -> tuple[int, int]:
        """How many outputs and inputs a module has by its parameters; equal for values per channel, 0 where none are.

        Raises:
            ModelError: its parameters do not say the same.
        """
        found: list[int] = []
        for side in range(2):
            sizes = {f"'{key}'": t.shape[ax] for key, t, axes in self._axes(module) if (ax := axes[side]) is not None}
            if len(set(sizes.values())) > 1:
                lengths = ", ".join(f"{key} {size}" for key, size in sizes.items())
                raise ModelError(f"The channel rule of {self.name} names parameters of different lengths: {lengths}.")
            found.append(next(iter(sizes.values()), 0))
        return (found[0], found[1]) if self.mixes else (found[0], found[0])

    def narrowed(self, module: nn.Module, outputs: Tensor, inputs: Tensor) -> nn.Module:
        """A copy of a module with some of its channels.

        Args:
            module: to be made narrower.
            outputs: indices of those that stay.
            inputs: likewise, where it gives channels of its own.

        Raises:
            ModelError: an attribute does not hold their number.
        """
        sizes, built = self.sizes(module), copy.deepcopy(module)
        for key, t, axes in self._axes(module):
            part = t.detach()
            for axis, index in zip(axes, (outputs, inputs), strict=True):
                part = part if axis is None else part.index_select(axis, index.to(t.device))
            if key in module._parameters:
                built._parameters[key] = nn.Parameter(part, requires_grad=t.requires_grad)
            else:
                built._buffers[key] = part
        for key, side in self.attributes.items():
            width, now = (sizes[1], len(inputs)) if side == INPUTS else (sizes[0], len(outputs))
            setattr(built, key, self._attribute(module, key, width, now))
        return built

    def silence(self, module: nn.Module, side: str, index: Tensor) -> None:
        """Set the values of some outputs, or of some inputs, to zero in place."""
        for _, t, axes in self._axes(module):
            axis = axes[1] if side == INPUTS else axes[0]
            if axis is not None:
                t.data.index_fill_(axis, index.to(t.device), 0)

    def weight(self, module: nn.Module, side: str) -> Tensor:
        """The values of a module's outputs, or of its inputs, a row for each."""
        rows = [
            t.detach().movedim(axis, 0).flatten(1)
            for _, t, axes in self._axes(module)
            if None not in axes and (axis := axes[1] if side == INPUTS else axes[0]) is not None
        ]
        return torch.cat(rows, 1).cpu()

    def _axes(self, module: nn.Module) -> list[tuple[str, Tensor, Axes]]:
        held = self.held(module)
        for key, t in held.items():
            for axis in self.parameters[key]:
                if axis is not None and not -t.ndim <= axis < t.ndim:
                    raise ModelError(
                        f"The channel rule of {self.name} names axis {axis} of '{key}', which has the shape "
                        f"{tuple(t.shape)}."
                    )
        return [(key, t, self.parameters[key]) for key, t in held.items()]

    def _attribute(self, module: nn.Module, key: str, width: int, now: int) -> Any:
        """The number of channels, alone or at the end of a shape, in the place of what an attribute holds."""
        value = getattr(module, key, None)
        if value == width:
            return now
        if isinstance(value, tuple | list | torch.Size) and len(value) and value[-1] == width:
            return type(value)((*value[:-1], now))
        raise ModelError(
            f"The channel rule of {self.name} names the attribute '{key}' for its {width} channels. It is {value!r}."
        )


_RULES: dict[Any, ChannelRule] = {}
"""By operator (of torch's dispatcher), autograd function or class of modules."""


def register_channel_rule(
    target: Any,
    rule: Rule,
    *,
    parameters: Mapping[str, int | tuple[int, int]] | None = None,
    attributes: Collection[str] | Mapping[str, str] = (),
) -> ChannelRule:
    """Say what an operator or a module does to channels, so that they may be taken out around it.

    Nothing is believed: like every other cut, channels that go with a rule are tried out, and those for which the
    narrower network does not compute the same stay, with a reason that names the rule.

    Args:
        target: a custom operator (`torch.ops.mylib.scale`, one of its overloads, or what `torch.library.custom_op`
            gives), a subclass of `torch.autograd.Function`, or a class of modules, which is then looked at from
            outside only. An operator that is registered already gets the new rule.
        rule: "elementwise": every output from the same channel of the inputs, which broadcast. "resizes": the same, of
            one input, and axes without channels may have other lengths. "concatenates": the inputs one behind the other
            on the axis that grows. "reshapes": the elements of one input in the same order in another shape. "mixes":
            all channels of all inputs. Or a function that is called as the target is, with a tensor of whole numbers
            in the place of every tensor (each element the number of its channel) or None where there are no channels,
            and gives the like for every output: the same number for the same channel, -1 for what is none.
        parameters: of a class of modules its parameters and buffers with values of channels. Where it is "elementwise"
            or "resizes" with the axis on which these lie: {"weight": 0, "bias": 0}. Where it "mixes" channels with
            those of the outputs and of the inputs: {"weight": (0, 1), "bias": 0}; then it becomes narrower on both
            sides, as a layer of torch does.
        attributes: of these modules, that hold the number of channels, alone or as the end of a shape; where it mixes
            them, of which: {"width": "outputs", "fan_in": "inputs"}.

    Returns:
        The rule; its `remove()` forgets it.

    Raises:
        CallError: the target or the rule is nothing of this kind.
    """
    if not (rule in KINDS if isinstance(rule, str) else callable(rule)):
        raise CallError(f"A channel rule is one of {', '.join(KINDS)}, or a function. Got {rule!r:.60} instead.")
    name = _name_of(target)
    if (parameters or attributes) and not (_is_module(target) and rule in WITH_PARAMETERS):
        raise CallError(
            f"parameters= and attributes= are for classes of modules that are one of {', '.join(WITH_PARAMETERS)}."
        )
    mixes = rule == "mixes"
    if not isinstance(parameters, Mapping | None):
        raise CallError(
            'parameters= maps names of the module\'s own parameters to the axis of their channels, as {"weight": 0}. '
            f"Got {parameters!r:.60} instead."
        )
    axes = {key: _checked_axes(key, axis, mixes=mixes) for key, axis in (parameters or {}).items()}
    if mixes and axes and all(inputs is None for _, inputs in axes.values()):
        raise CallError('A module that mixes channels needs a parameter with both: parameters={"weight": (0, 1)}.')
    named = attributes if isinstance(attributes, Mapping) else dict.fromkeys(attributes, OUTPUTS)
    if (mixes and not isinstance(attributes, Mapping) and named) or not set(named.values()) <= {OUTPUTS, INPUTS}:
        raise CallError(f"attributes= says of each whether it is of the outputs or of the inputs. Got {attributes!r}.")
    registered = ChannelRule(target, name, rule, axes, dict(named))
    for key in _keys_of(target):
        _RULES[key] = registered
    return registered


def _checked_axes(key: Any, axis: Any, *, mixes: bool) -> Axes:
    """The axes of a parameter's outputs and inputs.

    Raises:
        CallError: they are written otherwise.
    """
    pair = axis if isinstance(axis, tuple) and mixes else (axis, None)
    whole = len(pair) == 2 and type(pair[0]) is int and type(pair[1]) in {int, type(None)}
    if not isinstance(key, str) or not key.isidentifier() or not whole or pair[0] == pair[1]:
        raise CallError(
            f"parameters= maps names of the module's own parameters to the axis of its channels, or, where it mixes "
            f"them, to those of outputs and inputs. Got {key!r}: {axis!r}."
        )
    return pair[0], pair[1]


def operator_rule(func: Any) -> ChannelRule | None:
    """The rule of an operator of torch's dispatcher, None where there is none."""
    return (_RULES.get(func) or _RULES.get(func.overloadpacket)) if _RULES else None


PER_CHANNEL = ChannelRule(
    _NormBase,
    "batch and instance norms",
    "elementwise",
    dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (0, None)),
    {"num_features": OUTPUTS},
)
"""Of norms channel by channel that compute in their own way, as timm's BatchNormAct2d, with an activation inside."""


def module_rule(module: nn.Module) -> ChannelRule | None:
    """The rule of a module: of its class, or of one that this derives from without another forward."""
    kind: Any = next((kind for kind in type(module).__mro__ if kind in _RULES), None) if _RULES else None
    if kind is not None and type(module).forward is kind.forward and "forward" not in vars(module):
        return _RULES[kind]
    return PER_CHANNEL if _is_norm_of_its_own(module) else None


def _is_norm_of_its_own(module: nn.Module) -> bool:
    """Whether a norm channel by channel has another forward than torch's, and no tensor beside torch's."""
    if not isinstance(module, _NormBase) or type(module).__module__.startswith("torch.nn."):
        return False
    known: Any = next(kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn."))
    tensors = {name for name, t in (*module.named_parameters(), *module.named_buffers()) if t.ndim}
    return type(module).forward is not known.forward and tensors <= set(PER_CHANNEL.parameters)


def function_rules() -> list[ChannelRule]:
    """The rules of autograd functions."""
    return [known for key, known in _RULES.items() if _is_function(key)]


def narrowed_unit(module: nn.Module, outputs: Tensor, inputs: Tensor) -> nn.Module | None:
    """A copy of a module with some of its channels; None for modules without a rule."""
    rule = module_rule(module)
    return None if rule is None else rule.narrowed(module, outputs, inputs)


def _is_module(target: Any) -> bool:
    return isinstance(target, type) and issubclass(target, nn.Module)


def _is_function(target: Any) -> bool:
    return isinstance(target, type) and issubclass(target, torch.autograd.Function)


def _keys_of(target: Any) -> list[Any]:
    """What a target is known by."""
    packet = getattr(target, "_opoverload", target)  # of torch.library.custom_op
    if isinstance(packet, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return [packet]
    if _is_function(target) and target is not torch.autograd.Function:
        return [target]
    if _is_module(target) and not target.__module__.startswith("torch.nn."):
        return [target]
    raise CallError(
        f"A channel rule is for an operator of torch.library (torch.ops.mylib.name), a subclass of "
        f"torch.autograd.Function or a class of modules of your own. Got {target!r:.80} instead; "
        + (
            "what torch itself does to channels is known."
            if isinstance(target, type)
            else "of a plain function every operation in it is seen: register the unknown ones, or make it a module."
        )
    )


def _name_of(target: Any) -> str:
    (key,) = _keys_of(target)
    return key.__name__ if isinstance(key, type) else str(key)

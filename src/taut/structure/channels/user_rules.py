"""What a rule of the user's does to the labels of an operator's or a module's tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from taut.core.files import one_line
from taut.core.tensors import map_tensors, tensors
from taut.structure.channels.labels import Labels, compact, varying
from taut.structure.channels.layer_rules import Sides
from taut.structure.channels.op_calls import FIXED, MIXES, Call
from taut.structure.channels.op_rules import join, meet_all, view
from taut.structure.rules import ChannelRule, function_rules


@dataclass(frozen=True)
class UserCall(Call):
    """A call of a module or of an autograd function; `func` is its name."""

    @property
    def name(self) -> str:
        """Of the module's class or of the function."""
        return str(self.func)


def follow(rule: ChannelRule, call: Call) -> None:
    """Label what an operator or a module with a rule gave; where the rule does not fit, the channels stay."""
    for t in call.made:  # what it makes of constants is not known
        call.labels.come(t, crossed=True if t.is_floating_point() or t.is_complex() else None)
    if not any(call.labels.held(t) for t in call.inputs):
        call.give_all(None)
        return
    try:
        with torch.no_grad():
            PRESETS[rule.rule](call) if isinstance(rule.rule, str) else _called(rule.rule, call)
    except Exception as error:
        call.give_up(_plain(f"the channel rule of {rule.name} does not fit: {type(error).__name__}: {one_line(error)}"))
    for t in call.made:
        label = call.labels.of(t)
        if label is not None:
            call.labels.ruled.append((compact(label).flatten(), rule.name))


def follow_module(rule: ChannelRule, module: nn.Module, sides: Sides, args: tuple[Any, Any], output: Any) -> None:
    """Label what a module with a rule gave, and note the channels that it holds values for.

    Args:
        rule: of its class.
        module: itself.
        sides: where these are noted.
        args: all that it was called with, by place and by name.
        output: what it gave.
    """
    call = UserCall(sides.labels, rule.name, args[0], args[1], tensors(args), tensors(output))
    rule.check(module)
    if not rule.held(module):
        follow(rule, call)
    elif rule.mixes:
        _given(rule, module, sides, call)
    elif _passed(rule, module, sides, call):
        follow(rule, call)
    else:
        call.give_all(None)


def _given(rule: ChannelRule, module: nn.Module, sides: Sides, call: Call) -> None:
    """Note which channels a module reads, and label those that it gives."""
    outputs, inputs = rule.sizes(module)
    call.labels.come(call.made[0], crossed=False)
    if len(call.inputs) != 1 or len(call.made) != 1:
        return call.give_up(f"the channel rule of {rule.name} is for one input and one output")
    x, made = call.inputs[0], call.made[0]
    axes = [
        axis
        for axis in range(made.ndim)
        if x.ndim == made.ndim and (x.shape[axis], made.shape[axis]) == (inputs, outputs)
    ]
    label = call.labels.of(x)
    if label is not None:
        axes = [axis for axis in axes if varying(label) == [axis]] or axes
    if len(axes) != 1:
        sides.fixed()
        return call.give_up(f"the channel rule of {rule.name} does not say on which axis they lie")
    columns = sides.arriving(x, axes[0])
    if columns is not None:
        sides.read("in", columns)
    outputs_given = sides.given(outputs)
    call.labels.ruled.append((outputs_given, rule.name))
    if columns is not None:
        call.labels.ruled.append((columns, rule.name))
    return call.labels.put(made, outputs_given.reshape([-1 if axis == axes[0] else 1 for axis in range(made.ndim)]))


def _passed(rule: ChannelRule, module: nn.Module, sides: Sides, call: Call) -> bool:
    """Note which channels a module holds values for; whether there are any that may go."""
    x = next((t for t in call.inputs if call.labels.held(t)), None)
    label = None if x is None else call.labels.of(x)
    if x is None or label is None:
        sides.fixed()
        return False
    axes, width = varying(label), rule.sizes(module)[0]
    if len(axes) != 1 or x.shape[axes[0]] != width:
        where = "several axes" if len(axes) > 1 else f"an axis of {x.shape[axes[0]] if axes else 1}"
        call.give_up(_plain(f"the channel rule of {rule.name} has values for {width}, but they lie on {where}"))
        sides.fixed()
        return False
    columns = sides.arriving(x, axes[0])
    if columns is None:
        return False
    sides.read("through", columns)
    return True


@contextmanager
def watched_functions(labels: Labels, outside: Callable[[int], bool]) -> Iterator[None]:
    """Follow the rules of autograd functions while a network runs.

    Args:
        labels: of all tensors.
        outside: counts how deep the run is inside of what is not looked into, and says whether that is not at all.
    """
    before = [(rule, rule.target, rule.target.__dict__.get("forward")) for rule in function_rules()]
    for rule, target, _ in before:
        target.forward = staticmethod(_watched(rule, target.forward, labels, outside))
    try:
        yield
    finally:
        for _, target, own in before:
            if own is None:
                del target.forward
            else:
                target.forward = own


def _watched(rule: ChannelRule, forward: Any, labels: Labels, outside: Callable[[int], bool]) -> Any:
    """The forward of an autograd function, with a look at what it is called with and gives."""

    def run(*args: Any, **kwargs: Any) -> Any:
        outside(1)
        try:
            output = forward(*args, **kwargs)
        finally:
            free = outside(-1)
        if free:
            with torch._C._DisableTorchDispatch():  # labels have none themselves
                arguments = tuple(a for a in args if not isinstance(a, torch.autograd.function.FunctionCtx))
                follow(
                    rule, UserCall(labels, rule.name, arguments, kwargs, tensors((arguments, kwargs)), tensors(output))
                )
        return output

    return run


def _resized(call: Call) -> None:
    """One input, of which the axes without channels may have another length."""
    x = _only(call)
    label = call.labels.of(x)
    if label is None:
        return
    for t in call.made:
        if t.ndim != label.ndim:
            raise ValueError(f"it has {t.ndim} axes in the place of {label.ndim}")
        changed = {axis for axis in range(t.ndim) if t.shape[axis] != label.shape[axis]}
        if changed & set(varying(label)):
            raise ValueError("the axis of the channels has another length")
        part = label
        for axis in changed:
            part = part.narrow(axis, 0, 1)
        call.labels.put(t, part)


def _concatenated(call: Call) -> None:
    """All inputs one behind the other."""
    (made,) = call.made
    shapes = [tuple(t.shape) for t in call.inputs]
    if any(len(shape) != made.ndim for shape in shapes):
        raise ValueError("its inputs have other numbers of axes than the output")
    totals = [sum(sizes) for sizes in zip(*shapes, strict=True)]
    axes = [
        axis
        for axis in range(made.ndim)
        if totals[axis] == made.shape[axis]
        and all(shape[a] == made.shape[a] for shape in shapes for a in range(made.ndim) if a != axis)
    ]
    if len(axes) != 1:
        raise ValueError(f"inputs of {', '.join(map(str, shapes))} are not {tuple(made.shape)} one behind the other")
    join(replace(call, args=(call.inputs, axes[0]), kwargs={}))


def _reshaped(call: Call) -> None:
    """One input in another shape."""
    x = _only(call)
    if len(call.made) != 1 or call.made[0].numel() != x.numel():
        raise ValueError("the output has another number of elements")
    view(replace(call, args=(x,), kwargs={}))


def _mixed(call: Call) -> None:
    call.give_up("{op} mixes them, as its channel rule says")


def _only(call: Call) -> Tensor:
    held = [t for t in call.inputs if call.labels.held(t)]
    if len(held) != 1:
        raise ValueError(f"{len(held)} inputs have channels")
    return held[0]


PRESETS: dict[str, Callable[[Call], None]] = {
    "elementwise": meet_all,
    "resizes": _resized,
    "concatenates": _concatenated,
    "reshapes": _reshaped,
    "mixes": _mixed,
}


def _called(rule: Callable[..., Any], call: Call) -> None:
    """What a function of the user's makes of the numbers of channels."""

    def numbers(t: Tensor) -> Any:
        label = call.labels.of(t)
        return None if label is None else label.clone(memory_format=torch.contiguous_format)

    args, kwargs = map_tensors(numbers, (tuple(call.args), dict(call.kwargs)))
    results = rule(*args, **kwargs)
    results = list(results) if isinstance(results, list | tuple) else [results]
    if len(results) != len(call.made):
        raise ValueError(f"it gives {len(results)} results for {len(call.made)} outputs")
    known = torch.cat([compact(label).flatten() for t in call.inputs if (label := call.labels.of(t)) is not None])
    labels = [_checked(call, known, result, t) for result, t in zip(results, call.made, strict=True)]
    left = [compact(label).flatten() for label in labels if label is not None]
    gone = known[~torch.isin(known, torch.cat(left))] if left else known
    call.pin(gone, MIXES)
    for t, label in zip(call.made, labels, strict=True):
        call.labels.put(t, label)


def _checked(call: Call, known: Tensor, result: Any, made: Tensor) -> Tensor | None:
    """A label as a rule gave it; what is none of the channels that went in gets numbers that stay."""
    if result is None:
        return None
    if not isinstance(result, Tensor) or result.is_floating_point():
        raise TypeError(f"it gives {type(result).__name__} in the place of whole numbers")
    label = result.long().expand(made.shape)
    other = label < 0
    if not bool(torch.isin(label[~other], known).all()):
        raise ValueError("it gives numbers that did not go in")
    if not bool(other.any()):
        return label
    axes = varying(label)
    axis = axes[0] if len(axes) == 1 else 0
    if len(axes) > 1:
        raise ValueError("what is no channel lies beside channels on several axes")
    fresh = call.labels.atoms.fresh(made.shape[axis], FIXED.format(op=call.name))
    shape = [-1 if a == axis else 1 for a in range(made.ndim)]
    return torch.where(other, fresh.reshape(shape), label)


def _plain(reason: str) -> str:
    """A reason in which no brackets mean anything."""
    return reason.replace("{", "{{").replace("}", "}}")

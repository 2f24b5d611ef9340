"""Channel orders folded into the neighbouring layers: the network computes the same, and no channel is moved any more.

Which layers read a `Reorder`, and which one feeds it, is read off labelled channels (`channels.runs`); whether taking
over the order is exact is then tried out, and undone where the output changes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from taut.core.example import Example
from taut.nn import Reorder
from taut.structure.channels.runs import End, run_labelled
from taut.structure.sameness import outputs_match, outputs_of, probes_of
from taut.structure.support import SUPPORTED
from taut.structure.surgery import swap


def fold(model: nn.Module, example: Example, kept: Collection[str] = ()) -> None:
    """Fold every `Reorder` of `model` into its neighbours in place, where that is exact; the others stay.

    Exact is: the very channels of the order arrive at its readers, every layer of the model is reached (one that is not
    may read the channels, too), no tensor is shared with a layer outside, and the outputs of model and readers are
    unchanged in a float64 copy on random inputs.

    Args:
        model: is changed in place.
        example: how it is called.
        kept: layers whose weights may not change.

    Raises:
        ModelError: the model cannot be run.
    """
    orders = [module for module in model.modules() if isinstance(module, Reorder)]
    probes, runs = probes_of(example), None
    for order in orders:
        idle = nn.Identity()
        if torch.equal(order.order.cpu(), torch.arange(len(order.order), dtype=order.order.dtype)):
            swap(model, order, idle)
            _drop(model, idle)
            runs = None
            continue
        name = next(name for name, module in model.named_modules() if module is order)
        runs = run_labelled(model, example, tying=False) if runs is None else runs  # the model is as it was
        classes = runs.classes()
        watched = sorted(_around(classes, classes.get((name, "out")))["in"])
        before = None if runs.unreached() else outputs_of(model, example, probes, watched)
        for change in _changes(model, classes, name, kept) if before is not None else ():
            old = [(t, t.clone()) for t, _ in change]
            _write(change)
            swap(model, order, idle)
            if outputs_match(before, outputs_of(model, example, probes, watched)):
                _drop(model, idle)
                runs = None
                break
            swap(model, idle, order)
            _write(old)


def _drop(model: nn.Module, idle: nn.Module) -> None:
    """Close the gap in the chain where an order was; elsewhere the Identity stays, under the name that code may use."""
    for chain in model.modules():
        numbered = isinstance(chain, nn.Sequential) and all(key.isdigit() for key in chain._modules)
        if numbered and any(part is idle for part in chain.children()):
            kept = [part for part in chain.children() if part is not idle]
            chain._modules.clear()  # the same object: hooks and names of the place stay
            for place, part in enumerate(kept):
                chain.add_module(str(place), part)


def sides(module: nn.Module) -> str:
    """Where in a chain channels are still reordered: "i" before it, "o" behind it."""
    parts = list(module.children())
    return ("i" if parts and isinstance(parts[0], Reorder) else "") + (
        "o" if parts and isinstance(parts[-1], Reorder) else ""
    )


Change = list[tuple[Tensor, Tensor]]
"""Tensors and their new values."""


Classes = Mapping[tuple[str, End], Tensor]
"""Layer and side -> channel of every index."""


def _around(classes: Classes, channels: Tensor | None) -> dict[End, set[str]]:
    """The layers that give, read and pass on some of these channels."""
    around: dict[End, set[str]] = {"out": set(), "in": set(), "through": set()}
    for (name, end), held in classes.items():
        if channels is not None and bool(torch.isin(held, channels).any()):
            around[end].add(name)
    return around


def _changes(model: nn.Module, classes: Classes, name: str, kept: Collection[str]) -> Iterator[Change]:
    """What would take over the order: the layers that read it, or the one that feeds it; none of the `kept`."""
    order = model.get_submodule(name)
    if not isinstance(order, Reorder):
        return
    index = order.order.long()
    given, fed = classes.get((name, "out")), classes.get((name, "in"))
    after, before = _around(classes, given), _around(classes, fed)
    reads = given is not None and all(_in_order(classes[reader, "in"], given) for reader in after["in"])
    if reads and after["in"] and after["out"] == {name} and not (after["in"] | after["through"]) & set(kept):
        parts = [_of_norms(model, after["through"], index.argsort())]
        parts += [_of_inputs(model.get_submodule(reader), index) for reader in after["in"]]
        yield from _alone(model, _joined(parts), after["in"] | after["through"])
    source = next(iter(before["out"]), "")
    feeds = fed is not None and bool(source) and torch.equal(classes[source, "out"], fed)
    touched = {source, *before["through"]}
    if feeds and before["in"] == {name} and before["out"] == {source} and not touched & set(kept):
        parts = [_of_norms(model, before["through"], index), _of_outputs(model.get_submodule(source), index)]
        yield from _alone(model, _joined(parts), touched)


def _in_order(columns: Tensor, channels: Tensor) -> bool:
    """Whether a layer reads these channels as they are; behind a flatten several inputs in a row of each."""
    return torch.equal(columns, channels.repeat_interleave(max(1, len(columns) // len(channels))))


def _alone(model: nn.Module, change: Change | None, names: set[str]) -> Iterator[Change]:
    """The change, unless a tensor of it also belongs to a layer outside: one that the example may not even run."""
    if change is None:
        return
    inside = {id(model.get_submodule(name)) for name in names}
    others = [module for module in model.modules() if id(module) not in inside]
    held = {t.data_ptr() for m in others for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))}
    if not any(t.data_ptr() in held for t, _ in change if t.numel()):
        yield change


def _joined(parts: list[Change | None]) -> Change | None:
    known = [part for part in parts if part is not None]
    return [one for part in known for one in part] if len(known) == len(parts) else None


def _of_outputs(module: nn.Module, index: Tensor) -> Change | None:
    """The output side of a layer: what a `Reorder` behind it did, it does itself."""
    held = list(module.parameters(recurse=False))
    plain = isinstance(module, SUPPORTED) and getattr(module, "groups", 1) == 1
    if not plain or any(len(p) != len(index) for p in held):
        return None
    return [(p.data, p.data.index_select(0, index)) for p in held]


def _of_inputs(module: nn.Module, index: Tensor) -> Change | None:
    """The input side of a layer; behind a flatten every channel has several inputs in a row."""
    if isinstance(module, Reorder):
        same = len(module.order) == len(index)
        return [(module.order, index[module.order.long()].to(module.order.dtype))] if same else None
    if not isinstance(module, SUPPORTED) or getattr(module, "groups", 1) != 1 or not isinstance(module.weight, Tensor):
        return None
    weight = module.weight.data
    if weight.shape[1] % len(index):
        return None
    split = weight.reshape(len(weight), len(index), -1)
    return [(weight, split.index_select(1, index.argsort()).reshape(weight.shape))]


def _of_norms(model: nn.Module, names: Iterable[str], index: Tensor) -> Change | None:
    """Everything that the layers between keep per channel."""
    change: Change = []
    for name in names:
        module = model.get_submodule(name)
        for t in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if t.numel() == len(index) and t.ndim == 1:
                change.append((t.data, t.data.index_select(0, index)))
            elif t.numel() > 1:
                return None
    return change


def _write(change: Change) -> None:
    for t, values in change:
        t.copy_(values)

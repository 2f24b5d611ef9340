"""Blocks: modules with layers inside that give the shape that they take, and what a network computes without one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from taut.core.example import Example
from taut.core.modes import evaluating
from taut.core.nested import fresh
from taut.core.tensors import tensors
from taut.nn import Skipped
from taut.nn.answering import is_plain
from taut.structure.sameness import IN_OTHER_LAYERS, outputs_match
from taut.structure.surgery import shallow, swap
from taut.types import Block, Layer

MOST = 0.5
"""Share of a network's parameters that a block may hold."""

CACHES, USED = ("cache", "past_key_values"), "use_cache"
"""With what a language model of transformers is called that goes on behind what it has seen: the newest name first."""

TOKENS = "decoder_input_ids", "input_ids"
"""Inputs along which such a model goes on."""


def find_blocks(model: nn.Module, example: Example, names: Collection[str] | None = None) -> dict[str, Layer]:
    """The modules that can be taken out: each of their calls gives a tensor like one of its own inputs.

    Such a module holds other modules with parameters, but no more than half of the network's; neither it nor what is
    inside stands elsewhere in the network, too, nor is it read by code outside. Costs are left to the tracer.

    Args:
        model: is not changed.
        example: how it is called; all paths of it are run.
        names: look at these alone.
    """
    candidates = {name: module for name, module in _containers(model).items() if names is None or name in names}
    copied = shallow(model)
    copies = {name: copied.get_submodule(name) for name in candidates}
    watched = {name: _Watched(module) for name, module in copies.items()}
    for inputs in example.paths if candidates else ():
        with evaluating(copied):
            example.run(copied, inputs, fused=True)  # as the user runs it: more may be read then
    blocks = {}
    for name, module in candidates.items():
        form = watched[name].form
        if form is not None:
            inside = tuple(f"{name}.{path}" if path else name for path in _layers_in(module))
            answers = {key: value for key, value in vars(module).items() if key[0] != "_" and is_plain(value)}
            answers.pop("training", None)
            kind = type(module).__name__
            blocks[name] = Layer(name, kind, answers=answers, block=Block(inside, *form))
    return blocks


class _Watched:
    """A module while it is watched: how it is called, and what code outside of its calls reads of what is inside.

    Attributes:
        forms: of its calls. read: whether other code reads a module or a tensor that it holds.
    """

    def __init__(self, module: nn.Module) -> None:
        """Watch a module of a copy."""
        self.forms: set[tuple[int | str, int | None] | None] = set()
        self.read, self.depth = False, 0
        own = type(module)

        def noted(held: nn.Module, name: str) -> Any:
            value = own.__getattr__(held, name)
            self.read = self.read or (not self.depth and isinstance(value, nn.Module | Tensor))
            return value

        module.__class__ = type(own.__name__, (own,), {"__getattr__": noted, "__module__": own.__module__})
        module.register_forward_pre_hook(self._enter, prepend=True)
        module.register_forward_hook(self._leave, with_kwargs=True, always_call=True)

    @property
    def form(self) -> tuple[int | str, int | None] | None:
        """The one form of all calls; None where it is no block."""
        return next(iter(self.forms)) if len(self.forms) == 1 and not self.read else None

    def _enter(self, *_: Any) -> None:
        self.depth += 1

    def _leave(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.depth -= 1
        self.forms.add(_form(args, kwargs, output))


def skipped(layer: Layer, way: str) -> Skipped:
    """What takes the place of a block."""
    block = layer.block or Block(())
    return Skipped(way, block.source, block.items, layer.answers)


@contextmanager
def without(model: nn.Module, block: Layer, way: str) -> Iterator[None]:
    """The model with a block taken out; afterwards it is as it was."""
    module, stub = model.get_submodule(block.name), skipped(block, way)
    swap(model, module, stub.train(module.training))
    try:
        yield
    finally:
        swap(model, stub, module)


def private_parameters(model: nn.Module, name: str) -> int:
    """Parameters that go when a module goes: those that nothing else holds."""
    inside = {id(p) for p in model.get_submodule(name).parameters()}
    shared = {
        id(p)
        for path, module in model.named_modules(remove_duplicate=False)
        if path != name and not path.startswith(f"{name}.")
        for p in module.parameters(recurse=False)
    }
    return sum(p.numel() for p in model.get_submodule(name).parameters() if id(p) in inside - shared)


def departs_without(model: nn.Module, example: Example, block: Layer, way: str) -> str | None:
    """Why a network without a block would not be itself, beyond its outputs; None where nothing is known.

    Args:
        model: is not changed.
        example: how it is called.
        block: as `find_blocks` describes it.
        way: how it would be skipped.
    """
    copied = shallow(model)
    if cache_departs(copied, example) is not None:
        return None  # nothing to compare with
    with without(copied, block, way):
        return cache_departs(copied, example)


def cache_departs(model: nn.Module, example: Example) -> str | None:
    """How a language model that goes on with its cache departs from itself run at once; None where it does not.

    Some caches count the positions in one of the layers: without it they would count none, and nothing would tell.
    """
    value = example.value if isinstance(example.value, dict) else {TOKENS[-1]: example.value}
    named = {key: t for key in TOKENS if isinstance(t := value.get(key), Tensor)}
    name = next((name for name in CACHES if name in example.signature.names), "")
    if not named or not name or not {USED, *named} <= example.signature.names:
        return None
    key, ids = next(iter(named.items()))
    if ids.ndim != 2 or ids.shape[1] < 2 or ids.is_floating_point():
        return None
    copied, rest = shallow(model), {other: t for other, t in named.items() if other != key}

    def run(tokens: Tensor, **more: Any) -> Any:
        with evaluating(copied), torch.no_grad():
            return copied(**fresh(rest), **{key: tokens.clone(), USED: True}, **more)

    try:
        first = run(ids[:, :-1])
        cache = next((first[key] for key in CACHES if key in first), None)
        if cache is None:
            return None
        last = tensors(run(ids[:, -1:], **{name: cache}))[0]
        whole = tensors(run(ids))[0]
    except Exception:  # a model without a cache, or one that is called in another way
        return None
    same = last.shape[:1] == whole.shape[:1] and outputs_match(whole[:, -1:], last, IN_OTHER_LAYERS)
    return None if same else "without it the model's cache counts its positions wrongly"


def _containers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules with layers inside that stand at one place; of one inside another with the same parameters the outer."""
    places: dict[int, int] = defaultdict(int)
    for _, module in model.named_modules(remove_duplicate=False):
        places[id(module)] += 1
    whole = sum(p.numel() for p in model.parameters())
    seen: set[frozenset[int]] = set()
    containers = {}
    for name, module in model.named_modules():
        held = frozenset(id(p) for p in module.parameters())
        inner = any(True for child in module.children() for _ in child.parameters())
        listed = isinstance(module, nn.ModuleList | nn.ModuleDict)
        if not name or not inner or listed or held in seen or any(places[id(m)] > 1 for m in module.modules()):
            continue
        if sum(p.numel() for p in module.parameters()) > MOST * whole:
            continue
        seen.add(held)
        containers[name] = module
    return containers


def _layers_in(module: nn.Module) -> list[str]:
    """Paths of the modules inside that own parameters."""
    return [path for path, inner in module.named_modules() if any(True for _ in inner.parameters(recurse=False))]


def _form(args: Any, kwargs: Any, output: Any) -> tuple[int | str, int | None] | None:
    """Where the input is that the output is like, and the output's form; None where there is none."""
    first, items = output, None
    if type(output) is tuple:
        if not output or any(item is not None for item in output[1:]):
            return None
        first, items = output[0], len(output)
    if not isinstance(first, Tensor) or not first.is_floating_point() or first.ndim < 2:
        return None
    for source, value in (*enumerate(args), *kwargs.items()):
        if isinstance(value, Tensor) and value.shape == first.shape and value.dtype == first.dtype:
            return source, items
    return None

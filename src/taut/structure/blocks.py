"""Blocks: modules with layers inside that give the shape that they take, and what a network computes without one."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from taut.core.example import Example
from taut.core.modes import evaluating
from taut.core.nested import fresh
from taut.core.tensors import tensors
from taut.errors import ModelError
from taut.measure.counting import Count
from taut.nn import Skipped
from taut.nn.answering import is_plain
from taut.structure.block_reads import read_elsewhere
from taut.structure.coverage import seeded
from taut.structure.sameness import IN_OTHER_LAYERS, outputs_match
from taut.structure.surgery import shallow, swap
from taut.types import Block, Layer, Network

MOST = 0.5
"""Share of a network's parameters that a block may hold."""

CACHES, USED = ("cache", "past_key_values"), "use_cache"
"""With what a language model of transformers is called that goes on behind what it has seen: the newest name first."""

TOKENS = {"decoder_input_ids": "decoder_attention_mask", "input_ids": "attention_mask"}
"""Inputs along which such a model goes on, and the mask of each."""

STATES = re.compile(r"cache|past|incremental", re.IGNORECASE)
"""Names of arguments that are what a model has seen before."""

NOT_STATES = frozenset({USED, "cache_position", "cache_dir"})

UNTRIED = (
    "the model goes on with what it keeps in '{name}', and may count positions in this block: that could not be tried "
    "on the example"
)


def find_blocks(
    model: nn.Module, example: Example, names: Collection[str] | None = None, paths: Sequence[Any] | None = None
) -> dict[str, Layer]:
    """The modules that can be taken out: each of their calls gives a tensor like one of its own inputs.

    Such a module holds other modules with parameters, but no more than half of the network's; neither it nor what is
    inside stands elsewhere in the network, too, nor is it read by code outside, in training neither. Costs are left to
    the tracer.

    Args:
        model: is not changed.
        example: how it is called.
        names: look at these alone.
        paths: inputs that are run; None: those of the example.
    """
    candidates = {name: module for name, module in _containers(model).items() if names is None or name in names}
    if not candidates:
        return {}
    copied = shallow(model)
    copies = {name: copied.get_submodule(name) for name in candidates}
    watched = {name: _Watched(module) for name, module in copies.items()}
    paths = example.paths if paths is None else paths
    for inputs in paths:
        for fused in (False, True):  # what torch's encoders read in front of their fused path counts, too
            with evaluating(copied):
                example.run(copied, inputs, fused=fused)
    with suppress(ModelError), torch.no_grad(), seeded():  # some do not run in train mode
        example.run(copied.train(), next(iter(paths), example.value), training=True)
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


def blocks_of(model: nn.Module, example: Example, counted: Count, layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """The blocks that could be taken out, with the costs that would go with them.

    Args:
        model: is not changed.
        example: how it is called.
        counted: multiply-accumulates of every module.
        layers: of the network.
    """
    itemsize = max((layer.itemsize for layer in layers if layer.params), default=4)
    own = private_parameters(model)

    def costed(name: str, block: Layer) -> Layer:
        macs = counted.by_module.get(name, 0)
        return replace(block, macs=macs, params=own[name], batch=example.batch, itemsize=itemsize)

    return tuple(costed(name, block) for name, block in find_blocks(model, example).items())


def blocks_covered(net: Network, model: nn.Module, paths: Sequence[Any]) -> Network:
    """The network with those blocks that are some on other inputs, too."""
    found = find_blocks(model, net.example, [block.name for block in net.blocks], paths) if net.blocks else {}
    blocks = (block for block in net.blocks if block.name in found and found[block.name].block == block.block)
    return replace(net, blocks=tuple(blocks))


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
        if not any(t.is_nested for t in tensors((args, kwargs, output))):  # inside of torch's fused encoders
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


def private_parameters(model: nn.Module) -> dict[str, int]:
    """By module the parameters that go when it goes: those that nothing outside of it holds."""
    owners: dict[int, list[str]] = defaultdict(list)
    sizes: dict[int, int] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for p in module.parameters(recurse=False):
            owners[id(p)].append(name)
            sizes[id(p)] = p.numel()
    counts: dict[str, int] = defaultdict(int)
    for key, names in owners.items():
        parts = names[0].split(".")
        for depth in range(1, len(parts) + 1):
            outer = ".".join(parts[:depth])
            if all(f"{name}.".startswith(f"{outer}.") for name in names):
                counts[outer] += sizes[key]
    return counts


def departs_without(model: nn.Module, example: Example, block: Layer, way: str) -> str | None:
    """Why a block has to stay although outputs do not need it; None: it has not.

    Other code may read what it sets, in training for one, or the model may count positions in it.
    Caches count the positions that they have seen in one of the layers, often the first: without it they would count
    none, and nothing would tell. A model that goes on with one is run at once and with its cache, with and without the
    block; where that cannot be tried, the block stays.

    Args:
        model: is not changed.
        example: how it is called.
        block: as `find_blocks` describes it.
        way: how it would be skipped.
    """
    read = read_elsewhere(model, example, block.name)
    if read is not None:
        return f"code outside of it reads its attribute '{read}', which nothing would have in its place"
    names = [name for name in example.signature.names if STATES.search(name) and name not in NOT_STATES]
    if not names:
        return None
    copied, untried = shallow(model), UNTRIED.format(name=min(names))
    before = cache_agrees(copied, example)
    if before is CACHELESS:
        return None
    if not before:
        return untried
    with without(copied, block, way):
        after = cache_agrees(copied, example)
    return None if after else "without it the model's cache counts its positions wrongly"


CACHELESS = "without a cache"
"""What `cache_agrees` says of a model that fills none."""


def cache_agrees(model: nn.Module, example: Example) -> bool | str | None:
    """Whether a model of transformers that goes on with its cache gives what it gives when it is run at once.

    Returns:
        None where that cannot be tried; CACHELESS where the model fills no cache.
    """
    value = example.value if isinstance(example.value, dict) else {"input_ids": example.value}
    key = next((key for key in TOKENS if isinstance(value.get(key), Tensor)), None)
    cache_name = next((name for name in CACHES if name in example.signature.names), None)
    if key is None or cache_name is None or USED not in example.signature.names:
        return None
    length = value[key].shape[1] if value[key].ndim == 2 else 0
    if length < 2:
        return None

    def run(first: int, last: int, **more: Any) -> Any:
        parts = {name: _part(name, t, key, value[key].shape, first, last) for name, t in value.items()}
        with evaluating(model), torch.no_grad():
            return model(**fresh(parts), **{USED: True}, **more)

    try:
        whole, start = tensors(run(0, length))[0], run(0, length - 1)
        cache = next((start[name] for name in CACHES if name in start), None)
        if cache is None:
            return CACHELESS
        last = tensors(run(length - 1, length, **{cache_name: cache}))[0]
    except Exception:  # a model that is called in another way
        return None
    return last.shape[:1] == whole.shape[:1] and outputs_match(whole[:, -1:], last, IN_OTHER_LAYERS)


def _part(name: str, value: Any, key: str, shape: torch.Size, first: int, last: int) -> Any:
    """What of an input belongs to some tokens: of their mask all up to the last one."""
    if not isinstance(value, Tensor) or value.shape[:2] != shape:
        return value
    if name == TOKENS[key]:
        return value[:, :last]
    beside = key == "input_ids" or name.startswith("decoder")
    return value[:, first:last] if beside and value.ndim == 2 else value


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

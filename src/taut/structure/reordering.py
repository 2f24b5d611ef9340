"""Channel orders folded into the neighbouring layers: the network computes the same, and no channel is moved any more.

Which layers read a `Reorder`, and which one feeds it, is read off the autograd graph of a run of the example; whether
taking over the order is exact is then tried out, and undone where the output changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from taut.calls import Example, evaluating, generator, map_tensors, tensors
from taut.errors import ModelError
from taut.nn import Reorder
from taut.structure.patches import CONVOLUTIONS
from taut.structure.surgery import clone, shallow, swap

OUTPUT = ""
"""The reader that stands for what the model returns."""

TOLERANCE = 1e-9
"""Largest change of the output in float64, as a share of its largest value, that is still rounding."""

PROBES = 2

ALIKE = frozenset(
    """
    Relu LeakyRelu Elu Selu Celu Gelu Silu Mish Sigmoid LogSigmoid Tanh Hardtanh Hardswish Hardsigmoid
    Threshold Softplus MaxPool1D MaxPool1DWithIndices MaxPool2DWithIndices MaxPool3DWithIndices
    MkldnnMaxPool2D AvgPool1D AvgPool2D AvgPool3D AdaptiveAvgPool1D AdaptiveAvgPool2D AdaptiveAvgPool3D
    AdaptiveMaxPool2D Mean NativeBatchNorm CudnnBatchNorm NativeDropout UpsampleNearest1D
    UpsampleNearest2D UpsampleNearest3D UpsampleBilinear2D UpsampleLinear1D UpsampleTrilinear3D
    ConstantPadNd ReflectionPad1D ReflectionPad2D ReflectionPad3D ReplicationPad1D ReplicationPad2D
    ReplicationPad3D View UnsafeView ReshapeAlias Squeeze Unsqueeze Clone ToCopy Alias Repeat Add Sub
    Rsub Mul Div Neg Abs Exp Log Pow Sqrt Rsqrt Clamp ClampMin Softmax LogSoftmax Permute Transpose Flip
    AccumulateGrad
    """.split()  # noqa: SIM905 - sixty names a line each would hide the module
)
"""Operations of the autograd graph that treat all channels alike; views and arithmetic are left to the comparison."""

MIXING = (nn.Linear, *CONVOLUTIONS)


@dataclass
class _Flow:
    """Who reads whom in one run, by module names.

    Attributes:
        readers: layer -> layers with weights of their own that its output reaches directly.
        through: layer -> layers between (norms), whose channels are its channels.
        sources: layer -> layers whose output it reads directly.
        mixed: layers that read through an operation that may tell channels apart.
        whole: whether every layer that holds something was called.
    """

    readers: dict[str, set[str]] = field(default_factory=dict)
    through: dict[str, set[str]] = field(default_factory=dict)
    sources: dict[str, set[str]] = field(default_factory=dict)
    mixed: set[str] = field(default_factory=set)
    whole: bool = True


def fold(model: nn.Module, example: Example) -> None:
    """Fold every `Reorder` of `model` into its neighbours in place, where that is exact; the others stay.

    Exact is: between the layers only operations that treat all channels alike (ALIKE), every layer of the model called
    in the run (one that is not may read the channels, too), no tensor shared with a layer outside, and the outputs of
    model and readers unchanged in a float64 copy on random inputs.
    """
    orders = [module for module in model.modules() if isinstance(module, Reorder)]
    probes = [_probe(example, seed) for seed in range(PROBES)]
    for order in orders:
        idle = nn.Identity()
        if torch.equal(order.order.cpu(), torch.arange(len(order.order), dtype=order.order.dtype)):
            swap(model, order, idle)
            _drop(model, idle)
            continue
        name = next(name for name, module in model.named_modules() if module is order)
        flow = _flow(model, example)
        watched = sorted(flow.readers.get(name, set()) - {OUTPUT})
        before = _outputs(model, example, probes, watched) if flow.whole else None
        for change in _changes(model, flow, name) if before is not None else ():
            old = [(t, t.clone()) for t, _ in change]
            _write(change)
            swap(model, order, idle)
            if _close(before, _outputs(model, example, probes, watched)):
                _drop(model, idle)
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


def _changes(model: nn.Module, flow: _Flow, name: str) -> Iterator[Change]:
    """What would take over the order: the layers that read it, or the one that feeds it."""
    order = model.get_submodule(name)
    if not isinstance(order, Reorder):
        return
    index = order.order.long()
    readers = flow.readers.get(name, set())
    if readers and not readers & (flow.mixed | {OUTPUT}) and all(flow.sources[reader] == {name} for reader in readers):
        parts = [_of_norms(model, flow.through[name], index.argsort())]
        parts += [_of_inputs(model.get_submodule(reader), index) for reader in readers]
        yield from _alone(model, _joined(parts), {*readers, *flow.through[name]})
    feeding = flow.sources.get(name, set())
    if len(feeding) == 1 and name not in flow.mixed:
        (source,) = feeding
        if source != OUTPUT and flow.readers[source] == {name}:
            parts = [_of_norms(model, flow.through[source], index), _of_outputs(model.get_submodule(source), index)]
            yield from _alone(model, _joined(parts), {source, *flow.through[source]})


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
    plain = isinstance(module, MIXING) and getattr(module, "groups", 1) == 1
    if not plain or any(len(p) != len(index) for p in held):
        return None
    return [(p.data, p.data.index_select(0, index)) for p in held]


def _of_inputs(module: nn.Module, index: Tensor) -> Change | None:
    """The input side of a layer; behind a flatten every channel has several inputs in a row."""
    if isinstance(module, Reorder):
        same = len(module.order) == len(index)
        return [(module.order, index[module.order.long()].to(module.order.dtype))] if same else None
    if not isinstance(module, MIXING) or getattr(module, "groups", 1) != 1 or not isinstance(module.weight, Tensor):
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


def _probe(example: Example, seed: int) -> Any:
    """Random inputs shaped like the example, in float64; the example itself may say nothing (zeros)."""
    noise = generator(seed)

    def like(t: Tensor) -> Tensor:
        if not t.is_floating_point() or not t.numel():
            return t
        size = t.double().std() if t.numel() > 1 else torch.zeros(())
        drawn = torch.randn(t.shape, generator=noise, dtype=torch.float64).to(t.device)
        return drawn * (size if float(size) > 0 else 1.0) + t.double().mean()

    return map_tensors(like, example.value)


def _outputs(model: nn.Module, example: Example, probes: list[Any], watched: list[str]) -> list[Tensor] | None:
    """What a copy in float64, and its `watched` layers, give for the probes; None where it cannot run.

    In float64 rounding is far below any real change.
    """
    found: list[Tensor] = []
    try:
        wide = clone(model).double()
        for name in watched:
            wide.get_submodule(name).register_forward_hook(lambda _, __, output: found.extend(tensors(output)))
        with evaluating(wide), torch.no_grad():
            for probe in probes:
                found += tensors(example.run(wide, probe))
    except ModelError:
        return None
    return found


def _close(before: list[Tensor] | None, after: list[Tensor] | None) -> bool:
    if before is None or after is None or [t.shape for t in before] != [t.shape for t in after]:
        return False
    for a, b in zip(before, after, strict=True):
        scale = float(a.double().abs().max()) if a.numel() else 0.0
        if a.numel() and not float((a.double() - b.double()).abs().max()) <= TOLERANCE * max(scale, 1e-300):
            return False
    return True


def _flow(model: nn.Module, example: Example) -> _Flow:
    """One run of a copy with gradients on, and a walk back from what every layer read."""
    copied = shallow(model)
    for parameter in copied.parameters():
        parameter.requires_grad = parameter.is_floating_point()
    names = [name for name, module in copied.named_modules() if name and _holds(module)]
    outputs: dict[Any, str] = {}
    inputs: dict[str, list[Any]] = {name: [] for name in names}

    called: set[str] = set()

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            called.add(name)
            inputs[name] += [t.grad_fn for t in tensors(args) if t.grad_fn is not None]
            outputs.update((t.grad_fn, name) for t in tensors(output) if t.grad_fn is not None)

        return hook

    for name in names:
        copied.get_submodule(name).register_forward_hook(note(name), prepend=True)
    with evaluating(copied), torch.enable_grad():
        ends = [t.grad_fn for t in tensors(example.run(copied)) if t.grad_fn is not None]
    plain = {name for name in names if not isinstance(copied.get_submodule(name), (*MIXING, Reorder))}
    passing = {name for name in plain if _per_channel(copied.get_submodule(name))}
    return replace(_traced({**inputs, OUTPUT: ends}, outputs, passing), whole=called >= set(names))


def _kind(node: Any) -> str:
    """The name of an operation in the autograd graph, without its number."""
    name: str = node.name().rpartition("::")[2]
    return name.rstrip("0123456789").removesuffix("Backward")


def _holds(module: nn.Module) -> bool:
    return any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))


def _per_channel(module: nn.Module) -> bool:
    """Whether all that a layer holds is a value per channel: norms, PReLU."""
    return all(t.ndim <= 1 for t in (*module.parameters(recurse=False), *module.buffers(recurse=False)))


def _traced(inputs: dict[str, list[Any]], outputs: dict[Any, str], passing: set[str]) -> _Flow:
    """Walk back from the inputs of every layer to the outputs of others; `passing` layers are noted and passed."""
    flow = _Flow()
    for name, nodes in inputs.items():
        stack, seen, found, crossed, alike = list(nodes), set(nodes), set(), set(), True
        while stack:
            node = stack.pop()
            source = outputs.get(node)
            if source is not None and source not in passing:
                found.add(source)
                continue
            if source is not None:
                crossed.add(source)
            alike &= source is not None or _kind(node) in ALIKE
            for following, _ in node.next_functions:
                if following is not None and following not in seen:
                    seen.add(following)
                    stack.append(following)
        if name in passing:
            continue
        flow.sources[name] = found
        flow.mixed |= set() if alike else {name}
        for source in found:
            flow.readers.setdefault(source, set()).add(name)
            flow.through.setdefault(source, set()).update(crossed)
    return flow

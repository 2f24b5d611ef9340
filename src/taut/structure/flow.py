"""Which layers read which: read off the autograd graph of a run of the example."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from taut.core.example import Example
from taut.core.modes import evaluating
from taut.core.tensors import tensors
from taut.nn import Pick, Reorder
from taut.structure.patches import CONVOLUTIONS
from taut.structure.surgery import shallow

OUTPUT = ""
"""The reader that stands for what the model returns."""

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

SHARING = frozenset({"Softmax", "LogSoftmax"})
"""Of these the ones that treat channels alike, but whose value for one depends on which others there are."""

MIXING = (nn.Linear, *CONVOLUTIONS)


@dataclass
class Flow:
    """Who reads whom in one run, by module names.

    Attributes:
        readers: layer -> layers with weights of their own that its output reaches directly.
        through: layer -> layers between (norms), whose channels are its channels.
        sources: layer -> layers whose output it reads directly.
        mixed: layers that read through an operation that may tell channels apart.
        sharing: layers that read through an operation in which a channel's value depends on how many there are.
        foreign: layers that read through an operation with a tensor that comes from no layer and is no buffer (a mask):
            what it is in another run is not known.
        uncalled: layers that hold something and were not called.
    """

    readers: dict[str, set[str]] = field(default_factory=dict)
    through: dict[str, set[str]] = field(default_factory=dict)
    sources: dict[str, set[str]] = field(default_factory=dict)
    mixed: set[str] = field(default_factory=set)
    sharing: set[str] = field(default_factory=set)
    foreign: set[str] = field(default_factory=set)
    uncalled: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether every layer that holds something was called."""
        return not self.uncalled


class _Foreign(TorchFunctionMode):
    """Notes the operations in which a tensor without gradient meets others, but for the buffers of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.held = {_storage(buffer) for buffer in model.buffers()} - {None}
        self.nodes: set[Any] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it; what it makes is noted by its node in the autograd graph."""
        output = func(*args, **(kwargs or {}))
        if any(not t.requires_grad and _storage(t) not in self.held for t in tensors((args, kwargs))):
            self.nodes.update(t.grad_fn for t in tensors(output) if t.grad_fn is not None)
        return output


def _storage(t: Tensor) -> int | None:
    """Where the values are; None for tensors without plain memory."""
    try:
        return t.untyped_storage().data_ptr() or None
    except RuntimeError:
        return None


def flow_of(model: nn.Module, example: Example) -> Flow:
    """One run of a copy with gradients on, and a walk back from what every layer read."""
    copied = shallow(model)
    for parameter in copied.parameters():
        parameter.requires_grad = parameter.is_floating_point()
    names = [name for name, module in copied.named_modules() if name and _holds(module)]
    outputs: dict[Any, str] = {}
    inputs: dict[str, list[Any]] = {name: [] for name in names}

    called: set[str] = set()

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            called.add(name)
            inputs[name] += [t.grad_fn for t in tensors((args, kwargs)) if t.grad_fn is not None]
            for t in tensors(output):
                if t.grad_fn is not None:
                    outputs.setdefault(t.grad_fn, name)  # the innermost: a module gives what its last layer gave

        return hook

    for name in names:
        copied.get_submodule(name).register_forward_hook(note(name), prepend=True, with_kwargs=True)
    with evaluating(copied), torch.enable_grad(), _Foreign(copied) as foreign:
        ends = [t.grad_fn for t in tensors(example.run(copied)) if t.grad_fn is not None]
    plain = {name for name in names if not isinstance(copied.get_submodule(name), (*MIXING, Reorder, Pick))}
    passing = {name for name in plain if _per_channel(copied.get_submodule(name))}
    flow = _traced({**inputs, OUTPUT: ends}, outputs, passing, foreign.nodes)
    return replace(flow, uncalled=tuple(name for name in names if name not in called))


def _kind(node: Any) -> str:
    """The name of an operation in the autograd graph, without its number."""
    name: str = node.name().rpartition("::")[2]
    return name.rstrip("0123456789").removesuffix("Backward")


def _holds(module: nn.Module) -> bool:
    return any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))


def _per_channel(module: nn.Module) -> bool:
    """Whether all that a layer holds is a value per channel: norms, PReLU."""
    return all(t.ndim <= 1 for t in (*module.parameters(recurse=False), *module.buffers(recurse=False)))


def _traced(inputs: dict[str, list[Any]], outputs: dict[Any, str], passing: set[str], foreign: set[Any]) -> Flow:
    """Walk back from the inputs of every layer to the outputs of others; `passing` layers are noted and passed."""
    flow = Flow()
    for name, nodes in inputs.items():
        stack, seen, found, crossed, kinds, met = list(nodes), set(nodes), set(), set(), set(), False
        while stack:
            node = stack.pop()
            source = outputs.get(node)
            if source is not None and source not in passing:
                found.add(source)
                continue
            met |= node in foreign
            if source is not None:
                crossed.add(source)
            else:
                kinds.add(_kind(node))
            for following, _ in node.next_functions:
                if following is not None and following not in seen:
                    seen.add(following)
                    stack.append(following)
        if name in passing:
            continue
        flow.sources[name] = found
        flow.mixed |= set() if kinds <= ALIKE else {name}
        flow.sharing |= {name} if kinds & SHARING else set()
        flow.foreign |= {name} if met else set()
        for source in found:
            flow.readers.setdefault(source, set()).add(name)
            flow.through.setdefault(source, set()).update(crossed)
    return flow

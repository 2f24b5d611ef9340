"""Running the example under observation: which layers are called how, and which are used behind their back."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from taut.core.example import Example
from taut.core.modes import evaluating
from taut.core.tensors import map_tensors, tensors
from taut.errors import ModelError
from taut.nn import Recurrent
from taut.nn.answering import TENSORS, Answer, Answering, Described, is_plain, read_attributes
from taut.nn.encoder import FilledEncoder
from taut.structure.attention_form import attention_form
from taut.structure.coverage import seeded
from taut.structure.outputs import form_of
from taut.structure.patches import groups_of, weight_of
from taut.structure.sameness import BY_FUSED_KERNELS, IN_OTHER_BATCHES, blamed, outputs_match, remembered, said_alike
from taut.structure.surgery import carry, forget_hooks, shallow, swap_all
from taut.types import Invocation, Layer


def record_calls(model: nn.Module, example: Example) -> tuple[dict[str, list[Invocation]], set[str]]:
    """Every call of every module while the example runs, by module name; and the modules called with keywords only."""
    copied = shallow(model)
    calls: dict[str, list[Invocation]] = defaultdict(list)
    keywords: set[str] = set()

    def hook(name: str) -> Any:
        def record(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given, made = tensors((args, kwargs)), tensors(output)
            if given and made and not tensors(args):
                keywords.add(name)
            if given and made:
                calls[name].append(Invocation(tuple(given[0].shape), tuple(made[0].shape)))

        return record

    for name, module in copied.named_modules():
        module.register_forward_hook(hook(name), with_kwargs=True)
    with evaluating(copied):
        example.run(copied)
    return calls, keywords


class Probe(nn.Module):
    """Stands in for a layer: forwards to it, and notes when somebody reads one of its attributes.

    A replacement answers for sizes and settings, and for what `weight` and `bias` are (`taut.nn.Answering`); where
    somebody needs more than that, the layer must stay. To `isinstance` it is of the layer's kind, so that code which
    asks goes the way it goes for the user.

    Attributes:
        read: what was read. used: of that, what a replacement cannot answer.
    """

    def __init__(self, inner: nn.Module) -> None:
        """Wrap `inner`."""
        super().__init__()
        self.inner = inner
        self.read: set[str] = set()
        self.used: set[str] = set()

    @property  # type: ignore[misc] # what isinstance asks, where the type itself is no subclass
    def __class__(self) -> type:
        """The layer's."""
        modules = self.__dict__.get("_modules", {})
        return type(modules["inner"]) if "inner" in modules else Probe

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer computes."""
        return self.inner(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Attributes of the wrapped layer, noted."""
        modules = self.__dict__.get("_modules", {})
        if name == "inner":
            return modules["inner"]
        value = getattr(modules["inner"], name)
        self.read.add(name)
        if name in TENSORS and isinstance(value, Tensor):
            return Described(tuple(value.shape), modules["inner"], lambda: self._noted(name, value), value.stride())
        if not is_plain(value):
            self.used.add(name)
        return value

    def _noted(self, name: str, value: Tensor) -> Tensor:
        self.used.add(name)
        return value


@contextmanager
def training(model: nn.Module) -> Iterator[nn.Module]:
    """A copy in train mode."""
    yield model.train()


Mode = Callable[[nn.Module], AbstractContextManager[nn.Module]]


LayerAnswers = dict[str, dict[str, Answer]]
"""Layer -> attribute -> what it is."""


def read_by_others(
    model: nn.Module, example: Example, names: list[str], paths: Sequence[Any], mode: Mode = evaluating
) -> tuple[dict[str, str], LayerAnswers]:
    """The layers of which other code reads attributes while the model runs.

    No hooks are attached, so fused fast paths (torch's TransformerEncoderLayer) run as they do for the user.

    Returns:
        Those that no replacement could answer for, and one such attribute; and what the others are asked.
    """
    used: dict[str, set[str]] = defaultdict(set)
    read: dict[str, set[str]] = defaultdict(set)
    for inputs in paths:
        copied = shallow(model)
        inner = {name: copied.get_submodule(name) for name in names}
        probes = {name: Probe(module) for name, module in inner.items()}
        swap_all(copied, [(inner[name], probes[name]) for name in names])
        with suppress(ModelError), mode(copied), seeded():  # code that cannot do with a probe: see `kind_matters`
            example.run(copied, inputs, fused=True)
        for name, probe in probes.items():
            used[name] |= probe.used
            read[name] |= probe.read
    answers = {
        name: read_attributes(model.get_submodule(name), asked)
        for name, asked in read.items()
        if asked and not used[name]
    }
    return {name: min(attributes) for name, attributes in used.items() if attributes}, answers


WIDEST = 1024
"""Outputs up to which a stand-in's second layer is a real one."""


class _Unchanged(nn.Linear):
    """A Linear that gives what it gets: for outputs so many that an identity would be large."""

    def __init__(self) -> None:
        super().__init__(1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x


def stand_in(
    layer: nn.Module, identities: dict[Any, Tensor] | None = None, answers: Mapping[str, Answer] | None = None
) -> nn.Module:
    """What a layer's replacement looks like from outside, and computes what the layer computes: it, and an identity.

    Of attention and recurrent layers the layers of which they consist.

    Args:
        layer: stays inside.
        identities: matrices by size, which other stand-ins share.
        answers: attributes for which it answers.
    """
    if isinstance(layer, nn.MultiheadAttention):
        return attention_form(layer, shared=True)
    if isinstance(layer, nn.RNNBase):
        return Recurrent.of(layer)

    def chained(*parts: nn.Module) -> nn.Sequential:
        return Answering(*parts, answers=answers) if answers else nn.Sequential(*parts)

    weight = weight_of(layer)
    outputs, axes = outputs_of_layer(layer), weight.ndim - 2
    if outputs > WIDEST:
        return chained(layer, _Unchanged())
    kinds = {-2: nn.Linear, 0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    second = kinds[axes](outputs, outputs, *([1] if axes > 0 else []), bias=False)
    key, shared = (outputs, weight.dtype, weight.device), {} if identities is None else identities
    if key not in shared:
        shared[key] = torch.eye(outputs, dtype=weight.dtype, device=weight.device)
    eye = shared[key]
    second.weight = nn.Parameter(eye.reshape(outputs, outputs, *[1] * max(axes, 0)), requires_grad=False)
    return chained(layer, second)


def outputs_of_layer(layer: nn.Module) -> int:
    """How many channels a layer gives: of tables and transposed convolutions the second axis of the weight tells."""
    weight = weight_of(layer)
    if isinstance(layer, nn.Embedding):
        return weight.shape[1]
    return weight.shape[1] * groups_of(layer) if isinstance(layer, _ConvTransposeNd) else weight.shape[0]


def kind_matters(
    model: nn.Module, example: Example, names: Sequence[str], paths: Sequence[Any], answers: LayerAnswers | None = None
) -> list[str]:
    """The layers that cannot be replaced because other code asks what they are, or holds them elsewhere.

    With a stand-in in the layer's place the output changes, or the stand-in is not called as often as the layer.

    All layers are tried at once; where that changes something, halves of them, down to single layers.
    """
    to_blame: list[str] = []
    for inputs in paths:
        left = [name for name in names if name not in to_blame]
        trial = _Trial(model, example, inputs, left, answers or {})
        same = remembered(trial.same)
        if trial.wanted is None or same(left) or not trial.repeats():
            continue  # it gives something else each time: the form of its outputs is checked after every step
        to_blame += blamed(left, same)
    return to_blame


class _Trial:
    """Layers replaced by stand-ins, on one input.

    What is wanted is what the model gives as its user runs it. Where torch's encoder takes its fused path, it gives one
    constant at padded positions. So it does with other layers (`taut.nn.FilledEncoder`), but layer by layer it does
    not: where more than padded positions depends on that, what is measured layer by layer is of another function.
    """

    def __init__(
        self, model: nn.Module, example: Example, inputs: Any, names: Sequence[str], answers: LayerAnswers
    ) -> None:
        self.model, self.example, self.inputs, self.answers = model, example, inputs, answers
        self.calls: Counter[str] = Counter()
        copied = shallow(model)
        for name in names:
            _count_calls(copied.get_submodule(name), name, self.calls)
        self.wanted, self.tolerance, self.filled = self._ran(copied, fused=False), IN_OTHER_BATCHES, True
        if self.wanted is not None and any(isinstance(m, nn.TransformerEncoder) for m in model.modules()):
            fused = self._ran(shallow(model))  # without hooks, which keep layers from their fused path
            self.filled = said_alike(fused, self.wanted)
            self.wanted, self.tolerance = fused, BY_FUSED_KERNELS

    def repeats(self) -> bool:
        """Whether the model gives the same each time."""
        return outputs_match(self.wanted, self._ran(shallow(self.model)), IN_OTHER_BATCHES)

    def same(self, names: Sequence[str]) -> bool:
        """Whether the output is the same with all of them replaced."""
        if not names:
            return True
        copied, calls = replaced(self.model, names, self.answers)
        output = self._ran(copied)
        if output is None or any(calls[name] != self.calls[name] for name in names):
            return False
        if form_of(output) != form_of(self.wanted):
            return False
        if not self.filled and any(name.startswith(inside) for name in names for inside in _filled(copied)):
            return False
        return outputs_match(self.wanted, output, self.tolerance)

    def _ran(self, copied: nn.Module, *, fused: bool = True) -> Any:
        """A copy's output, None where it cannot be run."""
        with evaluating(copied), seeded():
            try:
                return self.example.run(copied, self.inputs, fused=fused)
            except ModelError:
                return None


def _filled(model: nn.Module) -> list[str]:
    """With what names in encoders begin whose padded positions are filled."""
    encoders = (path for path, module in model.named_modules() if isinstance(module, FilledEncoder))
    return [f"{path}." if path else "" for path in encoders]


def replaced(
    model: nn.Module, names: Sequence[str], answers: Mapping[str, Mapping[str, Answer]]
) -> tuple[nn.Module, Counter[str]]:
    """A copy with stand-ins, and how often each was called since."""
    copied, calls, identities = shallow(model), Counter[str](), dict[Any, Tensor]()
    pairs = []
    for name in names:
        layer = copied.get_submodule(name)
        replacement = stand_in(layer, identities, answers.get(name))
        carry(layer, replacement)
        pairs.append((layer, replacement))
        forget_hooks(layer)
        _count_calls(replacement, name, calls)
    swap_all(copied, pairs)
    return copied, calls


class StandInCheck:
    """Compares the outputs of every batch with those of the model with stand-ins in all layers.

    What other code does may depend on values alone, where no operation tells of it.

    Attributes:
        differing: inputs whose outputs differ.
    """

    def __init__(self, model: nn.Module, example: Example, layers: Sequence[Layer]) -> None:
        """`layers` are those that may be replaced."""
        self.example, self.names = example, [layer.name for layer in layers]
        self.copied = replaced(model, self.names, {layer.name: layer.answers for layer in layers})[0]
        self.differing: list[Any] = []

    def __call__(self, inputs: Any, output: Any) -> None:
        """Note inputs for which the stand-ins give something else than `output`."""
        if not self.names or len(self.differing) >= MOST_DIFFERING:
            return
        copied = shallow(self.copied)  # forward may keep a state
        with evaluating(copied), seeded(), suppress(ModelError):
            if outputs_match(output, self.example.run(copied, inputs), IN_OTHER_BATCHES):
                return
        self.differing.append(inputs)


MOST_DIFFERING = 4
"""Inputs after which no more are looked for."""


def _count_calls(module: nn.Module, name: str, calls: Counter[str]) -> None:
    module.register_forward_hook(lambda *_: calls.update([name]))


def live_ranges(model: nn.Module, example: Example, names: list[str]) -> dict[str, list[Tensor]]:
    """Per convolution and kernel axis: a mask over the input's extent, True where it can differ from zero.

    A run on NaN marks everything that depends on the input; what stays zero there, on the example and on noise, is
    padding that the model adds itself. Nothing is claimed for inputs that are sparse or not floating point.
    """
    if not all(t.is_floating_point() and t.layout == torch.strided for t in tensors(example.value)):
        return {}
    noise = torch.Generator().manual_seed(0)
    runs = (
        example.value,
        map_tensors(lambda t: torch.full_like(t, float("nan")), example.value),
        map_tensors(lambda t: torch.randn(t.shape, generator=noise).to(t), example.value),
    )
    found: dict[str, list[Tensor]] = {}
    for inputs in runs:
        try:
            masks = _nonzero_extents(model, example, inputs, names)
        except ModelError:
            return {}
        for name, axes in masks.items():
            old = found.get(name, axes)
            if any(a.shape != b.shape for a, b in zip(old, axes, strict=True)):
                return {}
            found[name] = [a | b for a, b in zip(old, axes, strict=True)]
    return found


def _nonzero_extents(model: nn.Module, example: Example, inputs: Any, names: list[str]) -> Mapping[str, list[Tensor]]:
    copied = shallow(model)
    extents: dict[str, list[Tensor]] = {}

    def hook(name: str, axes: int) -> Any:
        def record(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            used = args[0].detach() != 0  # NaN differs from zero
            masks = [used.movedim(-axes + axis, 0).flatten(1).any(1) for axis in range(axes)]
            old = extents.setdefault(name, masks)
            extents[name] = [
                a | b if a.shape == b.shape else torch.ones_like(b) for a, b in zip(old, masks, strict=True)
            ]

        return record

    for name in names:
        module = copied.get_submodule(name)
        module.register_forward_pre_hook(hook(name, weight_of(module).ndim - 2))
    with evaluating(copied):
        example.run(copied, inputs)
    return extents

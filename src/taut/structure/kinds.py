"""What the tensors of an output are: scores of classes, probabilities, or values."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from taut.core.example import Example
from taut.core.modes import evaluating
from taut.core.tensors import tensors
from taut.errors import CallError
from taut.structure.answers import KINDS, Answers, answers_of, counted
from taut.structure.surgery import shallow

CLASSES = ("logits", "probabilities")

MAPS = 4
"""Axes of an output from which on its classes are on axis 1, as of images; of fewer they are on the last."""

VALUES = re.compile(
    r"hidden|embed(s|ding|dings)?|encodings?|feat(ures?|s)?|b?box(es)?|depths?|disparity|recon(struct(ions?|ed))?|"
    r"flows?|samples?|coord(s|inates?)?|keypoints?|landmarks|offsets?|latents?|states?|pool(ed|er)"
)
"""Words of the names of outputs that are values."""

SCORES = frozenset({"logit", "logits", "score", "scores", "class", "classes", "cls"})
"""Words of the names of outputs that are none, whatever else they are called."""

IGNORED = (-100, 255)
"""Targets that stand for no class."""

OUTPUT = ":output"
"""Among `Example.doubts`: how the output is read."""

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)


def float_outputs(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output that count, nested as it may be."""
    if isinstance(output, Answers):
        return list(output.tensors)
    return [t for _, t in counted(output) if t.is_floating_point()]


def real_of(output: Any) -> list[Tensor | None]:
    """Of each of them, which positions are real; None: all."""
    return list(output.real) if isinstance(output, Answers) else [None] * len(float_outputs(output))


class Kind(str):
    """What an output is, as it is shown: one of KINDS, and the axis of its classes where that is not the usual one.

    Attributes:
        name: one of KINDS.
        axis: of the classes; None: the usual one.
    """

    __slots__ = ("axis", "name")
    name: str
    axis: int | None

    def __new__(cls, name: str, axis: int | None = None) -> Kind:
        """Of a name, and an axis that is not the usual one."""
        kind = super().__new__(cls, name if axis is None else f"{name} along axis {axis}")
        kind.name, kind.axis = name, axis
        return kind

    def __getnewargs__(self) -> tuple[str, int | None]:  # type: ignore[override]
        return self.name, self.axis


def class_axis(kind: str, axes: int) -> int:
    """The axis of an output on which its classes are: the last, or 1 from MAPS axes on, if the kind does not say it."""
    if isinstance(kind, Kind) and kind.axis is not None:
        return kind.axis
    return axes - 1 if axes < MAPS else 1


def name_of(kind: str) -> str:
    """The kind without its axis."""
    return kind.name if isinstance(kind, Kind) else kind


def _along(kind: str, axis: int, axes: int) -> str:
    axis %= axes
    return kind if axis == class_axis(kind, axes) else Kind(kind, axis)


def _is_called_values(name: str) -> bool:
    words = set(re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()))
    return any(map(VALUES.fullmatch, words)) and not words & SCORES


def rows_of(t: Tensor, kind: str, real: Tensor | None = None) -> Tensor:
    """An output with its classes on the last axis; of padded sequences the real positions alone, in order."""
    axis = class_axis(kind, t.ndim) if name_of(kind) in CLASSES else t.ndim - 1
    if real is not None:
        if real.shape != (*t.shape[:axis], *t.shape[axis + 1 :]):  # the channels are on another axis
            axis = 1 if axis != 1 else t.ndim - 1
        return t.movedim(axis, -1)[real.to(t.device)]
    return t if axis == t.ndim - 1 else t.movedim(axis, -1)


def output_kind(output: Tensor) -> str:
    """What an output tensor is, read off its values and shape alone."""
    low, high = (float(output.min()), float(output.max())) if output.numel() else (0.0, 0.0)
    if low >= 0 and high <= 1:
        axis = _sums_to_one(output)
        if axis is not None:
            return _along("probabilities", axis, output.ndim)
    if _has_length_one(output):
        return "values"
    if low >= 0 and high <= 1:
        return "sigmoid"
    return "logits" if output.ndim == 2 and output.shape[1] >= 2 else "values"


def _sums_to_one(output: Tensor) -> int | None:
    """The axis along which an output is a distribution."""
    return _axis_of_ones(output, output.sum)


def _has_length_one(output: Tensor) -> bool:
    """Whether an output is directions, as embeddings are that are compared by their cosine."""
    return _axis_of_ones(output, output.square().sum) is not None


def _axis_of_ones(output: Tensor, summed: Callable[[int], Tensor]) -> int | None:
    """The axis, the last or that of images' channels, along which all sums are 1."""
    for axis in dict.fromkeys((output.ndim - 1, 1)) if output.ndim >= 2 else ():
        if output.shape[axis] > 1 and torch.allclose(summed(axis), torch.ones(()).to(output), atol=1e-3):
            return axis
    return None


def choose_kinds(output: Any, wish: str, look: Look | None = None) -> list[str]:
    """The kind of every float tensor of an output; `wish` other than "auto" overrides.

    Args:
        output: of a model, or what of it counts.
        wish: "auto" or one of KINDS.
        look: what else is known.

    Raises:
        CallError: `wish` is unknown.
    """
    if wish != "auto" and wish not in KINDS:
        raise CallError(f"The 'output' must be one of auto, {', '.join(KINDS)}. Got '{wish}' instead.")
    held = [t.detach().float() for t in float_outputs(output)]
    names = output.names if isinstance(output, Answers) else tuple(name for name, t in counted(output) if _floats(t))
    look = look or Look()
    if wish != "auto":
        return [_along(wish, look.axis(t), t.ndim) if wish in CLASSES and t.ndim else wish for t in held]
    several = len({t.shape[1:] for t, name in zip(held, names, strict=True) if not name and t.ndim > 2}) > 1
    return [look.kind(t, name, several=several) for t, name in zip(held, names, strict=True)]


def _floats(t: Tensor) -> bool:
    return t.is_floating_point()


class Look:
    """What is known of an output besides its values.

    A tensor of an output is read, in this order, by
    1. targets of the data: whole numbers, one for each row of classes, say that it is logits, and along which axis;
       other numbers of its own shape say that it is values (not where all are 0 and 1, or rows sum to 1),
    2. its name: hidden states, embeddings, features, boxes, depths, flows and reconstructions are values,
    3. its range: in [0, 1] and rows of sum 1 probabilities; rows of length 1 are values, which are compared by their
       cosine; else in [0, 1] sigmoid; logarithms of probabilities are logits,
    4. its name again: `*logits*` are logits,
    5. its shape: (batch, classes) is logits. (batch, position, classes) is, where the model takes whole numbers (token
       ids) of (batch, position), and (batch, class, height, width) where it takes images of as many axes with another
       number of channels; neither where it ends in a normalization, is never negative, or is one of several of
       different shapes. All others are values. Where a shape of three axes or more alone says logits, a warning does.
    """

    def __init__(
        self,
        inputs: Any = None,
        targets: Any = None,
        last: Callable[[], nn.Module | None] | None = None,
        doubts: set[str] | None = None,
    ) -> None:
        """Nothing has to be known.

        Args:
            inputs: of the model.
            targets: of the data.
            last: gives the layer that ran last.
            doubts: what the user was told already; None: nothing is said.
        """
        self.inputs = [t for t in tensors(inputs) if t.ndim]
        self.targets = [t for t in tensors(targets) if t.ndim]
        self._last, self._doubts = last, doubts

    def axis(self, t: Tensor) -> int:
        """The axis of classes by the targets, or the usual one."""
        axis = self._axis_of_targets(t)
        return class_axis("logits", t.ndim) if axis is None else axis

    def kind(self, t: Tensor, name: str = "", *, several: bool = False) -> str:
        """What a tensor of an output is; `several`: there are others without names, of other shapes."""
        plain = output_kind(t)
        axis = self._axis_of_targets(t)
        if axis is not None:
            return plain if name_of(plain) not in {"values", "logits"} else _along("logits", axis, t.ndim)
        if _is_called_values(name) or (plain in {"logits", "values"} and self._are_values(t)):
            return "values"
        if plain != "values" or t.ndim < 2:
            return plain
        return self._kind_of_values(t, name, several=several)

    def _kind_of_values(self, t: Tensor, name: str, *, several: bool) -> str:
        """What a tensor is whose range says nothing."""
        usual = class_axis("logits", t.ndim)
        if "logits" in name:
            return "logits" if t.shape[usual] > 1 else "values"
        if t.ndim < 3 or _has_length_one(t):
            return "values"
        axis = _sums_to_one(t.exp()) if bool((t <= 0).all()) else None
        if axis is None and not several and not bool((t >= 0).all()):
            axis = self._axis_by_shape(t)
            if axis is not None and isinstance(self._last() if self._last else None, NORMS):
                axis = None
            if axis is not None:
                self._warn(t, axis)
        return "values" if axis is None else _along("logits", axis, t.ndim)

    def _warn(self, t: Tensor, axis: int) -> None:
        """Say once that the shape alone decided."""
        if self._doubts is None or OUTPUT in self._doubts:
            return
        self._doubts.add(OUTPUT)
        sizes = ", ".join(map(str, t.shape[1:]))
        warnings.warn(
            f"The output (samples, {sizes}) is read as scores of {t.shape[axis]} classes, by its shape alone. Data "
            "with targets, or output='logits', confirm it; if it is values (features, a flow, an image), say "
            "output='values'.",
            stacklevel=2,
        )

    def _axis_of_targets(self, t: Tensor) -> int | None:
        """The axis of classes that whole-numbered targets leave out; the usual one first."""
        for target in self.targets:
            if target.is_floating_point() or target.dtype == torch.bool or target.is_complex() or t.ndim < 2:
                continue
            wanted = target[:, 0] if target.ndim == t.ndim and target.shape[1] == 1 else target
            for axis in dict.fromkeys((class_axis("logits", t.ndim), t.ndim - 1, 1)):
                rest = (*t.shape[:axis], *t.shape[axis + 1 :])
                if t.shape[axis] > 1 and tuple(wanted.shape) == rest and _are_classes(wanted, t.shape[axis]):
                    return axis
        return None

    def _are_values(self, t: Tensor) -> bool:
        """Whether targets of its own shape are numbers that are no classes."""
        for target in self.targets:
            if target.is_floating_point() and target.shape == t.shape and t.ndim:
                marks = bool(((target == 0) | (target == 1)).all())
                return not marks and not (bool((target >= 0).all()) and _sums_to_one(target.float()) is not None)
        return False

    def _axis_by_shape(self, t: Tensor) -> int | None:
        """The axis on which the classes of an output are, as such outputs mostly are meant; None: it is values."""
        if t.ndim < MAPS:
            tokens = [x for x in self.inputs if not x.is_floating_point() and x.dtype != torch.bool and x.ndim == 2]
            if t.shape[2] > 1 and any(x.shape == t.shape[:2] for x in tokens):
                return 2
            return 1 if t.shape[1] > 1 and any(x.shape == (t.shape[0], t.shape[2]) for x in tokens) else None
        maps = [x for x in self.inputs if x.is_floating_point() and x.ndim == t.ndim and x.shape[0] == t.shape[0]]
        return 1 if maps and t.shape[1] > 1 and all(x.shape[1] != t.shape[1] for x in maps) else None


def _are_classes(target: Tensor, count: int) -> bool:
    classes = target[~torch.isin(target, torch.tensor(IGNORED, device=target.device))] if target.numel() else target
    return bool(classes.numel()) and int(classes.min()) >= 0 and int(classes.max()) < count


def last_layer(model: nn.Module, example: Example) -> nn.Module | None:
    """The layer with weights that ran last on the example."""
    copied = shallow(model)
    ran: list[nn.Module] = []

    def note(module: nn.Module, *_: Any) -> None:
        ran[:] = [module]

    for module in copied.modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_hook(note)
    with evaluating(copied), torch.no_grad():
        example.run(copied)
    return ran[0] if ran else None


@dataclass(frozen=True)
class Reader:
    """Reads the outputs of a model.

    Attributes:
        model: whose outputs they are. example: how it is called.
    """

    model: nn.Module
    example: Example

    def answers(self, output: Any, inputs: Any) -> Answers:
        """What of an output counts."""
        return answers_of(self.example, output, inputs)

    def look(self, inputs: Any, targets: Any) -> Look:
        """What is known of the output on a batch."""
        return look_at(self.model, self.example, inputs, targets)


def look_at(model: nn.Module, example: Example, inputs: Any, targets: Any) -> Look:
    """What is known of a model's output on a batch; the model is run only where that has to say."""
    return Look(inputs, targets, lambda: last_layer(model, example), example.doubts)


def kinds_of(output: Any, kinds: Sequence[str]) -> list[str]:
    """The kinds of an output's float tensors; read anew for another number of them, as lists of samples give."""
    outputs = float_outputs(output)
    if len(outputs) == len(kinds):
        return list(kinds)
    return list(kinds[:1]) * len(outputs) if len(set(kinds)) == 1 else choose_kinds(output, "auto")

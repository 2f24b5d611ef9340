"""Which positions of sequences are real, and which only fill a batch up: read off masks among a model's inputs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taut.core.example import Example
from taut.core.tensors import describe, plain
from taut.errors import CallError, DataError

ATTENDED = frozenset({"attention_mask", "decoder_attention_mask", "pixel_mask", "input_mask"})
"""Inputs that mostly hold 1 where a position is real."""

PADDED = "padding_mask"
"""How inputs end that mostly hold true where a position is padding, as those of `torch.nn.Transformer`."""

FEWEST_AXES = 2
"""Axes of a mask of positions: samples, and the positions of each."""

ONES, ZEROS, ADDED = "ones", "zeros", "added"
"""What stands at real positions: anything but 0; 0 alone; 0, where the mask is added to scores."""

OWN = ""
"""The name under which the mask that the user gave as `mask=` is noted."""

WAYS = ("straight", "turned", "flat", "flat turned")
"""How positions lie in a layer's output: as in the mask, with its first two axes exchanged, or in a row."""


@dataclass(frozen=True)
class Marking:
    """How an input marks positions, as the model shows on its example (`taut.structure.masks`).

    Attributes:
        reading: ONES, ZEROS or ADDED.
        ways: by the name of a module, or of an output, one of WAYS; "" where the mask does not speak of it. Of all
            others sizes decide.
    """

    reading: str
    ways: Mapping[str, str]


def real_positions(example: Example, inputs: Any, *, always: bool = False) -> dict[str, Tensor]:
    """Masks (samples, positions) that are true where a position is real; none where nothing says that any is not.

    They come from `Example.mask`, else from inputs called `attention_mask`, `*padding_mask` and the like, and from
    labels that become the input of a decoder and are negative where they do not count. Inputs count as masks where the
    model has shown that it reads them so (`Example.marking`).

    Args:
        example: how the model is called.
        inputs: of one batch.
        always: give the masks even where no position is padding.

    Raises:
        CallError: the mask of the user's names no input, or raises.
        DataError: it has not the shape of a mask.
    """
    if example.mask is not None:
        masks = {OWN: given_mask(example, inputs)}
        if example.marking.get(OWN, True) is None:
            _warn_once(example, OWN, masks[OWN])
            return {}
    else:
        named = named_inputs(example, inputs)
        masks = {key: real for key in named if (real := _read(example, key, named[key])) is not None}
    return {} if not always and all(bool(mask.all()) for mask in masks.values()) else masks


def named_inputs(example: Example, inputs: Any) -> Mapping[str, Any]:
    """Inputs by the names that they have in `forward`."""
    if isinstance(inputs, Mapping):
        return inputs
    if isinstance(example.value, tuple) and isinstance(inputs, tuple | list):
        return dict(zip(example.signature.positional, inputs, strict=False))
    return {}


def called_mask(example: Example, key: str, value: Any) -> bool:
    """Whether an input is called like a mask, or is labels that the model does not run without, and may be one."""
    if not isinstance(value, Tensor) or value.ndim < FEWEST_AXES:
        return False
    if key in example.answers:
        return value.ndim == FEWEST_AXES and not value.is_floating_point()
    return (key in ATTENDED or key.endswith(PADDED)) and (value.ndim == FEWEST_AXES or key == "pixel_mask")


def _read(example: Example, key: str, value: Any) -> Tensor | None:
    """The real positions by an input; None where it is no such mask."""
    if not called_mask(example, key, value):
        return None
    if key in example.answers:
        marking = example.marking.get(key)
        return (value >= 0).detach() if marking is not None and bool((value < 0).any()) else None
    marking = example.marking.get(key)
    if marking is None:
        _warn_once(example, key, value)
        return None
    return read_mask(value, marking.reading)


def read_mask(value: Tensor, reading: str) -> Tensor | None:
    """Where the positions are real; None where the values are not of that reading."""
    value = value.detach()
    if reading == ZEROS:
        return value == 0  # -inf is padding, too
    if reading == ADDED:
        return value >= 0 if bool((value <= 0).all()) else None
    return value != 0 if value.dtype == torch.bool or bool((value >= 0).all()) else None


def _warn_once(example: Example, key: str, value: Tensor) -> None:
    """Say that a mask is not used, where it holds different values."""
    if key in example.doubts or bool((value == value.flatten()[0]).all()):
        return
    example.doubts.add(key)
    if key == OWN:
        reason = "The mask is not used, and all positions count: a layer is as wide as the sequences are long, and the "
        reason += "model takes no shorter ones, so that it cannot be told which axis the mask speaks of."
    else:
        reason = f"The input '{key}' is not used as a mask, and all positions count: running the model did not show "
        reason += "which of its values stand for padding, or which axis of the layers it speaks of. If some positions "
        reason += "are to be left out, give `mask=`: a function of the inputs, true where a position is real."
    warnings.warn(reason, stacklevel=2)


def given_mask(example: Example, inputs: Any, *, whole: bool = False) -> Tensor:
    """What the user's mask says.

    Args:
        example: how the model is called.
        inputs: of one batch.
        whole: they are a batch as it comes, in which some position is to be real; not a few samples of one.

    Raises:
        CallError: it names no input, or raises.
        DataError: it has not the shape of a mask, or no position is real.
    """
    mask = example.mask
    value: Any
    if callable(mask):
        try:
            value = mask(inputs)
        except Exception as error:
            remedy = ". It gets one argument, the inputs as the model gets them" if isinstance(error, TypeError) else ""
            raise CallError(f"The mask raised {type(error).__name__}: {error}{remedy}") from error
        value = _as_tensor(value)
    else:
        named, mask = named_inputs(example, inputs), str(mask)
        if mask not in named:
            known = ", ".join(map(str, named)) or "none with a name"
            raise CallError(f"The mask '{mask}' is no input of the model. Inputs: {known}.")
        value = named[mask]
    if not isinstance(value, Tensor) or value.ndim < FEWEST_AXES:
        raise DataError(
            "A mask must be a tensor (samples, positions), true where a position is real. "
            f"Got {describe(value)} instead."
        )
    samples = example.samples.size(inputs)
    if samples not in value.shape[:FEWEST_AXES]:
        raise DataError(
            f"A mask must have a row for each of the {samples} samples of the batch, {describe(inputs)}. "
            f"Got {describe(value)} instead: return one (samples, positions)."
        )
    real = value.detach() != 0 if callable(mask) else read_mask(value, _reading_of(str(mask), value))
    if real is None or (whole and not bool(real.any())):
        name = "" if callable(mask) else f" '{mask}'"
        raise DataError(
            f"The mask{name} says of no position that it is real: of {value.numel()} values {int((value != 0).sum())} "
            "are not 0. Give `mask=` as a function of the inputs that is true where a position is real."
        )
    return real


def _as_tensor(value: Any) -> Any:
    """What a function gave, where it is an array or rows of equal length, as a tensor."""
    if isinstance(value, list | tuple):
        try:
            return torch.tensor(value)
        except (ValueError, TypeError, RuntimeError):
            return value
    return plain(value)


def _reading_of(name: str, value: Tensor) -> str:
    """How an input is read that the user names: true where real, but by names as torch's, and by negative values."""
    if name.endswith(PADDED):
        return ZEROS
    return ADDED if value.is_floating_point() and bool((value < 0).any()) else ONES


def real_rows(example: Example, masks: Mapping[str, Tensor], sizes: tuple[int, ...], place: str = "") -> Tensor | None:
    """For every position of a layer whether it is real, flat; None where the masks do not tell, or all are.

    Positions that several masks speak of are real where one of them says so.

    Args:
        example: says whether time comes first, and how each mask lies in the layers.
        masks: of the batch.
        sizes: of the axes of the layer's output but for its channels.
        place: name of the layer, or the output (`output_name`).
    """
    parts = [rows for key, mask in masks.items() if (rows := _rows(example, key, mask, sizes, place)) is not None]
    if not parts:
        return None
    real = torch.stack(parts).any(0) if len(parts) > 1 else parts[0]
    return None if bool(real.all()) else real


def output_name(number: int, middle: int) -> str:
    """The place of one of the model's outputs; `middle`: its channels are on axis 1."""
    return f":{number}:{middle}"


def _rows(example: Example, key: str, mask: Tensor, sizes: tuple[int, ...], place: str) -> Tensor | None:
    sizes, mask = tuple(sizes), mask.cpu()
    marking = example.marking.get(key)
    if marking is None and key in example.marking:
        return None
    if marking is not None and place in marking.ways:
        return laid(mask, sizes, marking.ways[place])
    first = next(iter(ways_of(mask, sizes, time_first=example.samples.axis == 1)), "")
    return laid(mask, sizes, first)


def ways_of(mask: Tensor, sizes: tuple[int, ...], *, time_first: bool) -> list[str]:
    """How the positions of a mask may lie in these sizes; what is likelier comes first."""
    likely = ("turned", "straight", "flat turned") if time_first else ("straight", "turned", "flat")
    return [way for way in likely if laid(mask, sizes, way) is not None]


def laid(mask: Tensor, sizes: tuple[int, ...], way: str) -> Tensor | None:
    """A mask over positions that lie in one of WAYS, flat; None where they cannot."""
    if not way:
        return None
    one = mask.transpose(0, 1) if way.endswith("turned") and mask.ndim == FEWEST_AXES else mask
    if way.startswith("flat"):
        return one.flatten() if sizes == (mask.numel(),) and len(mask) < mask.numel() else None
    if sizes[: one.ndim] != tuple(one.shape):
        return None
    return one.reshape(*one.shape, *(1,) * (len(sizes) - one.ndim)).expand(sizes).flatten()

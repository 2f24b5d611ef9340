"""Which positions of sequences are real, and which only fill a batch up: read off masks among a model's inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from taut.core.example import Example
from taut.core.tensors import describe
from taut.errors import CallError, DataError

ATTENDED = frozenset({"attention_mask", "decoder_attention_mask", "pixel_mask", "input_mask"})
"""Inputs that hold 1 where a position is real."""

PADDED = "padding_mask"
"""How inputs end that hold true where a position is padding, as those of `torch.nn.Transformer`."""

FEWEST_AXES = 2
"""Axes of a mask of positions: samples, and the positions of each."""


def real_positions(example: Example, inputs: Any, *, always: bool = False) -> tuple[Tensor, ...]:
    """Masks (samples, positions) that are true where a position is real; none where nothing says that any is not.

    They come from `Example.mask`, else from inputs called `attention_mask`, `*padding_mask` and the like, and from
    labels of an encoder-decoder model that are negative where they do not count.

    Args:
        example: how the model is called.
        inputs: of one batch.
        always: give the masks even where no position is padding.

    Raises:
        CallError: the mask of the user's names no input, or raises.
        DataError: it has not the shape of a mask.
    """
    if example.mask is not None:
        return (_given(example, inputs),)
    named = _named(example, inputs)
    masks = [real for key, value in named.items() if (real := _read(key, value)) is not None]
    masks += [named[key] >= 0 for key in example.answers if key in named and _filled_up(named[key])]
    return () if not always and all(bool(mask.all()) for mask in masks) else tuple(masks)


def _named(example: Example, inputs: Any) -> Mapping[str, Any]:
    """Inputs by the names that they have in `forward`."""
    if isinstance(inputs, Mapping):
        return inputs
    if isinstance(example.value, tuple) and isinstance(inputs, tuple | list):
        return dict(zip(example.signature.positional, inputs, strict=False))
    return {}


def _filled_up(labels: Any) -> bool:
    whole = isinstance(labels, Tensor) and labels.ndim >= FEWEST_AXES and not labels.is_floating_point()
    return whole and bool((labels < 0).any())


def _read(key: str, value: Any) -> Tensor | None:
    """The real positions by an input of that name; None where it is no such mask."""
    if not isinstance(value, Tensor) or value.ndim < FEWEST_AXES or not (key in ATTENDED or key.endswith(PADDED)):
        return None
    if key in ATTENDED:
        whole = value.dtype == torch.bool or bool((value >= 0).all())
        return (value != 0).detach() if whole and (value.ndim == FEWEST_AXES or key == "pixel_mask") else None
    return ((value == 0) if value.is_floating_point() else ~value.bool()).detach()  # -inf is padding, too


def _given(example: Example, inputs: Any) -> Tensor:
    """What the user's mask says."""
    mask = example.mask
    value: Any
    if callable(mask):
        try:
            value = mask(inputs)
        except Exception as error:
            raise CallError(f"The mask raised {type(error).__name__}: {error}") from error
    else:
        named, mask = _named(example, inputs), str(mask)
        if mask not in named:
            known = ", ".join(map(str, named)) or "none with a name"
            raise CallError(f"The mask '{mask}' is no input of the model. Inputs: {known}.")
        value = named[mask]
        value = _read(mask, value) if mask.endswith(PADDED) else value
    if not isinstance(value, Tensor) or value.ndim < FEWEST_AXES:
        raise DataError(
            "A mask must be a tensor (samples, positions), true where a position is real. "
            f"Got {describe(value)} instead."
        )
    return (value != 0).detach()


def real_rows(example: Example, masks: Sequence[Tensor], sizes: Sequence[int]) -> Tensor | None:
    """For every position of a layer whether it is real, flat; None where the masks do not tell, or all are.

    Positions that several masks of the same shape speak of are real where one of them says so.

    Args:
        example: says whether time comes first.
        masks: of the batch.
        sizes: of the axes of the layer's output but for its channels.
    """
    time_first = example.samples.axis == 1
    parts = [rows for mask in masks if (rows := _rows(mask, tuple(sizes), time_first=time_first)) is not None]
    if not parts:
        return None
    real = torch.stack(parts).any(0) if len(parts) > 1 else parts[0]
    return None if bool(real.all()) else real


def _rows(mask: Tensor, sizes: tuple[int, ...], *, time_first: bool) -> Tensor | None:
    mask = mask.cpu()
    turned = mask.transpose(0, 1) if mask.ndim == FEWEST_AXES else mask
    for one in (turned, mask) if time_first else (mask, turned):
        if sizes[: one.ndim] == tuple(one.shape):
            wide = one.reshape(*one.shape, *(1,) * (len(sizes) - one.ndim))
            return wide.expand(sizes).flatten()
    first = turned if time_first else mask
    return first.flatten() if sizes == (mask.numel(),) and len(mask) < mask.numel() else None

"""How a model is called: the example that fixes it, and where its samples are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from types import GeneratorType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from taut.core.modes import device_of
from taut.core.nested import PLAIN, digest, fresh, lists_of, map_lists, map_numbers, rows_of
from taut.core.tensors import describe, detached, map_tensors, plain, structure_of, tensors
from taut.errors import DataError, ModelError


class Example:
    """An input that fixes how a model is called.

    A Mapping whose keys are all parameter names of `forward` goes as keywords, any other Mapping as the one positional
    argument; a tuple as positional arguments; anything else as one argument.

    Attributes:
        value: the input, without autograd history.
        keywords: whether it goes as keywords.
        samples: how many samples an input holds, and where.
        batch: samples in the example.
        divisible: whether the model computes the same for a part of a batch; `taut.trace` finds out.
        witnesses: inputs on which what is made of the model is tried: the example's first samples, and what takes
            another path through its code (`taut.structure.coverage`, which notes `steps`, `marks` and `covered`).
        paths: those of the witnesses that are of another shape, or take other steps, than all before them.

    Raises:
        DataError: it holds no tensor, or an empty one.
    """

    def __init__(self, model: nn.Module, value: Any) -> None:
        """Note how `value` is passed to `model`."""
        self.value = detached(plain(value))
        self.keywords = isinstance(value, Mapping) and set(value) <= _parameter_names(model)
        self.samples = Samples()
        self.batch = self.samples.size(self.value)
        self.divisible = True
        self.witnesses: tuple[Any, ...] = ()
        self.paths: tuple[Any, ...] = ()
        self.steps: set[tuple[str, str, str]] = set()
        self.marks: set[Any] = set()
        self.covered: set[Any] = set()

    def run(self, model: nn.Module, inputs: Any = None) -> Any:
        """The model's output on `inputs` (default: on the example), moved to the model's device.

        The model gets copies: some write to their input.

        Raises:
            ModelError: the model raised; its own error is the cause.
        """
        inputs = fresh(self.value if inputs is None else inputs, device_of(model))
        try:
            if self.keywords:
                output = model(**inputs)
            else:
                output = model(*inputs) if isinstance(self.value, tuple) else model(inputs)
            return list(output) if isinstance(output, GeneratorType) else output
        except TautControl:
            raise
        except Exception as error:
            raise ModelError(
                f"The model cannot be run on an input of structure {describe(inputs)}: {type(error).__name__}: {error}"
            ) from error

    def inputs_of(self, batch: Any) -> tuple[Any, Any]:
        """A batch as (inputs, targets or None).

        Raises:
            DataError: the batch has neither the example's structure nor that of (inputs, targets).
        """
        batch = plain(batch)
        if self._fits(batch):
            return self._as_example(batch), None
        if isinstance(batch, list | tuple) and len(batch) in {1, 2} and self._fits(batch[0]):
            return self._as_example(batch[0]), batch[1] if len(batch) == 2 else None
        raise DataError(
            f"A batch must look like the example, {describe(self.value)}, or be (inputs, targets) with such inputs. "
            f"Got {describe(batch)} instead."
        )

    def _fits(self, inputs: Any) -> bool:
        """Whether inputs have the structure of the example; lists of samples may be of any length."""
        if not self.samples.listed:
            return bool(structure_of(inputs) == structure_of(self.value))
        inputs = self._as_example(inputs)
        return (
            bool(_item_structure(inputs) == _item_structure(self.value)) and len(set(map(len, lists_of(inputs)))) == 1
        )

    def _as_example(self, inputs: Any) -> Any:
        """A tuple of samples as the list that the example is."""
        as_list = self.samples.listed and isinstance(self.value, list) and isinstance(inputs, tuple)
        return list(inputs) if as_list else inputs


@dataclass(frozen=True)
class Samples:
    """Where the samples of an input are.

    Attributes:
        axis: of the tensors whose size there is the leading tensor's: 0, or 1 for a model that takes time first.
        listed: whether the input is, or holds, lists with one item per sample, such as images of several sizes.
        lead: place of the tensor that counts the samples, among all of an input.
        whole: places of those that hold no samples, such as a mask for all of them.
        rows: places of the lists of plain numbers that hold one for each sample, such as lengths, among all such lists.
    """

    axis: int = 0
    listed: bool = False
    lead: int = 0
    whole: frozenset[int] = frozenset()
    rows: frozenset[int] = frozenset()

    def size(self, inputs: Any) -> int:
        """How many samples inputs hold.

        Raises:
            DataError: they hold no leading tensor, or it is empty or has no such axis.
        """
        if self.listed:
            return len(lists_of(inputs)[0])
        lead = next(islice(tensors(inputs), self.lead, None), None)
        if lead is None or lead.ndim <= self.axis or lead.numel() == 0:
            raise DataError(
                f"Inputs must hold at least one tensor with a batch dimension. Got {describe(inputs)} instead."
            )
        return int(lead.shape[self.axis])

    def part(self, value: Any, part: slice, size: int) -> Any:
        """Some samples of outputs or targets of `size` samples; tensors without such an axis stay whole."""
        if self.listed and any(len(items) == size for items in lists_of(value)):
            return map_lists(lambda items: items[part] if len(items) == size else items, value)
        return _sliced(value, part, size, 0 if self.listed else self.axis)

    def cut(self, inputs: Any, part: slice, size: int) -> Any:
        """Some samples of inputs; what holds none in the example, or has no such axis, stays whole."""
        sliced = self.part(self._map_rows(lambda row: row[part], inputs), part, size)
        pairs = enumerate(zip(tensors(inputs), tensors(sliced), strict=True)) if self.whole else ()
        pieces = iter([old if place in self.whole else new for place, (old, new) in pairs])
        return map_tensors(lambda _: next(pieces), sliced) if self.whole else sliced

    def axis_of(self, t: Tensor, size: int) -> int | None:
        """The axis of a tensor of inputs on which its `size` samples lie; None where there is none."""
        return None if self.listed else _axis_of(t, size, self.axis)

    def joined(self, batches: Sequence[Any]) -> Any:
        """Inputs with the same `signature` as one."""
        if self.listed:
            merged_lists = iter([list(chain(*column)) for column in zip(*map(lists_of, batches), strict=True)])
            return map_lists(lambda _: next(merged_lists), batches[0])
        size = self.size(batches[0])
        columns = zip(*(tensors(batch) for batch in batches), strict=True)
        merged = iter([self._column(place, column, size) for place, column in enumerate(columns)])
        rows = iter([list(chain(*column)) for column in zip(*map(self._rows, batches), strict=True)])
        return map_tensors(lambda _: next(merged), self._map_rows(lambda _: next(rows), batches[0]))

    def _map_rows(self, function: Callable[[list[Any]], Any], inputs: Any) -> Any:
        """Inputs with `function` applied to the lists of numbers that hold one for each sample."""
        places = count()
        return map_numbers(lambda row: function(row) if next(places) in self.rows else row, inputs)

    def _rows(self, inputs: Any) -> list[list[Any]]:
        return [row for place, row in enumerate(rows_of(inputs)) if place in self.rows]

    def _column(self, place: int, column: Sequence[Tensor], size: int) -> Tensor:
        axis = None if place in self.whole else _axis_of(column[0], size, self.axis)
        return column[0] if axis is None or len(column) == 1 else torch.cat(list(column), axis)

    def signature(self, inputs: Any) -> tuple[Any, ...]:
        """What inputs must have in common to be joined: all but the samples themselves."""
        if self.listed:
            return ("listed",)
        size, places = self.size(inputs), count()
        inputs = self._map_rows(lambda _: None, inputs)
        return tuple(
            self._mark(leaf, size, next(places) if isinstance(leaf, Tensor) else 0)
            for leaf in pytree.tree_leaves(inputs)
        )

    def _mark(self, leaf: Any, size: int, place: int) -> tuple[Any, ...]:
        if not isinstance(leaf, Tensor):
            return (repr(leaf) if isinstance(leaf, PLAIN) else id(leaf),)
        axis = None if place in self.whole else _axis_of(leaf, size, self.axis)
        if axis is None:  # the same for all samples of the batch
            return (leaf.dtype, tuple(leaf.shape), digest(leaf))
        return (leaf.dtype, axis, *leaf.shape[:axis], *leaf.shape[axis + 1 :])


def _item_structure(value: Any) -> Any:
    """The structure of inputs of which the lists may be of any length."""
    return structure_of(map_lists(lambda items: (structure_of(items[0]) if items else None,), value))


def _axis_of(t: Tensor, size: int, axis: int) -> int | None:
    """The axis on which a tensor holds `size` samples: the one of the inputs, or the first; None without one."""
    return next((a for a in dict.fromkeys((axis, 0)) if t.ndim > a and t.shape[a] == size), None)


def _sliced(value: Any, part: slice, size: int, axis: int) -> Any:
    def cut(t: Tensor) -> Tensor:
        where = _axis_of(t, size, axis)
        return t if where is None else t[(slice(None),) * where + (part,)]

    return map_tensors(cut, value)


class TautControl(BaseException):
    """Raised by our own hooks to leave a forward pass early; no `except Exception` of a user's model holds it up."""


def _parameter_names(model: nn.Module) -> set[str]:
    try:
        return set(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        return set()

"""Data as people have them: what of a batch is the model's input, what is a target, and single samples as a batch."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset

from taut.core.nested import is_row
from taut.core.tensors import as_tensor, map_tensors, structure_of, tensors

TARGETS = frozenset(
    {
        "labels",
        "label",
        "label_ids",
        "labels_ids",
        "decoder_labels",
        "lm_labels",
        "mc_labels",
        "class_labels",
        "mask_labels",
        "targets",
        "target",
        "y",
        "start_positions",
        "end_positions",
        "next_sentence_label",
        "sentence_order_label",
    }
)
"""Names under which datasets keep what a model is to answer."""


@dataclass(frozen=True)
class Signature:
    """The parameters of a model's forward.

    Attributes:
        names: of all of them. named: those that can be given by name. required: those without a default.
        positional: those that can be given by position, in order.
        open: whether it takes keywords of any name.
    """

    names: frozenset[str] = frozenset()
    named: frozenset[str] = frozenset()
    required: frozenset[str] = frozenset()
    positional: tuple[str, ...] = ()
    open: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> Signature:
        """Of a model; empty where Python does not know it."""
        try:
            parameters = inspect.signature(model.forward).parameters
        except (TypeError, ValueError):
            return cls()
        kinds = inspect.Parameter
        single = {n: p for n, p in parameters.items() if p.kind not in {kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD}}
        return cls(
            frozenset(parameters),
            frozenset(name for name, p in single.items() if p.kind is not kinds.POSITIONAL_ONLY),
            frozenset(name for name, p in single.items() if p.default is kinds.empty),
            tuple(name for name, p in single.items() if p.kind is not kinds.KEYWORD_ONLY),
            any(p.kind is kinds.VAR_KEYWORD for p in parameters.values()),
        )


def by_name(value: Any) -> dict[str, Any] | None:
    """What stands in a Mapping, a named tuple or a dataclass, by name; None of anything else."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in fields(value)}
    return None


def targets_in(batch: Mapping[str, Any], inputs: Iterable[str]) -> Any:
    """The targets among the entries of a batch: the only one, or all by name; None where there is none.

    Args:
        batch: by name.
        inputs: names of those that are inputs of the model.
    """
    held = {key: batch[key] for key in batch if key in TARGETS and key not in set(inputs) and batch[key] is not None}
    return next(iter(held.values())) if len(held) == 1 else held or None


def holds_arrays(value: Any) -> bool:
    """Whether a batch holds numpy's arrays."""
    return any(isinstance(leaf, np.ndarray) for leaf in pytree.tree_leaves(_opened(value)))


def _opened(value: Any) -> Any:
    return {key: _opened(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def narrowed(value: Any, dtype: torch.dtype | None) -> Any:
    """The same nest with numbers in double precision, numpy's own, as `dtype`."""
    if dtype in {None, torch.float64}:
        return value
    return map_tensors(lambda t: t.to(dtype) if t.dtype == torch.float64 else t, value)


def fitted(value: Any, dtype: torch.dtype, known: Container[torch.dtype]) -> Any:
    """The same nest with floating-point numbers of a type that is not `known`, numpy's, as `dtype`.

    Args:
        value: a nest that came as arrays.
        dtype: of the model.
        known: types that the model, or the example, is of.
    """
    return map_tensors(lambda t: t.to(dtype) if t.is_floating_point() and t.dtype not in known else t, value)


MISFIT = re.compile(r"dtype|[Ii]nput type|scalar type|not implemented for|expected .*(Float|Half|Double|BFloat16|Char)")
"""What errors of torch say that are of types."""


def type_remedy(error: Exception, inputs: Any, known: Sequence[torch.dtype]) -> str:
    """What to do where a model failed on the type of its input; "" where that is not the reason.

    Args:
        error: that the model raised.
        inputs: that it was given.
        known: the types of its weights in floating point.
    """
    dtypes = list(dict.fromkeys(t.dtype for t in tensors(inputs)))
    floats = [dtype for dtype in dtypes if dtype.is_floating_point]
    others = [dtype for dtype in floats or dtypes if dtype not in known]
    if not others or not known or not MISFIT.search(str(error)):
        return ""
    words = [", ".join(str(d).removeprefix("torch.") for d in some) for some in (others, dict.fromkeys(known))]
    return f". The input is {words[0]}, the model's weights are {words[1]}: convert the input as in training"


def no_input(value: Any) -> str:
    """Why something that gives batches is no example, and what to do; "" for anything else."""
    if isinstance(value, Mapping | list | tuple | str | bytes | type) or by_name(value) is not None:
        return ""
    kind, batch = type(value).__name__, ""
    if isinstance(value, Iterator):
        batch = "next(it), of one made anew"
    elif hasattr(value, "__getitem__") or isinstance(value, Dataset):
        batch = "next(iter(DataLoader(dataset, batch_size=8)))"
    elif hasattr(value, "__iter__"):
        batch = "next(iter(loader))"
    return f"The example must be one batch, as the model takes it. Got {kind} instead: give {batch}." if batch else ""


def differences(example: Any, inputs: Any) -> list[str]:
    """In words how inputs depart from the example: entries that lack, and those of another kind."""
    named = by_name(example), by_name(inputs)
    if named[0] is not None and named[1] is not None:
        lacking = [f"it lacks '{key}'" for key in named[0] if key not in named[1]]
        pairs = [(f"'{key}'", value, named[1][key]) for key, value in named[0].items() if key in named[1]]
        return lacking + [words for name, a, b in pairs if (words := _difference(name, a, b))]
    words = _difference("it", example, inputs)
    return [words] if words else []


def _difference(name: str, example: Any, value: Any) -> str:
    if structure_of(example) == structure_of(value) or not isinstance(example, Tensor):
        return ""
    if not isinstance(value, Tensor):
        return f"{name} is {'an' if type(value).__name__[0] in 'aeiou' else 'a'} {type(value).__name__}, not a tensor"
    if value.is_floating_point() != example.is_floating_point():
        kinds = [str(t.dtype).removeprefix("torch.") for t in (value, example)]
        return f"{name} is {kinds[0]} where the example's is {kinds[1]}: convert it as in training"
    return f"{name} has {value.ndim} dimensions where the example's has {example.ndim}"


def collated(samples: Sequence[Any]) -> Any:
    """Single samples as one batch: tensors, arrays and numbers stacked, all else in lists.

    Raises:
        ValueError: they are of different shapes or forms.
    """
    first = samples[0]
    parts = [by_name(sample) for sample in samples]
    if parts[0] is not None:
        held = [part for part in parts if part is not None]
        if len(held) < len(parts):
            raise ValueError("samples of different forms")
        keys = [key for key in parts[0] if all(key in part for part in held)]
        return {key: collated([part[key] for part in held]) for key in keys}
    if isinstance(first, tuple | list) and not is_row(first):
        if len({len(sample) for sample in samples}) > 1:
            raise ValueError("samples of different lengths")
        return tuple(collated(column) for column in zip(*samples, strict=True))
    stacked = [_tensor(sample) for sample in samples]
    if not all(isinstance(t, Tensor) for t in stacked):
        return list(samples)
    if len({(t.shape, t.dtype) for t in stacked}) > 1:
        raise ValueError("samples of different shapes")
    return torch.stack(stacked)


def _tensor(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return as_tensor(np.asarray(value))
    return torch.tensor(value) if is_row(value) or isinstance(value, Number) else value


def shape_of(sample: Any) -> Any:
    """What samples must have in common to be stacked."""
    named = by_name(sample)
    if named is not None:
        return tuple((key, shape_of(named[key])) for key in sorted(named, key=str))
    if isinstance(sample, tuple | list) and not is_row(sample):
        return tuple(map(shape_of, sample))
    value = _tensor(sample)
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else type(value).__name__


def grouped(samples: Iterable[Any], size: int, collate: Callable[[Sequence[Any]], Any]) -> Iterator[Any]:
    """Batches of up to `size` samples of equal shapes, from so many samples that follow each other.

    Args:
        samples: single ones.
        size: of a batch.
        collate: makes a batch of samples.
    """
    held: list[Any] = []
    for sample in samples:
        held.append(sample)
        if len(held) == size:
            yield from _apart(held, collate)
            held = []
    if held:
        yield from _apart(held, collate)


def _apart(samples: Sequence[Any], collate: Callable[[Sequence[Any]], Any]) -> Iterator[Any]:
    groups: dict[Any, list[Any]] = {}
    for sample in samples:
        groups.setdefault(shape_of(sample), []).append(sample)
    return map(collate, groups.values())

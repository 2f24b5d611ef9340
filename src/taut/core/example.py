"""How a model is called: the example that fixes it, and what of a batch goes into the model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from types import GeneratorType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from taut.core.formats import (
    TARGETS,
    Signature,
    by_name,
    collated,
    differences,
    fitted,
    holds_arrays,
    narrowed,
    no_input,
    targets_in,
    type_remedy,
)
from taut.core.modes import device_of, looked_into
from taut.core.nested import fresh, lists_of, map_lists
from taut.core.samples import Samples
from taut.core.tensors import describe, detached, plain, structure_of, tensors
from taut.errors import DataError, ModelError

FORMS = (
    "A batch must look like the example, {example}, or be (inputs, targets) with such inputs, or name its entries as "
    "the example does."
)


BEHIND = ":targets"
"""Among `Example.doubts`: what stands behind the targets."""

Mask = str | Callable[[Any], Tensor] | None
"""What says which positions are real: the name of an input, or a function of the inputs; None: as they are called."""


class Example:
    """An input that fixes how a model is called.

    A Mapping whose keys are all parameter names of `forward` goes as keywords, any other Mapping as the one positional
    argument; a tuple as positional arguments; anything else as one argument.

    Attributes:
        value: the input, without autograd history.
        keywords: whether it goes as keywords.
        signature: the parameters of the model's forward.
        answers: names of inputs that are targets, too: the model does not run without them.
        output: what of an output counts, and how (`taut.structure.answers.Wish`); None: all that is an answer.
        mask: what says which positions are real: a function of inputs, or the name of one; None: what is called so.
        samples: how many samples an input holds, and where.
        batch: samples in the example.
        divisible: whether the model computes the same for a part of a batch; `taut.trace` finds out.
        witnesses: inputs on which what is made of the model is tried: the example's first samples, and what takes
            another path through its code (`taut.structure.coverage`, which notes `steps`, `marks` and `covered`).
        paths: those of the witnesses that are of another shape, or take other steps, than all before them.
        marking: of inputs that are masks of positions, how they mark them (`taut.core.padding.Marking`); None of those
            of which that cannot be told.
        doubts: of what is not certain, such as those, what the user was told.

    Raises:
        DataError: it holds no tensor, or an empty one.
    """

    def __init__(
        self, model: nn.Module, value: Any, *, keywords: bool | None = None, answers: Iterable[str] = ()
    ) -> None:
        """Note how `value` is passed to `model`.

        Args:
            model: is not run.
            value: the input.
            keywords: whether it goes as keywords; None: as its keys say.
            answers: see above.
        """
        converted = plain(value)
        if not tensors(converted) and (words := no_input(value)):
            raise DataError(words)
        own = _dtypes_of(model)
        if holds_arrays(value):
            converted = fitted(narrowed(converted, own[0]), own[0], own)
        self.value = detached(converted)
        self.signature = Signature.of(model)
        mapping = isinstance(value, Mapping)
        self.keywords = mapping and set(value) <= self.signature.names if keywords is None else keywords
        self.answers = frozenset(answers)
        self.output: Any = None
        self.mask: Mask = None
        self._container = _container(value, self.value) if mapping and not self.keywords else None
        self._dtype = next((t.dtype for t in tensors(self.value) if t.is_floating_point()), own[0])
        if any(t.dtype == torch.float64 for t in tensors(self.value)):
            self._dtype = torch.float64
        self._dtypes = {t.dtype for t in tensors(self.value)} | set(own)
        self.samples = Samples()
        self.batch = self.samples.size(self.value)
        self.divisible = True
        self.witnesses: tuple[Any, ...] = ()
        self.paths: tuple[Any, ...] = ()
        self.steps: set[tuple[str, str, str]] = set()
        self.marks: set[Any] = set()
        self.covered: set[Any] = set()
        self.marking: dict[str, Any] = {}
        self.doubts: set[str] = set()

    def run(self, model: nn.Module, inputs: Any = None, *, fused: bool = False, training: bool = False) -> Any:
        """The model's output on `inputs` (default: on the example), moved to the model's device.

        The model gets copies: some write to their input.

        Args:
            model: is called.
            inputs: like the example.
            fused: whether torch's encoder layers may take their fused path, as they do for the user.
            training: whether it is trained, with checkpoints where it has them to spare memory.

        Raises:
            ModelError: the model raised; its own error is the cause.
        """
        inputs = fresh(self.value if inputs is None else inputs, device_of(model))
        try:
            with nullcontext() if training else looked_into(fused=fused):
                output = self._called(model, inputs)
                return list(output) if isinstance(output, GeneratorType) else output
        except TautControl:
            raise
        except Exception as error:
            raise ModelError(
                f"The model cannot be run on an input of structure {describe(inputs)}: {type(error).__name__}: {error}"
                f"{type_remedy(error, inputs, _dtypes_of(model))}"
            ) from error

    def _called(self, model: nn.Module, inputs: Any) -> Any:
        if self.keywords:
            return model(**inputs)
        if self._container is not None:
            return model(self._container(inputs))
        return model(*inputs) if isinstance(self.value, tuple) else model(inputs)

    def inputs_of(self, batch: Any) -> tuple[Any, Any]:
        """A batch as (inputs, targets or None).

        Entries by name are the model's where the example or the signature of `forward` names them, and targets where
        they are called so (`taut.core.formats.TARGETS`); all others are dropped. Of a tuple the first entry
        behind the inputs that is not None holds the targets, and what follows is dropped.

        Raises:
            DataError: the batch has none of these forms.
        """
        converted = plain(batch)
        result = self._read(converted)
        if result is None:
            raise DataError(self._unfit(converted))
        inputs, targets = result
        self._warn_of_labels(converted, inputs, targets)
        inputs = narrowed(inputs, self._dtype)
        if not holds_arrays(batch):
            return inputs, targets
        return self._fitted(inputs), self._fitted(narrowed(targets, self._dtype))

    def _fitted(self, value: Any) -> Any:
        return fitted(value, self._dtype, self._dtypes)

    def is_batch(self, batch: Any) -> bool:
        """Whether it can be read as one."""
        return self._read(plain(batch)) is not None

    def is_sample(self, item: Any) -> bool:
        """Whether it is one sample of a batch, with or without targets, and no batch itself."""
        try:
            result = None if self.is_batch(item) else self._read(plain(self.batched([item])))
        except (ValueError, RuntimeError, TypeError):
            return False
        if result is None or self.samples.listed:
            return result is not None
        return all(_alike(a, b) for a, b in zip(tensors(self.value), tensors(result[0]), strict=False))

    def batched(self, samples: Sequence[Any]) -> Any:
        """Single samples as one batch.

        Raises:
            ValueError: they cannot be stacked.
        """
        if not self.samples.listed or not isinstance(self.value, list):
            batch = collated(samples)
            return self._fitted(batch) if holds_arrays(samples[0]) else batch
        if isinstance(samples[0], tuple | list):
            return tuple(map(list, zip(*samples, strict=True)))
        return list(samples)

    def is_empty(self, inputs: Any) -> bool:
        """Whether inputs hold no sample, such as the rest of a loader."""
        if self.samples.listed:
            return not lists_of(inputs)[0]
        held = tensors(inputs)
        return bool(held) and all(t.ndim > self.samples.axis and t.shape[self.samples.axis] == 0 for t in held[:1])

    def _read(self, batch: Any) -> tuple[Any, Any] | None:
        """A batch as inputs and targets; None where it is none."""
        inputs = self._read_inputs(batch)
        if inputs is not None:
            return inputs, self._targets(batch)
        if isinstance(batch, list | tuple) and len(batch):
            inputs = self._read_inputs(batch[0])
            if inputs is not None:
                return inputs, _first(batch[1:]) if len(batch) > 1 else self._targets(batch[0])
            joined = self._joined(batch)
            if joined is not None:
                return joined
            count = len(self.value) if isinstance(self.value, tuple) else 0
            if 0 < count < len(batch) and self._fits(batch[:count]):  # (a, b, targets) for a model of (a, b)
                return tuple(batch[:count]), _first(batch[count:])
        if isinstance(batch, list) and len(batch) > 1 and not self.samples.listed:
            return self._read_samples(batch)
        return None

    def _joined(self, batch: Sequence[Any]) -> tuple[Any, Any] | None:
        """A list of single inputs with their targets; None where it is none."""
        samples = batch[0]
        if self.samples.listed or len(batch) < 2 or type(samples) not in {list, tuple} or len(samples) < 2:
            return None
        result = self._read_samples(list(samples))
        if result is None or result[1] is not None:
            return None
        targets = batch[1]
        if isinstance(targets, list | tuple) and len(targets) == len(samples):
            with suppress(ValueError, RuntimeError, TypeError):
                targets = collated(targets)
        return result[0], targets

    def _warn_of_labels(self, batch: Any, inputs: Any, targets: Any) -> None:
        """Say once that whole numbers behind the targets, one or more for each sample, are dropped."""
        behind = [] if targets is None or not isinstance(batch, list | tuple) else list(batch)
        index = next((i for i, item in enumerate(behind) if item is targets), len(behind))
        rest = [t for t in behind[index + 1 :] if isinstance(t, Tensor) and t.ndim and not t.is_floating_point()]
        if not rest or BEHIND in self.doubts or len(rest[-1]) != self.samples.size(inputs):
            return
        self.doubts.add(BEHIND)
        warnings.warn(
            f"Entry {index} of each batch is taken as its targets ({describe(targets)}), and what follows is dropped "
            f"({', '.join(map(describe, rest))}). If those are the labels, give (inputs, targets), or a dict with "
            "'labels'.",
            stacklevel=2,
        )

    def _read_samples(self, batch: list[Any]) -> tuple[Any, Any] | None:
        """A list of single samples, as loaders give that do not collate."""
        try:
            joined = self.batched(batch)
        except (ValueError, RuntimeError, TypeError):
            return None
        return None if isinstance(joined, list) else self._read(joined)

    def _read_inputs(self, batch: Any) -> Any:
        """What of a batch goes into the model; None where that cannot be told."""
        if self._fits(batch):
            return self._as_example(batch)
        named = by_name(batch)
        if named is None:
            return None
        return self._chosen(named) if isinstance(self.value, Mapping) else self._by_position(named)

    def _chosen(self, named: Mapping[str, Any]) -> Any:
        """The entries that the example has, and others that `forward` names; optional ones may lack."""
        mine = {key: named[key] for key in self.value if key in named}
        lacking = set(self.value) - set(mine)
        if not tensors(mine) or (self.keywords and lacking & self.signature.required):
            return None  # a model of one dict says itself what it cannot do without
        if structure_of(mine) != structure_of({key: self.value[key] for key in mine}):
            return None
        return mine | {key: value for key, value in named.items() if key not in mine and self._takes(key, value)}

    def _takes(self, key: str, value: Any) -> bool:
        """Whether an entry that the example has not goes into the model."""
        if key in TARGETS or value is None:
            return False
        return key in self.signature.named if self.keywords else bool(tensors(value))

    def _by_position(self, named: Mapping[str, Any]) -> Any:
        """The entries that the parameters of `forward` are called by; of one argument, the only entry that fits."""
        wanted = self.value if isinstance(self.value, tuple) else (self.value,)
        names = self.signature.positional[: len(wanted)]
        if len(names) == len(wanted) and all(name in named for name in names):
            inputs: Any = tuple(named[name] for name in names)
            inputs = inputs if isinstance(self.value, tuple) else inputs[0]
            further = [name for name in named if self._takes_further(name, names)]
            return self._as_example(inputs) if not further and self._fits(inputs) else None
        fitting = [value for key, value in named.items() if key not in TARGETS and self._fits(value)]
        return self._as_example(fitting[0]) if len(fitting) == 1 and not isinstance(self.value, tuple) else None

    def _takes_further(self, name: str, names: Sequence[str]) -> bool:
        """Whether `forward` takes an entry that an example without names cannot hold."""
        return name in self.signature.named and name not in names and name not in TARGETS

    def _targets(self, batch: Any) -> Any:
        named = by_name(batch)
        if named is None:
            return None
        known = self.value if isinstance(self.value, Mapping) else ()
        return targets_in(named, [key for key in known if key not in self.answers])

    def _fits(self, inputs: Any) -> bool:
        """Whether inputs have the structure of the example; lists of samples may be of any length."""
        if not self.samples.listed:
            return bool(structure_of(inputs) == structure_of(self.value))
        inputs = self._as_example(inputs)
        lengths = set(map(len, lists_of(inputs)))
        if lengths == {0}:
            empty = [map_lists(lambda _: [], value) for value in (inputs, self.value)]
            return bool(structure_of(empty[0]) == structure_of(empty[1]))
        return bool(_item_structure(inputs) == _item_structure(self.value)) and len(lengths) == 1

    def _as_example(self, inputs: Any) -> Any:
        """A tuple of samples as the list that the example is; entries by name in the order of the example's."""
        if isinstance(self.value, Mapping):
            return {key: inputs[key] for key in self.value}
        as_list = self.samples.listed and isinstance(self.value, list) and isinstance(inputs, tuple)
        return list(inputs) if as_list else inputs

    def _unfit(self, batch: Any) -> str:
        """Why a batch is none, and what to do."""
        first = batch[0] if isinstance(batch, list | tuple) and batch and by_name(batch) is None else batch
        named = by_name(first)
        mapped = isinstance(self.value, Mapping)
        words = differences(self.value, first)
        if isinstance(first, list | Mapping) and not tensors(first) and pytree.tree_leaves(first):
            words = ["it holds no tensor: give tensors or numpy arrays, such as torch.tensor(rows)"]
        elif mapped and named is None:
            words = [f"give dicts with the entries {', '.join(map(repr, self.value))}"]
        elif named is not None and not mapped:
            words = ["give the example as a dict, too: with the entries that go into the model"]
        reason = f" ({'; '.join(words)})" if words else ""
        return f"{FORMS.format(example=describe(self.value))} Got {describe(batch)} instead{reason}."


def _first(entries: Sequence[Any]) -> Any:
    """The first that is not None."""
    return next((entry for entry in entries if entry is not None), None)


def _container(value: Any, entries: Any) -> Callable[[Any], Any] | None:
    """What makes the one argument of a model from its entries, where that is no dict; None where it is, or may be."""
    kind = type(value)
    try:
        return None if kind is dict or set(kind(entries)) != set(entries) else kind
    except Exception:  # a Mapping of the user's that is made in another way
        return None


def _dtypes_of(model: nn.Module) -> list[torch.dtype]:
    """The types of weights in floating point, that of the first one first."""
    held = dict.fromkeys(p.dtype for p in model.parameters() if p.is_floating_point())
    return list(held) or [torch.get_default_dtype()]


def _item_structure(value: Any) -> Any:
    """The structure of inputs of which the lists may be of any length."""
    return structure_of(map_lists(lambda items: (structure_of(items[0]) if items else None,), value))


def _alike(example: Tensor, sample: Tensor) -> bool:
    """Whether a batch of one sample is one for a model that takes the example: channels, or features, are as many."""
    mine, other = example.shape[1:], sample.shape[1:]
    return len(mine) < 2 or mine == other or mine[0] == other[0] or (len(mine) == 2 and mine[1] == other[1])


class TautControl(BaseException):
    """Raised by our own hooks to leave a forward pass early; no `except Exception` of a user's model holds it up."""

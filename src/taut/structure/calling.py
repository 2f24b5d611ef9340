"""Where the samples of an example are, and whether a model takes them apart: found by running it, not by its code."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from difflib import get_close_matches
from numbers import Number
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from taut.core.example import Example, Mask
from taut.core.formats import TARGETS, by_name, collated
from taut.core.modes import evaluating, quietly
from taut.core.nested import fresh, lists_of, map_lists, rows_of
from taut.core.samples import Samples
from taut.core.tensors import all_tensors, describe, map_tensors, opened, placed, tensors
from taut.errors import CallError, DataError, ModelError
from taut.structure.admission import admit
from taut.structure.answers import Output, Wish, answers_of
from taut.structure.coverage import noise_like, seeded
from taut.structure.masks import settle
from taut.structure.sameness import IN_OTHER_BATCHES, IN_OTHER_LAYERS, outputs_match
from taut.structure.surgery import shallow
from taut.structure.wrappers import unwrapped


@quietly
def read_example(model: nn.Module, value: Any, output: Output = "auto", mask: Mask = None) -> Example:
    """How `model` is called with `value`, and where its samples are.

    Lists of tensors hold one sample each, if twice the lists give twice the outputs (detection networks); a model with
    layers that take time first has its samples on axis 1, if the steps on axis 0 depend on each other and the rows on
    axis 1 do not. Whether a part of a batch gives a part of the outputs is noted as `Example.divisible`. All this is
    tried on noise like the example, where the model takes it: zeros and equal samples tell nothing.

    Args:
        model: is run a few times on a copy, in eval mode.
        value: an input, or an Example, which is returned as it is.
        output: what of an output counts, and how it is read (`taut.observe`).
        mask: what says which positions are real (`taut.observe`).

    Raises:
        CallError: there is no such part of the output, or the mask names no input.
        DataError: the input holds no tensor, or an empty one.
        ModelError: the model cannot be run on it.
    """
    wish = Wish.of(output)
    if mask is not None and not isinstance(mask, str) and not callable(mask):
        raise CallError(
            "The 'mask' must be the name of an input, or a function of the inputs that gives a tensor (samples, "
            f"positions). Got {describe(mask)} instead."
        )
    if isinstance(value, Example):
        if wish == Wish() and mask is None:
            return value
        example = _reading(value, wish, mask)
        settle(unwrapped(model), example, example.value)
        return example
    model = unwrapped(model)
    admit(model)
    copied = shallow(model)
    with evaluating(copied):
        example, plain = _call_of(copied, value)
        _name_left_out(value, example)
        inputs = noise_like(example)
        outputs = _ran(copied, example, inputs)
        if outputs is None or not outputs_match(outputs, outputs, IN_OTHER_BATCHES):
            inputs, outputs = example.value, plain
        trial = _Trial(copied, example, inputs, outputs)
        example.samples = trial.samples()
        example.batch = example.samples.size(example.value)
        example.divisible = trial.divisible()
        if wish != Wish() or mask is not None:
            example = _reading(example, wish, mask)
            answers_of(example, example.run(copied), example.value)
        settle(copied, example, example.value)
    return example


def _reading(example: Example, wish: Wish, mask: Mask) -> Example:
    """The same, with another way of reading outputs or masks, where one is given."""
    copied = copy.copy(example)
    copied.output = example.output if wish == Wish() else wish
    if mask is not None and mask != example.mask:
        copied.mask, copied.marking, copied.doubts = mask, {}, set()
    return copied


def _call_of(model: nn.Module, value: Any) -> tuple[Example, Any]:
    """The way in which `value` is handed to the model, found by running it, and what the model then gives.

    First as it is. Entries called like targets stay where the outputs depend on them, or there are none without. Where
    the model does not run, entries that `forward` does not name are left out, and what may be targets.

    Raises:
        ModelError: no way works; the error is that of the first.
    """
    entries = None if isinstance(value, tuple) else by_name(value)
    example = Example(model, value if entries is None or isinstance(value, Mapping) else entries)
    failed: ModelError | None = None
    for other in (example, *_other_calls(model, example)):
        answers = _answers(other)
        try:
            outputs = _ran(model, other, other.value, strict=not answers)
        except ModelError as error:
            failed = failed or error
            continue
        for key in answers:
            other, outputs = _without(model, other, outputs, key)  # noqa: PLW2901 - one entry less
        if outputs is not None:
            return other, outputs
        failed = failed or _failure(model, other)
    raise failed or ModelError("The model cannot be run on the example.")


def _name_left_out(value: Any, example: Example) -> None:
    """Warn of entries of an example that are no parameters of forward, and so do not go into the model."""
    entries = None if isinstance(value, tuple) or not isinstance(example.value, dict) else by_name(value)
    gone = [key for key in entries or () if key not in example.value and key not in TARGETS]
    gone = [str(key) for key in gone if entries is not None and entries[key] is not None]
    if not gone:
        return
    free = sorted(example.signature.named - set(example.value))
    meant = {key: close[0] for key in gone if (close := get_close_matches(key, free, 1))}
    advice = "".join(f" For '{key}', did you mean '{word}'?" for key, word in meant.items())
    warnings.warn(
        f"Entries of the example that are no parameters of the model's forward are left out: {', '.join(gone)}.{advice}"
        f" It takes {', '.join(sorted(example.signature.named))}.",
        stacklevel=2,
    )


def _answers(example: Example) -> list[str]:
    """The entries of an example that are called like targets."""
    return [key for key in example.value if key in TARGETS] if isinstance(example.value, dict) else []


def _failure(model: nn.Module, example: Example) -> ModelError:
    try:
        _ran(model, example, example.value, strict=True)
    except ModelError as error:
        return error
    return ModelError("The model cannot be run on the example.")


def _without(model: nn.Module, example: Example, outputs: Any, key: str) -> tuple[Example, Any]:
    """The example without an entry, where all that the model then gives is among what it gave; else as it is.

    `outputs` are None where the model does not run with it.
    """
    value = {name: item for name, item in example.value.items() if name != key}
    if tensors(value):
        less = Example(model, value, keywords=example.keywords, answers=example.answers)
        fewer = _ran(model, less, less.value)
        if fewer is not None and (outputs is None or _says_no_more(all_tensors(fewer), all_tensors(outputs))):
            return less, fewer
    return Example(model, example.value, keywords=example.keywords, answers={*example.answers, key}), outputs


def _says_no_more(fewer: Sequence[Tensor], more: Sequence[Tensor]) -> bool:
    """Whether all tensors of an output are among those of another, or the other holds nothing but losses."""
    among = all(any(outputs_match([a], [b], IN_OTHER_LAYERS) for b in more) for a in fewer)
    return bool(fewer) and (among or all(t.ndim == 0 for t in more))


def _other_calls(model: nn.Module, example: Example) -> Iterator[Example]:
    """Other ways in which an example may be meant, for a model that does not run on it as it is."""
    value, signature = example.value, example.signature
    calls: list[tuple[Any, bool]] = []
    stacked = _stacked(value)
    if stacked is not None and _holds_samples(model, value, stacked):
        calls.append((stacked, False))
    if isinstance(value, dict):
        named = {key: item for key, item in value.items() if key in signature.named}
        if signature.open and not example.keywords and signature.required <= set(value):
            calls.append((value, True))
        if named and not example.keywords and signature.required <= set(named):
            calls.append((named, True))
        inputs = [item for key, item in value.items() if key not in TARGETS and isinstance(item, Tensor)]
        calls += [(inputs[0], False)] if len(inputs) == 1 and not example.keywords else []
    elif isinstance(value, list | tuple) and value:
        count = sum(name in signature.required for name in signature.positional) or 1
        alone = len(value) == 2 or len(signature.positional) == 1 or not tensors(list(value[2:]))
        if count == 1 and alone:
            calls.append((value[0], False))
        if 1 < count <= len(value):
            calls.append((tuple(value[:count]), False))
        calls += [(tuple(value[: len(value) - rest]), False) for rest in (0, 1) if len(value) - rest > count]
    for inputs, keywords in calls:
        with suppress(DataError):
            yield Example(model, inputs, keywords=keywords or None)
    for inner in _nested(value, stacked):
        with suppress(DataError):
            other = Example(model, inner)
            yield other
            yield from _other_calls(model, other)


def _nested(value: Any, stacked: Any) -> Iterator[Any]:
    """What of a batch in lists and tuples may be the inputs in a form of their own, such as ((a, b), targets)."""
    if not isinstance(value, list | tuple) or not value:
        return
    entries = None if type(value[0]) is tuple else by_name(value[0])
    inner = (
        [value[0] if entries is None else entries] if entries is not None or isinstance(value[0], list | tuple) else []
    )
    batches = [] if stacked is None else [stacked]
    yield from batches + inner if len(value) > 2 or _is_single(value[0]) else inner + batches


def _is_single(item: Any) -> bool:
    """Whether an item of a list is one sample, since a number of it has no batch dimension."""
    leaves = pytree.tree_leaves(item)
    return any(isinstance(leaf, Number) or (isinstance(leaf, Tensor) and not leaf.ndim) for leaf in leaves)


def _stacked(value: Any) -> Any:
    """A list of single samples as one batch, as loaders give that do not collate; None where it is none."""
    if type(value) not in {list, tuple} or len(value) < 2 or not tensors(value[0]):
        return None
    try:
        batch = collated(value)
    except (ValueError, RuntimeError, TypeError):
        return None
    return None if isinstance(batch, list) else batch


def _holds_samples(model: nn.Module, value: Any, stacked: Any) -> bool:
    """Whether a list is meant as a batch though the model may run on its first: a row for each only all together.

    Two in a list are rather inputs and targets where the model gives a row for each of the first's.
    """
    if not isinstance(stacked, Tensor) or type(value) is not list:
        return False
    rows = []
    for inputs in (value[0], stacked):
        try:
            example = Example(model, inputs)
        except DataError:
            return False
        held = {t.shape[0] for t in all_tensors(_ran(model, example, example.value)) if t.ndim}
        rows.append(held == {example.batch})
    return rows[1] and (not rows[0] or (value[0].ndim == 1 and len(value) > 2))


def _may_take_time_first(model: nn.Module) -> bool:
    """Whether the model has layers that read (time, sample, features), or cells for one step."""
    kinds = ((module, getattr(module, "batch_first", None)) for module in model.modules())
    return any(first is False or isinstance(module, nn.RNNCellBase) for module, first in kinds)


def _ran(model: nn.Module, example: Example, inputs: Any, *, strict: bool = False) -> Any:
    """The outputs, with the same random draws each time; None, or an error, where the model does not run on these."""
    try:
        with seeded():
            return opened(example.run(model, inputs))
    except ModelError:
        if strict:
            raise
        return None


class _Trial:
    """One input with its outputs, from which others are made."""

    def __init__(self, model: nn.Module, example: Example, inputs: Any, outputs: Any) -> None:
        self.model, self.example, self.inputs, self.outputs = model, example, inputs, outputs

    def run(self, inputs: Any) -> Any:
        """The outputs, or None where the model does not run on these inputs."""
        return _ran(self.model, self.example, inputs)

    def samples(self) -> Samples:
        """Where the samples are."""
        lists = [items for items in lists_of(self.inputs) if tensors(items)]
        outside = len(tensors(self.inputs)) - sum(len(tensors(items)) for items in lists)
        if lists and not outside and len({len(items) for items in lists}) == 1:
            doubled = self.run(map_lists(lambda items: items + items, self.inputs))
            if doubled is not None and _repeats(self.outputs, doubled, len(lists[0])):
                return Samples(listed=True)
        held = tensors(self.inputs)
        wide = [t for t in held if t.ndim > 1]
        if wide and held[0].ndim > 1 and _may_take_time_first(self.model):
            apart = len({t.shape[0] for t in wide}) > 1 and len({t.shape[1] for t in wide}) == 1
            if (apart or self.independent(0) is False) and self.independent(1) is not False:
                return self._placed(Samples(axis=1))
        return self._placed(Samples(lead=self._lead()))

    def _lead(self) -> str:
        """The place of the tensor that is as long as all outputs; "" where none or the first one is."""
        sizes = {t.shape[0] for t in all_tensors(self.outputs) if t.ndim}
        first = tensors(self.inputs)[0]
        if len(sizes) != 1 or not first.ndim or first.shape[0] in sizes:
            return ""
        return next((place for place, t in placed(self.inputs) if t.ndim and t.shape[0] in sizes), "")

    def _placed(self, samples: Samples) -> Samples:
        """With the tensors that hold no samples, and the lists of numbers that do."""
        size = samples.size(self.inputs)
        whole = (place for place, t in placed(self.inputs) if samples.axis_of(t, size) is None)
        rows = (place for place, row in enumerate(rows_of(self.inputs)) if len(row) == size)
        return replace(samples, whole=frozenset(whole), rows=frozenset(rows))

    def independent(self, axis: int) -> bool | None:
        """Whether neither end of an axis has a say in the outputs elsewhere on it; None where it has one index alone.

        One end takes the values of the other: every output must stay the same but there, on some axis as long.
        """
        size = tensors(self.inputs)[0].shape[axis]
        if size < 2:
            return None
        return all(self._unmoved(axis, ends) for ends in ((0, size - 1), (size - 1, 0)))

    def _unmoved(self, axis: int, ends: tuple[int, int]) -> bool:
        changed, size = fresh(self.inputs), max(ends) + 1
        for t in tensors(changed):
            if t.ndim > axis and t.shape[axis] == size:
                t.select(axis, ends[0]).copy_(t.select(axis, ends[1]).clone())
        moved = self.run(changed)
        pairs = all_tensors(self.outputs), all_tensors(moved)
        if moved is None or len(pairs[0]) != len(pairs[1]):
            return False
        start = int(ends[0] == 0)
        return all(_same_but(a, b, start, size) for a, b in zip(*pairs, strict=True))

    def divisible(self) -> bool:
        """Whether either half of the samples, and the first alone, give their outputs; one alone, beside a second."""
        samples, size = self.example.samples, self.example.batch
        try:
            if size > 1:
                half = size // 2
                parts = dict.fromkeys([(0, half), (half, size), (0, 1)])
                return all(self._gives_its_own(slice(*part), size) for part in parts)
            second = map_tensors(lambda t: t.flip(-1) * 2 if t.is_floating_point() else t, self.inputs)
            apart, both = self.run(second), self.run(samples.joined([self.inputs, second]))
        except (RuntimeError, NotImplementedError):  # sparse tensors and the like, which cannot be cut
            return False
        if apart is None or both is None:
            return False
        halves = (samples.part(both, slice(1), 2), samples.part(both, slice(1, 2), 2))
        return all(
            outputs_match(one, half, IN_OTHER_BATCHES) for one, half in zip((self.outputs, apart), halves, strict=True)
        )

    def _gives_its_own(self, part: slice, size: int) -> bool:
        mine = self.run(self.example.samples.cut(self.inputs, part, size))
        return mine is not None and outputs_match(
            self.example.samples.part(self.outputs, part, size), mine, IN_OTHER_BATCHES
        )


def _repeats(once: Any, twice: Any, count: int) -> bool:
    """Whether outputs of doubled lists are those of the lists, twice, in all that has as many items or rows."""
    items = lists_of(_as_lists(once)), lists_of(_as_lists(twice))
    if len(items[0]) == len(items[1]):
        pairs = [(a, b) for a, b in zip(*items, strict=True) if tensors(a) and len(a) == count and len(b) == 2 * count]
        if pairs:
            return all(
                outputs_match(a, b[:count], IN_OTHER_BATCHES) and outputs_match(a, b[count:], IN_OTHER_BATCHES)
                for a, b in pairs
            )
    parts = all_tensors(once), all_tensors(twice)
    if len(parts[0]) != len(parts[1]):
        return False
    rows = [(a, b) for a, b in zip(*parts, strict=True) if a.ndim and (len(a), len(b)) == (count, 2 * count)]
    return bool(rows) and all(outputs_match([a, a], [b[:count], b[count:]], IN_OTHER_BATCHES) for a, b in rows)


def _as_lists(output: Any) -> Any:
    """Outputs that are a tuple with an item per sample as a list."""
    alike = type(output) is tuple and len({type(item) for item in output}) == 1
    return list(output) if alike and not isinstance(output[0], list) else output


def _same_but(a: Tensor, b: Tensor, start: int, size: int) -> bool:
    """Whether two outputs agree on all but one end of an axis of this size."""
    if a.shape != b.shape:
        return False
    axes = [axis for axis, length in enumerate(a.shape) if length == size]
    kept = [tuple(t.narrow(axis, start, size - 1) for t in (a, b)) for axis in axes] or [(a, b)]
    return any(outputs_match([one], [two], IN_OTHER_BATCHES) for one, two in kept)

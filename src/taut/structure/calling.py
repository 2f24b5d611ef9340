"""Where the samples of an example are, and whether a model takes them apart: found by running it, not by its code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from taut.core.example import Example, Samples
from taut.core.modes import evaluating, quietly
from taut.core.nested import fresh, lists_of, map_lists, rows_of
from taut.core.tensors import all_tensors, map_tensors, tensors
from taut.errors import ModelError
from taut.structure.coverage import noise_like, seeded
from taut.structure.sameness import IN_OTHER_BATCHES, outputs_match
from taut.structure.surgery import shallow, unwrapped


@quietly
def read_example(model: nn.Module, value: Any) -> Example:
    """How `model` is called with `value`, and where its samples are.

    Lists of tensors hold one sample each, if twice the lists give twice the outputs (detection networks); a model with
    layers that take time first has its samples on axis 1, if the steps on axis 0 depend on each other and the rows on
    axis 1 do not. Whether a part of a batch gives a part of the outputs is noted as `Example.divisible`. All this is
    tried on noise like the example, where the model takes it: zeros and equal samples tell nothing.

    Args:
        model: is run a few times on a copy, in eval mode.
        value: an input, or an Example, which is returned as it is.

    Raises:
        DataError: the input holds no tensor, or an empty one.
        ModelError: the model cannot be run on it.
    """
    if isinstance(value, Example):
        return value
    model = unwrapped(model)
    example = Example(model, value)
    copied = shallow(model)
    with evaluating(copied):
        plain = _ran(copied, example, example.value, strict=True)
        inputs = noise_like(example)
        outputs = _ran(copied, example, inputs)
        if outputs is None or not outputs_match(outputs, outputs, IN_OTHER_BATCHES):
            inputs, outputs = example.value, plain
        trial = _Trial(copied, example, inputs, outputs)
        example.samples = trial.samples()
        example.batch = example.samples.size(example.value)
        example.divisible = trial.divisible()
    return example


def _may_take_time_first(model: nn.Module) -> bool:
    """Whether the model has layers that read (time, sample, features), or cells for one step."""
    kinds = ((module, getattr(module, "batch_first", None)) for module in model.modules())
    return any(first is False or isinstance(module, nn.RNNCellBase) for module, first in kinds)


def _ran(model: nn.Module, example: Example, inputs: Any, *, strict: bool = False) -> Any:
    """The outputs, with the same random draws each time; None, or an error, where the model does not run on these."""
    try:
        with seeded():
            return example.run(model, inputs)
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

    def _lead(self) -> int:
        """The place of the tensor that is as long as all outputs; the first one's where none or that one is."""
        sizes = {t.shape[0] for t in all_tensors(self.outputs) if t.ndim}
        held = tensors(self.inputs)
        if len(sizes) != 1 or not held[0].ndim or held[0].shape[0] in sizes:
            return 0
        return next((place for place, t in enumerate(held) if t.ndim and t.shape[0] in sizes), 0)

    def _placed(self, samples: Samples) -> Samples:
        """With the tensors that hold no samples, and the lists of numbers that do."""
        size = samples.size(self.inputs)
        whole = (place for place, t in enumerate(tensors(self.inputs)) if samples.axis_of(t, size) is None)
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

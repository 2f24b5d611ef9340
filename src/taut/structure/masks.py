"""How inputs called like masks mark positions: shown by running the model, not by their names and shapes alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from taut.core.example import Example
from taut.core.modes import evaluating
from taut.core.padding import (
    ADDED,
    FEWEST_AXES,
    ONES,
    OWN,
    PADDED,
    ZEROS,
    Marking,
    called_mask,
    given_mask,
    named_inputs,
    output_name,
    read_mask,
    ways_of,
)
from taut.core.tensors import map_tensors, tensors
from taut.errors import CallError, DataError, ModelError
from taut.structure.answers import answers_of, without_channels
from taut.structure.coverage import seeded
from taut.structure.padding import sizes_of
from taut.structure.sameness import IN_OTHER_BATCHES, outputs_match
from taut.structure.surgery import shallow

FEW = 2
"""Samples of a batch that are enough to tell."""

FORBIDDEN = -1e4
"""What is added to the scores of padding; as far as half precision reaches."""

SUFFIX = re.compile(r"_?(key_)?(padding|attention)?_?mask$")
"""What the name of a mask holds besides that of the inputs it speaks of."""


def settle(model: nn.Module, example: Example, inputs: Any) -> None:
    """Note in `Example.marking` how the masks among inputs mark positions; nothing is run where there are none.

    A reading holds where inputs at the positions that it takes for padding have no say in the outputs at the others,
    wherever in the sequences they are. Where a mask's positions lie in the layers is seen from shorter sequences: the
    axes that are shorter by as much. A model that takes no others is read by sizes, unless a layer is as wide as the
    sequences are long.

    Args:
        model: is run a few times on a copy.
        example: how it is called.
        inputs: of one batch, like the example.
    """
    if example.mask is not None:
        given_mask(example, inputs, whole=True)
    named = {} if example.mask is not None else named_inputs(example, inputs)
    keys = [key for key, value in named.items() if called_mask(example, key, value)]
    keys = [key for key in ([OWN] if example.mask is not None else keys) if key not in example.marking]
    if not keys:
        return
    size, whole = example.samples.size(inputs), inputs
    if size > FEW and example.divisible:
        inputs = example.samples.cut(inputs, slice(FEW), size)
    copied = shallow(model)
    with evaluating(copied), torch.no_grad():
        for key in keys:
            trial = _Trial(copied, example, inputs, key, whole)
            example.marking[key] = trial.marking()


class _Trial:
    """One mask of one batch of inputs, and the inputs whose positions it may mark.

    Attributes:
        fits: whether it is as long as they are.
    """

    def __init__(self, model: nn.Module, example: Example, inputs: Any, key: str, whole: Any) -> None:
        """`inputs` are the first samples of `whole`."""
        self.model, self.example, self.inputs, self.key = model, example, inputs, key
        self.size = example.samples.size(inputs)
        named = named_inputs(example, inputs)
        self.mask = given_mask(example, inputs) if key == OWN else named[key]
        self.whole: Tensor = self.mask if key == OWN else named_inputs(example, whole)[key]
        self.others = [t for t in tensors(inputs) if t is not self.mask]
        self.labels = key in example.answers
        axis = self._samples_axis(self.mask)
        last = self.mask.ndim - 1
        self.axis = last if axis != last else 0
        self.length = self.mask.shape[self.axis]
        claimed = list(_claimed(example, named, key)) if named and key != OWN else self.others
        self.claimed = [t for t in claimed if self._axes(t) and t is not self.mask]
        self.fits = axis is not None and self.length > 1 and (self.labels or bool(self.claimed))

    def _samples_axis(self, t: Tensor) -> int | None:
        return self.example.samples.axis_of(t, self.size)

    def _axes(self, t: Tensor) -> list[int]:
        """The axes of an input that are as long as the mask, and not that of the samples."""
        samples = self._samples_axis(t)
        return [] if samples is None else [a for a in range(t.ndim) if a != samples and t.shape[a] == self.length]

    def _of_pairs(self) -> bool:
        """Whether it may as well be one of pairs of positions, for all samples: square, as a causal one."""
        if self.whole.ndim != FEWEST_AXES or self.whole.shape[0] != self.whole.shape[1]:
            return False
        marks = self.whole != self.whole.flatten()[0]
        return bool(marks.any()) and (torch.equal(marks, marks.triu(1)) or torch.equal(marks, marks.tril(-1)))

    def marking(self) -> Marking | None:
        """How the mask marks positions; None where that cannot be told.

        Raises:
            DataError: the user's has another number of positions than all that the model computes.
        """
        if self.key == OWN:
            self._check_length()
        if not self.fits:  # the user's may be of what a layer makes of the inputs
            return None if self.key != OWN or self._as_wide() else Marking(ONES, {})
        if self.key == OWN:
            reading: str | None = ONES
        elif self.labels:
            reading = ONES if self._is_read() else None
        else:
            reading = self._reading()
        if reading is None or not (self.labels or self.key == OWN or self._says_something(reading)):
            return None
        ways = self._ways()
        if ways is None and self._as_wide():
            return None
        return Marking(reading, ways or {})

    def _check_length(self) -> None:
        sizes = self._sizes(self.inputs)
        ways = self._matched(self.mask)
        if sizes is not None and not any(ways(size) for calls in sizes.values() for size in calls):
            raise DataError(
                f"The mask marks {self.length} positions of each sample, and nothing in the model has as many: give "
                "`mask=` a value for each position of the sequences."
            )

    def _says_something(self, reading: str) -> bool:
        real = read_mask(self.whole, reading)
        return real is not None and bool(real.any())

    # What the values say.

    def _is_read(self) -> bool:
        """Whether labels become an input of the model, as a decoder's: then what it answers depends on them."""
        before, after = self._run(self.inputs), self._run(self._with({id(self.mask): _others(self.mask)}))
        return before is not None and after is not None and not all(map(_alike, before, after))

    def _reading(self) -> str | None:
        """The reading that the model shows; the one that the name suggests where both do."""
        forms = self._forms()
        scores = [int(self._holds(*form, end=True)) for form in forms]
        if scores[0] and not any(scores[1:]):
            return forms[0][0]
        if self._of_pairs():
            return None
        scores = [score + int(self._holds(*form, end=False)) for score, form in zip(scores, forms, strict=True)]
        best = max(scores)
        return forms[scores.index(best)][0] if best else None

    def _forms(self) -> list[tuple[str, float, float]]:
        """The readings in question, with what stands at real and at padded positions; the likeliest first."""
        ones, zeros, added = (ONES, 1.0, 0.0), (ZEROS, 0.0, 1.0), (ADDED, 0.0, FORBIDDEN)
        padded = self.key.endswith(PADDED)
        if not self.mask.is_floating_point():
            return [zeros, ones] if padded else [ones, zeros]
        low, high = float(self.mask.min()), float(self.mask.max())
        if low < 0:
            return [(ZEROS if padded else ADDED, 0.0, FORBIDDEN)]
        if padded:
            return [(ZEROS, 0.0, FORBIDDEN), zeros, ones]
        return [ones, zeros] if high > 0 else [added, ones, zeros]

    def _holds(self, _: str, real: float, padded: float, *, end: bool) -> bool:
        """Whether the model leaves padding out at one end of the sequences, where it is marked so."""
        count = max(1, self.length // 3)
        kept = slice(self.length - count) if end else slice(count, self.length)
        gone = slice(self.length - count, self.length) if end else slice(count)
        marked = torch.full_like(self.mask, real)
        marked.movedim(self.axis, 0)[gone] = padded
        alike = [t for t in self.others if t.dtype == self.mask.dtype and torch.equal(t, self.mask)]
        marks = {id(t): marked for t in (self.mask, *alike)}
        changes = {id(t): _others(t, self._axes(t)[0], gone) for t in self.claimed if id(t) not in marks}
        if not changes:
            return False
        before, after = self._run(self._with(marks)), self._run(self._with(marks | changes))
        if before is None or after is None or len(before) != len(after):
            return False
        return all(self._same_at(kept, a, b) for a, b in zip(before, after, strict=True))

    def _same_at(self, kept: slice, a: Tensor, b: Tensor) -> bool:
        """Whether two outputs agree at some positions; as a whole where they have none."""
        if a.shape != b.shape:
            return False
        if a.ndim and len(a) == self.size * self.length and self.length > 1:
            first = (self.length, self.size) if self.example.samples.axis == 1 else (self.size, self.length)
            a, b = (t.reshape(*first, *t.shape[1:]) for t in (a, b))
        pairs = [(a.movedim(axis, 0)[kept], b.movedim(axis, 0)[kept]) for axis in self._axes(a)] or [(a, b)]
        return any(_alike(one, other) for one, other in pairs)

    # Where the positions lie.

    def _ways(self) -> dict[str, str] | None:
        """How the positions lie in all that ran; None where no shorter sequences are taken, or it is not clear."""
        longer = self._sizes(self.inputs)
        for less in dict.fromkeys((1, 2, self.length - self.length // 2)):
            if longer is None or self.length - less < 1:
                return None
            shorter = [s for cut in self._cuts(less) if (s := self._sizes(self._with(cut))) is not None]
            if shorter:
                part = self.mask.narrow(self.axis, 0, self.length - less)
                clear = len(shorter) == 1
                return _followed(longer, shorter[0], self._matched(self.mask), self._matched(part)) if clear else None
        return None

    def _matched(self, mask: Tensor) -> Callable[[tuple[int, ...]], list[str]]:
        first = self.example.samples.axis == 1
        return lambda sizes: ways_of(mask, sizes, time_first=first)

    def _cuts(self, less: int) -> Iterator[dict[int, Tensor]]:
        """Inputs cut by some positions: on the first axis that may be theirs, and on the last where it is another."""
        cut = [*self.claimed, *(t for t in self.others if self._goes_along(t))]
        for end in (0, -1) if any(len(self._axes(t)) > 1 for t in cut) else (0,):
            yield {
                id(self.mask): self.mask.narrow(self.axis, 0, self.length - less),
                **{id(t): t.narrow(self._axes(t)[end], 0, self.length - less) for t in cut if self._axes(t)},
                **{id(t): t[: self.length - less, : self.length - less] for t in cut if not self._axes(t)},
            }

    def _goes_along(self, t: Tensor) -> bool:
        """Whether an input that is no part of the sequences is as long: a mask like this one, or one of pairs."""
        equal = t.shape == self.mask.shape and t.dtype == self.mask.dtype and torch.equal(t, self.mask)
        pairs = t.shape == (self.length, self.length) and self._samples_axis(t) is None
        return bool(equal or pairs) and not any(t is one for one in self.claimed)

    def _sizes(self, inputs: Any) -> dict[str, list[tuple[int, ...]]] | None:
        """The sizes of what all modules and the model give, but for channels, call by call."""
        seen: dict[str, list[tuple[int, ...]]] = {}

        def note(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, _: Any, output: Any) -> None:
                if isinstance(output, Tensor) and output.ndim:
                    norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
                    sizes = (output.shape[0], *output.shape[2:]) if norm else sizes_of(module, output.shape)
                    seen.setdefault(name, []).append(tuple(sizes))

            return hook

        handles = [module.register_forward_hook(note(name)) for name, module in self.model.named_modules() if name]
        try:
            outputs = self._run(inputs)
        finally:
            for handle in handles:
                handle.remove()
        for number, t in enumerate(outputs or ()):
            for middle, sizes in enumerate(without_channels(t)):
                seen[output_name(number, middle)] = [sizes]
        return None if outputs is None else seen

    def _as_wide(self) -> bool:
        """Whether another axis may be taken for that of the positions: as many samples or channels as positions."""
        weights = [p for name, p in self.model.named_parameters() if name.endswith("weight") and p.ndim > 1]
        wide = any(self.length in p.shape[:2] for p in weights)
        return wide or self.size == self.length or any(len(self._axes(t)) > 1 for t in self.claimed)

    def _with(self, changes: Mapping[int, Tensor]) -> Any:
        return map_tensors(lambda t: changes.get(id(t), t), self.inputs)

    def _run(self, inputs: Any) -> list[Tensor] | None:
        """What counts of the output; None where the model does not run."""
        try:
            with seeded():
                return list(answers_of(self.example, self.example.run(self.model, inputs)).tensors)
        except (ModelError, CallError):  # the user's function of the output may want the whole length
            return None


def _claimed(example: Example, named: Mapping[str, Any], key: str) -> Iterator[Tensor]:
    """The inputs of which a mask may speak: those called like it, else those that no other mask is called like."""
    stems = {name: SUFFIX.sub("", name) for name, value in named.items() if called_mask(example, name, value)}
    inputs = {n: v for n, v in named.items() if isinstance(v, Tensor) and n not in stems and not n.endswith("mask")}
    mine = {n: v for n, v in inputs.items() if stems[key] and n.startswith(stems[key])}
    taken = tuple(stem for name, stem in stems.items() if stem and name != key) or ("\0",)
    if key in example.answers:
        mine = {n: v for n, v in inputs.items() if n.startswith("decoder")}
    elif not mine:
        mine = {n: v for n, v in inputs.items() if not n.startswith((*taken, "decoder"))} or inputs
    yield from mine.values()


def _others(t: Tensor, axis: int = 0, places: slice = slice(None)) -> Tensor:
    """A tensor with other values at some places of an axis: of those that it has, where they are whole numbers."""
    changed = t.clone()
    part = changed.movedim(axis, 0)[places]
    if t.is_floating_point():
        spread = float(t.float().std()) if t.numel() > 1 else 1.0
        part += (spread or 1.0) * torch.linspace(1, 3, part.numel()).reshape(part.shape).to(part)
        return changed
    if t.dtype == torch.bool or t.is_complex():
        return changed
    values = torch.unique(t[t >= 0])
    if len(values) > 1:
        number = torch.searchsorted(values, part.clamp_min(0).contiguous())
        part.copy_(torch.where(part < 0, part, values[(number + 1) % len(values)]))
    elif len(values) and int(values[0]):
        part -= (part > 0).to(part)
    return changed


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(outputs_match([a], [b], IN_OTHER_BATCHES))


def _followed(
    longer: Mapping[str, list[tuple[int, ...]]],
    shorter: Mapping[str, list[tuple[int, ...]]],
    before: Callable[[tuple[int, ...]], list[str]],
    after: Callable[[tuple[int, ...]], list[str]],
) -> dict[str, str]:
    """By name how positions lie; "" where sizes do not follow their number, or in more than one way.

    Args:
        longer: sizes, call by call.
        shorter: the same of fewer positions.
        before: how positions may lie in sizes.
        after: the same of fewer positions.
    """
    ways = {}
    for name, calls in longer.items():
        less = shorter.get(name, [])
        pairs = [(before(a), after(b)) for a, b in zip(calls, less, strict=False)]
        meant = [[way for way in a if way in b] for a, b in pairs if a]
        clear = len(calls) == len(less) and meant and all(len(one) == 1 for one in meant)
        ways[name] = meant[0][0] if clear and len({one[0] for one in meant}) == 1 else ""
    return ways

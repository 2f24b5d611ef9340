"""Whole heads of attention whose number the code takes from attributes: found by trying which of these must change."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from taut.core.example import Example
from taut.methods.channels.verification import Trial
from taut.structure.channels.groups import ChannelGroup, Coupling, Orders, coupled
from taut.structure.channels.heads import Number, Split, Splits, attempts, candidates, whole_numbers

ATTEMPTS = 16
"""Choices of attributes that are tried at most, of modules of one kind."""


def with_heads(
    model: nn.Module, example: Example, orders: Orders | None = None, only: Collection[str] | None = None
) -> Coupling:
    """What `coupled` finds, and whole heads where it finds nothing that the network does without.

    Where the code of a module splits channels by a number that this holds as an attribute (`self.num_heads`), heads go
    with other values of such attributes: which ones is found by trying, on a copy, against the network in which the
    head is silenced. Heads for which nothing passes stay as they were found.

    Args:
        model: is not changed.
        example: how it is called.
        orders: see `coupled`.
        only: attributes that may change, as plans name them; None: any.

    Raises:
        ModelError: the model cannot be run.
    """
    splits = Splits(whole_numbers(model, only))
    if not splits.held:
        return coupled(model, example, orders)
    plain = coupled(model, example, orders, splits)
    search = _Search(model, example, splits)
    ways = dict.fromkeys(search.asked(plain), 0)
    while ways and not search.trial.random:
        splits = Splits(splits.held, ways)
        found = coupled(model, example, orders, splits)
        groups, failed = search.settled(found, splits)
        failed = failed or search.elsewhere(groups)
        if not failed:
            return replace(found, groups=groups)
        ways = {
            name: way + (name in failed)
            for name, way in ways.items()
            if name not in failed or (way == 0 and name in splits.several)
        }
    return plain


class _Search:
    """Which modules may have fewer heads, and which of their attributes say so."""

    def __init__(self, model: nn.Module, example: Example, splits: Splits) -> None:
        self.model, self.example, self.held = model, example, splits.held
        self.passed: dict[Any, tuple[Number, ...] | bool | None] = {}
        self._trial: Trial | None = None

    @property
    def trial(self) -> Trial:
        """Copies of the model, made when they are first needed."""
        if self._trial is None:
            self._trial = Trial(self.model, self.example)
        return self._trial

    def asked(self, plain: Coupling) -> list[str]:
        """The modules that hold numbers of heads, and in which no channels can go as they are coupled."""
        found: dict[str, bool] = {}
        for split, places, _ in plain.splits:
            numbers = set(self.held[split.module].values())
            if not any(numbers & _sizes(replace(split, free=place)) for place in range(len(split.lengths))):
                continue
            key = (self._kind(split), *sorted(len(plain.groups[place].members) for place in places))
            if key not in self.passed:
                chosen = {place: torch.zeros(1, dtype=torch.int64) for place in places}
                self.passed[key] = bool(places) and self.trial.departs(plain.groups, chosen) is None
            found[split.module] = bool(self.passed[key]) or found.get(split.module, False)
        return [module for module, passed in found.items() if not passed]

    def settled(self, found: Coupling, splits: Splits) -> tuple[tuple[ChannelGroup, ...], set[str]]:
        """The groups with what becomes smaller with them, and the modules of which no heads can go.

        Args:
            found: with whole heads.
            splits: of which modules.
        """
        groups, passed, failed = list(found.groups), set[str](), set[str]()
        parts: dict[int, list[Split]] = {}
        for split, places, whole in found.splits:
            if split.module in splits.ways and whole:
                parts.setdefault(min(places), []).append(split)
        for place, views in parts.items():
            numbers = self._numbers(groups[place], views, splits)
            (failed if numbers is None else passed).update(split.module for split in views)
            groups[place] = replace(groups[place], numbers=numbers or ())
        return tuple(groups), failed | (set(splits.ways) - passed)

    def elsewhere(self, groups: Sequence[ChannelGroup]) -> set[str]:
        """The modules of which no heads can go on other paths through the code than the example's."""
        places = [place for place, group in enumerate(groups) if group.numbers]
        one = dict.fromkeys(places, torch.zeros(1, dtype=torch.int64))
        failed: set[str] = set()
        for witness in self.example.paths[1:]:  # the first is the example's
            trial = Trial(self.model, self.example, witness)
            if trial.runs and trial.departs(groups, one) is not None:
                alone = [place for place in places if trial.departs(groups, {place: one[place]}) is not None]
                failed |= {number.module for place in alone or places for number in groups[place].numbers}
        return failed

    def _numbers(self, group: ChannelGroup, views: list[Split], splits: Splits) -> tuple[Number, ...] | None:
        """What becomes smaller with every head of a group; None where nothing passes."""
        modules = list(dict.fromkeys(split.module for split in views))
        options = [n for split in views for n in candidates(split, self.held[split.module], group.size)]
        known = list({number.key: number for number in reversed(options)}.values())[::-1]
        kinds = tuple((self._kind(s), splits.ways[s.module], modules.index(s.module)) for s in views)
        if kinds not in self.passed:
            self.passed[kinds] = None
            for numbers in attempts(known, ATTEMPTS):
                chosen = {0: torch.zeros(1, dtype=torch.int64)}
                if self.trial.departs([replace(group, numbers=numbers)], chosen) is None:
                    self.passed[kinds] = tuple(n._replace(module=str(modules.index(n.module))) for n in numbers)
                    break
        passed = self.passed[kinds]
        if not isinstance(passed, tuple) or not passed:  # where no number has to change a plan could not say it
            return None
        return tuple(number._replace(module=modules[int(number.module)]) for number in passed)

    def _kind(self, split: Split) -> Any:
        """What modules have in common that need the same attributes."""
        module = self.model.get_submodule(split.module)
        flags = {key: value for key, value in vars(module).items() if isinstance(value, bool)}
        sizes = {n for place in range(len(split.lengths)) for n in _sizes(replace(split, free=place))}
        numbers = {key: value for key, value in self.held[split.module].items() if value in sizes}
        parts = tuple((name, type(part)) for name, part in module.named_children())
        return type(module), *(tuple(sorted(known.items())) for known in (flags, numbers)), parts, split.lengths


def _sizes(split: Split) -> set[int]:
    return {split.length, *split.totals}

"""Whether a network does without some of its channels: tried on a copy, against one in which they are silenced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taut.core.example import Example
from taut.core.files import one_line
from taut.core.modes import evaluating
from taut.core.randomness import own_states, seed_globals
from taut.core.tensors import all_tensors, map_tensors, opened
from taut.errors import ModelError
from taut.methods.narrow_layers import slim
from taut.structure.channels.cuts import cuts_of, numbers_of, silence
from taut.structure.channels.groups import ChannelGroup
from taut.structure.narrowing import Cut, channel_axis
from taut.structure.rules import module_rule
from taut.structure.sameness import Tolerance, few, finite, outputs_match, probes_of
from taut.structure.surgery import carry_settings, clone, renumber, replace

CLOSE = {torch.float64: Tolerance(share=1e-8), torch.float32: Tolerance(share=1e-3)}
"""Rounding of other sums: a norm over the channels that are left, or many layers in float32."""

DEPENDS = "what is computed from the others depends on how many there are"


def failing(
    model: nn.Module, example: Example, groups: Sequence[ChannelGroup], gone: Sequence[Tensor]
) -> list[tuple[int, str]]:
    """The groups without whose channels the network does not run, or computes something else; with the reason.

    Args:
        model: is not changed.
        example: how it is called.
        groups: of its channels.
        gone: those that go, of every group.
    """
    trial = Trial(model, example)
    places = [place for place, index in enumerate(gone) if len(index)]
    if trial.departs(groups, {place: gone[place] for place in places}) is None:
        return []
    alone = [
        (place, why + _rules(groups[place]))
        for place in places
        if (why := trial.departs(groups, {place: gone[place]})) is not None
    ]
    if alone:
        return alone
    chosen: dict[int, Tensor] = {}
    for place in places:  # only together do they fail: the one with which that begins
        chosen[place] = gone[place]
        why = trial.departs(groups, chosen)
        if why is not None:
            return [(place, why + _rules(groups[place]))]
    return []


def _rules(group: ChannelGroup) -> str:
    """What a reason adds where it may be a rule of the user's that is wrong."""
    named = [f"'{name}'" for name in group.rules]
    return f" (see the channel rule of {' and '.join(named)})" if named else ""


class Trial:
    """Copies of a model that are narrowed and compared.

    Attributes:
        random: whether two runs of the model give something else, so that only running is asked for.
        runs: whether the model runs.
    """

    def __init__(self, model: nn.Module, example: Example, value: Any = None) -> None:
        """Run the model.

        Args:
            model: is not changed.
            example: how it is called.
            value: what it is called with; None: noise like the example.
        """
        self.random = self.runs = False
        for part in dict.fromkeys((few(example), example)):
            for dtype in (torch.float64, torch.float32):
                self.example, self.dtype = part, dtype
                self.base = clone(model).double() if dtype == torch.float64 else clone(model)
                self.probe = map_tensors(self._typed, probes_of(part)[0] if value is None else value)
                first, again = self._run(self.base, 0), self._run(self.base, 1)
                if first is not None and again is not None:
                    self.random, self.runs = not outputs_match(first, again, CLOSE[dtype]), True
                    return

    def _typed(self, t: Tensor) -> Tensor:
        return t.to(self.dtype) if t.is_floating_point() else t

    def departs(self, groups: Sequence[ChannelGroup], chosen: Mapping[int, Tensor]) -> str | None:
        """Why the network cannot do without these channels; None where it can.

        What reads heads is held against the wide network, too: what it gives may be nothing yet.

        Args:
            groups: of the model's channels.
            chosen: those that go, by the place of their group.
        """
        empty = torch.zeros(0, dtype=torch.int64)
        gone = [chosen.get(place, empty) for place in range(len(groups))]
        small = clone(self.base)
        cuts = cuts_of(small, groups, gone)
        for name, cut in cuts.items():
            replace(small, name, slim(small.get_submodule(name), cut))
        renumber(small, numbers_of(groups, gone, small))
        heads = {m.layer for group in groups if group.numbers for m in group.of("in")}
        readers = [name for name in cuts if name in heads and module_rule(small.get_submodule(name)) is None]
        arrived = _arriving(small, dict.fromkeys(readers))
        found = self._run(small)
        if found is None:
            return self.error
        if self.random:
            return None  # drawn anew for fewer channels: another value is meant
        silent = clone(self.base)
        handles = silence(silent, groups, gone)
        for name, cut in cuts.items():
            norm = silent.get_submodule(name)
            if _together(norm):
                replace(silent, name, _OfKept(norm, cut))
        expected = _arriving(silent, {name: cuts[name].inputs for name in readers})
        wanted = self._run(silent)
        del handles
        same = wanted is not None and outputs_match([wanted, expected], [found, arrived], CLOSE[self.dtype])
        return None if same else DEPENDS

    def _run(self, model: nn.Module, seed: int = 0) -> list[Tensor] | None:
        try:
            with evaluating(model), torch.no_grad(), own_states():
                seed_globals(seed)
                made = all_tensors(opened(self.example.run(model, self.probe)))
        except ModelError as error:
            self.error = f"the narrower network does not run ({one_line(error.__cause__ or error)})"
            return None
        self.error = "the narrower network gives no finite output"
        return made if finite(made) else None


def _arriving(model: nn.Module, readers: Mapping[str, Tensor | None]) -> list[Tensor]:
    """What will arrive at layers when the model runs.

    Args:
        model: gets hooks.
        readers: layer -> the columns that count; None: all.
    """
    found: list[Tensor] = []

    def note(index: Tensor | None) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            found.append(x.clone() if index is None else x.index_select(channel_axis(module, x), index.to(x.device)))

        return hook

    for name, index in readers.items():
        model.get_submodule(name).register_forward_pre_hook(note(index))
    return found


def _together(module: nn.Module) -> bool:
    """Whether a norm computes its statistics over several channels."""
    groups = isinstance(module, nn.GroupNorm) and module.num_groups < module.num_channels
    return groups or isinstance(module, nn.LayerNorm | nn.RMSNorm)


class _OfKept(nn.Module):
    """A norm that sees the kept channels alone, and gives zeros for the others."""

    def __init__(self, norm: nn.Module, cut: Cut) -> None:
        super().__init__()
        self.inner, self.outputs = slim(norm, cut), cut.outputs
        carry_settings(norm, self.inner)
        self.axis = 1 if isinstance(norm, nn.GroupNorm) else -1

    def forward(self, x: Tensor) -> Tensor:
        """As wide as x."""
        index = self.outputs.to(x.device)
        made = self.inner(x.index_select(self.axis, index))
        return torch.zeros_like(x).index_copy(self.axis, index, made)

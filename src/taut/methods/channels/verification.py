"""Whether a network does without some of its channels: tried on a copy, against one in which they are silenced."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from taut.core.example import Example
from taut.core.files import one_line
from taut.core.modes import evaluating
from taut.core.randomness import own_states, seed_globals
from taut.core.tensors import all_tensors, map_tensors, opened
from taut.errors import ModelError
from taut.methods.narrow_layers import slim
from taut.structure.channels.cuts import cuts_of, silence
from taut.structure.channels.groups import ChannelGroup
from taut.structure.narrowing import Cut
from taut.structure.sameness import Tolerance, few, finite, outputs_match, probes_of
from taut.structure.surgery import carry_settings, clone, replace

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
    trial = _Trial(model, example, groups)
    places = [place for place, index in enumerate(gone) if len(index)]
    if trial.departs({place: gone[place] for place in places}) is None:
        return []
    alone = [
        (place, why + _rules(groups[place]))
        for place in places
        if (why := trial.departs({place: gone[place]})) is not None
    ]
    if alone:
        return alone
    chosen: dict[int, Tensor] = {}
    for place in places:  # only together do they fail: the one with which that begins
        chosen[place] = gone[place]
        why = trial.departs(chosen)
        if why is not None:
            return [(place, why + _rules(groups[place]))]
    return []


def _rules(group: ChannelGroup) -> str:
    """What a reason adds where it may be a rule of the user's that is wrong."""
    named = [f"'{name}'" for name in group.rules]
    return f" (see the channel rule of {' and '.join(named)})" if named else ""


class _Trial:
    """Copies of a model that are narrowed and compared."""

    def __init__(self, model: nn.Module, example: Example, groups: Sequence[ChannelGroup]) -> None:
        self.groups = groups
        self.random = False
        for part in dict.fromkeys((few(example), example)):
            for dtype in (torch.float64, torch.float32):
                self.example, self.dtype = part, dtype
                self.base = clone(model).double() if dtype == torch.float64 else clone(model)
                self.probe = map_tensors(self._typed, probes_of(part)[0])
                first, again = self._run(self.base, 0), self._run(self.base, 1)
                if first is not None and again is not None:
                    self.random = not outputs_match(first, again, CLOSE[dtype])
                    return

    def _typed(self, t: Tensor) -> Tensor:
        return t.to(self.dtype) if t.is_floating_point() else t

    def departs(self, chosen: dict[int, Tensor]) -> str | None:
        """Why the network cannot do without these channels; None where it can."""
        empty = torch.zeros(0, dtype=torch.int64)
        gone = [chosen.get(place, empty) for place in range(len(self.groups))]
        small = clone(self.base)
        for name, cut in cuts_of(small, self.groups, gone).items():
            replace(small, name, slim(small.get_submodule(name), cut))
        found = self._run(small)
        if found is None:
            return self.error
        if self.random:
            return None  # drawn anew for fewer channels: another value is meant
        silent = clone(self.base)
        handles = silence(silent, self.groups, gone)
        for name, cut in cuts_of(self.base, self.groups, gone).items():
            norm = silent.get_submodule(name)
            if _together(norm):
                replace(silent, name, _OfKept(norm, cut))
        wanted = self._run(silent)
        del handles
        return None if wanted is not None and outputs_match(wanted, found, CLOSE[self.dtype]) else DEPENDS

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

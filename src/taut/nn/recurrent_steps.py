"""The steps of a recurrent layer, taken one by one: what torch's kernel computes, with a look at what is inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Recur = Callable[[int, Tensor], Tensor]
"""The number of a step in time, and the hidden states before it (n, units) -> (n, gates * units)."""


def walk(
    mode: str, steps: Sequence[Tensor], first: tuple[Tensor, ...], recur: Recur, *, backward: bool
) -> tuple[list[Tensor], list[Tensor], tuple[Tensor, ...]]:
    """One direction of a layer. Of packed inputs fewer samples are left at later steps.

    Args:
        mode: as torch calls it.
        steps: what is made of the inputs of every step, (n, gates * units).
        first: initial states (samples, units), h and for an LSTM c.
        recur: what is made of the hidden states.
        backward: from the last step to the first.

    Returns:
        Hidden states behind and before every step, in the order of time, and the last states of all samples.
    """
    state = tuple(t[: len(steps[-1])] for t in first) if backward else first
    ended: list[tuple[Tensor, ...]] = []
    order = range(len(steps) - 1, -1, -1) if backward else range(len(steps))
    behind, before = {}, {}
    for number in order:
        here, now = len(state[0]), len(steps[number])
        if now < here:
            ended.append(tuple(t[now:] for t in state))
            state = tuple(t[:now] for t in state)
        elif now > here:
            state = tuple(torch.cat([t, other[here:now]]) for t, other in zip(state, first, strict=True))
        before[number] = state[0]
        state = _cell(mode, steps[number], recur(number, state[0]), state)
        behind[number] = state[0]
    if ended:
        state = tuple(torch.cat(parts) for parts in zip(state, *reversed(ended), strict=True))
    numbers = range(len(steps))
    return [behind[number] for number in numbers], [before[number] for number in numbers], state


def called(module: nn.Module) -> Recur:
    """A call of a module at every step."""

    def recur(_: int, h: Tensor) -> Tensor:
        made: Tensor = module(h)
        return made

    return recur


def walk_watched(
    mode: str, steps: Sequence[Tensor], first: tuple[Tensor, ...], linear: nn.Linear, joined: Any, *, backward: bool
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """The same for a layer whose calls somebody is told of: it is called once, with the states before all steps.

    What is added to its output acts on later steps, too, and gradients at its output are those of a call at every step:
    f(h) = f(b) + W (h - b) for the states b that are found first, and whatever a hook makes of f(b).

    Args:
        mode: as torch calls it.
        steps: see `walk`.
        first: see `walk`.
        linear: what is made of the hidden states.
        joined: puts tensors of all steps into one, and takes such a one apart.
        backward: see `walk`.
    """
    join, apart = joined
    with torch._C._DisableTorchDispatch(), torch.no_grad():  # who counts operations sees the call alone
        _, states, _ = walk(
            mode, steps, first, lambda _, h: functional.linear(h, linear.weight, linear.bias), backward=backward
        )
        together = join(states)
    given = apart(linear(together))
    with torch._C._DisableTorchDispatch():
        outputs, _, state = walk(
            mode,
            steps,
            first,
            lambda number, h: given[number] + functional.linear(h - states[number], linear.weight),
            backward=backward,
        )
    return outputs, state


def _cell(mode: str, x: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The state behind one step.

    Args:
        mode: as torch calls it.
        x: (n, gates * units), what is made of the inputs.
        h: likewise, of the hidden states.
        state: before.
    """
    if mode == "LSTM":
        i, f, g, o = (x + h).chunk(4, -1)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    if mode == "GRU":
        xr, xz, xn = x.chunk(3, -1)
        hr, hz, hn = h.chunk(3, -1)
        new, z = torch.tanh(xn + (xr + hr).sigmoid() * hn), (xz + hz).sigmoid()
        return (new + z * (state[0] - new),)
    return ((x + h).tanh() if mode == "RNN_TANH" else (x + h).relu(),)

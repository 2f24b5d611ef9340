"""Parameters, multiply-accumulates and bytes of a model, counted and not estimated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import PackedSequence
from torch.utils.flop_counter import FlopCounterMode

from taut import text
from taut.calls import Example, evaluating, map_tensors, quietly
from taut.measure.storage import file_bytes, refuse_lazy, stored_tensors
from taut.types import Cost

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@dataclass(frozen=True)
class Count:
    """Multiply-accumulates of one run of the example.

    Attributes:
        total: of the whole model, per sample.
        by_module: per sample in all calls of each module, submodules included; the model itself is "". A module that
            the example does not call is missing; one that has several names is under its first.
        notes: one sentence for every module whose MACs taut counted itself.
    """

    total: int
    by_module: dict[str, int]
    notes: tuple[str, ...] = ()


@quietly
def count_macs(model: nn.Module, example: Example) -> Count:
    """Multiply-accumulates per sample: half of torch's FlopCounterMode over the batch, plus recurrent modules.

    The model runs once, in eval mode. Fused attention kernels are switched off meanwhile: torch's counter does not see
    into them. Recurrent modules are counted as steps x gates x hidden x (input + hidden), plus the projection, per
    layer and direction; what torch's counter saw of them already is not counted twice.

    Raises:
        ModelError: the model cannot be run on the example, or is not initialized.
    """
    refuse_lazy(model.named_parameters())
    with evaluating(model), _no_fused_attention(), FlopCounterMode(display=False) as counter:
        tally = _Tally(counter)
        with tally.watching(model):
            example.run(model, map_tensors(Tensor.clone, example.value))
    by_module = {name: round(macs / example.batch) for name, macs in tally.by_module.items()}
    notes = tuple(
        f"{name or '(model)'}: {text.count(macs / example.batch)} MACs counted by taut "
        "(torch's counter does not see recurrent cells)"
        for name, macs in tally.added.items()
    )
    return Count(round(tally.macs() / example.batch), by_module, notes)


@quietly
def count(model: nn.Module, example: Example) -> Cost:
    """What the model costs: unique parameters, those that are not zero, MACs per sample, bytes of model.safetensors.

    Raises:
        ModelError: the model cannot be run on the example or cannot be stored as tensors.
    """
    parameters, nonzero = count_parameters(model)
    return Cost(parameters, nonzero, count_macs(model, example).total, file_bytes(stored_tensors(model)[0]))


@quietly
def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Elements of the unique parameters, and how many of them are not zero (NaN is not zero).

    Raises:
        ModelError: the model is not initialized.
    """
    refuse_lazy(model.named_parameters())
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(_nonzero(p) for p in parameters)


def _nonzero(tensor: Tensor) -> int:
    try:
        return int(torch.count_nonzero(tensor))
    except NotImplementedError:  # float8 and the wider unsigned integers
        return int(torch.count_nonzero(tensor.to(torch.float64)))


@contextmanager
def _no_fused_attention() -> Iterator[None]:
    """Attention as plain matrix products, which the counter sees alike on every device."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Tally:
    """The running count of a forward pass, split by module with hooks."""

    def __init__(self, counter: FlopCounterMode) -> None:
        self.by_module: dict[str, int] = {}
        self.added: dict[str, int] = {}
        self._counter = counter
        self._starts: dict[nn.Module, list[int]] = {}

    def macs(self) -> int:
        """Multiply-accumulates of the whole batch so far."""
        return self._counter.get_total_flops() // 2 + sum(self.added.values())

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Count every call of every module of `model`."""
        names = {module: name for name, module in model.named_modules()}

        def enter(module: nn.Module, _args: Any) -> None:
            self._starts.setdefault(module, []).append(self.macs())

        def leave(module: nn.Module, args: Any, kwargs: dict[str, Any], _output: Any) -> None:
            name, start = names[module], self._starts[module].pop()
            unseen = recurrent_macs(module, args[0] if args else kwargs.get("input")) - (self.macs() - start)
            if unseen > 0:
                self.added[name] = self.added.get(name, 0) + unseen
            if not self._starts[module]:  # a module that calls itself is counted by its outermost call
                self.by_module[name] = self.by_module.get(name, 0) + self.macs() - start

        handles = []
        try:
            for module in names:
                if not isinstance(module, torch.jit.ScriptModule):  # refuses hooks
                    handles.append(module.register_forward_pre_hook(enter))
                    handles.append(module.register_forward_hook(leave, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()


def recurrent_macs(module: nn.Module, inputs: Any) -> int:
    """Multiply-accumulates of one call of an LSTM, GRU, RNN or one of their cells; 0 for any other module.

    Args:
        module: any module.
        inputs: its first input, (..., features) or a PackedSequence; every leading axis is a step or a sample.
    """
    if not isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return 0
    steps = int((inputs.data if isinstance(inputs, PackedSequence) else inputs).shape[:-1].numel())
    hidden = module.hidden_size
    if isinstance(module, nn.RNNCellBase):
        return steps * module.weight_ih.shape[0] * (module.input_size + hidden)
    gates = next(number for kind, number in GATES.items() if module.mode.startswith(kind))
    directions = 2 if module.bidirectional else 1
    state = module.proj_size or hidden
    macs, width = 0, module.input_size
    for _ in range(module.num_layers):
        macs += directions * (gates * hidden * (width + state) + module.proj_size * hidden)
        width = state * directions
    return steps * macs

"""The layers that a module has in its plain form, by name, before it is in it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

ATTENTION_PARTS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""Of a `taut.nn.Attention`."""


def parts_of(module: nn.Module) -> tuple[str, ...]:
    """The layers of attention or of a recurrent layer, below its name; () of all others."""
    if isinstance(module, nn.MultiheadAttention):
        return ATTENTION_PARTS
    if isinstance(module, nn.RNNBase):
        states = module.num_layers * (1 + module.bidirectional)
        return (*_numbered("inputs.", module.num_layers), *_numbered("states.", states))
    return ()


def parts_of_rows(rows: Sequence[int], weight: str = "") -> tuple[str, ...]:
    """The layers of a weight that code multiplies by.

    Args:
        rows: those that go together, () where all do.
        weight: its name in the module that the layer is; "" where it is the layer itself.
    """
    return _numbered(weight and f"{weight}.", max(1, len(rows)))


def _numbered(stem: str, count: int) -> tuple[str, ...]:
    return tuple(f"{stem}{number}" for number in range(count))

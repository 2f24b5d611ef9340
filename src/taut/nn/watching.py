"""Whether somebody looks on when a layer is called: it has to be called, then, where its weight alone would do."""

from __future__ import annotations

from torch import nn


def watched(module: nn.Module) -> bool:
    """Whether somebody is told when a module is called, or when gradients pass it."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )

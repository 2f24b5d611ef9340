"""How a net of the zoo is made: weights from a fixed seed, norms that are not the identity, eval mode, an example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Made = tuple[nn.Module, Any]
Inputs = Callable[[int], Any]

EXAMPLE, SETTLING = 2, 8
"""Samples of the example, and of each batch that batch norms see."""

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm2d, nn.GroupNorm, nn.LayerNorm)


def made(build: Callable[[], nn.Module], inputs: Inputs) -> Made:
    """The net that `build` makes, in eval mode, and an example that `inputs` draws; always the same.

    Scales and shifts of all norms are drawn, and batch norms have the mean statistics of two random batches.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build()
        _settle(net, inputs)
        return net.eval(), inputs(EXAMPLE)


@torch.no_grad()
def _settle(net: nn.Module, inputs: Inputs) -> None:
    norms = [module for module in net.modules() if isinstance(module, NORMS)]
    for norm in norms:
        for tensor, low, high in ((norm.weight, 0.5, 1.5), (norm.bias, -0.3, 0.3)):
            if tensor is not None:
                tensor.uniform_(low, high)
    batch_norms = [norm for norm in norms if isinstance(norm, NORMS[:3])]
    momenta = [norm.momentum for norm in batch_norms]
    for norm in batch_norms:
        norm.momentum = None  # the plain mean over all batches
    for _ in range(2 if batch_norms else 0):
        call(net.train(), inputs(SETTLING))
    for norm, momentum in zip(batch_norms, momenta, strict=True):
        norm.momentum = momentum


def call(net: nn.Module, example: Any) -> Any:
    """The net's output: a dict goes as keywords, a tuple as positional arguments."""
    if isinstance(example, dict):
        return net(**example)
    return net(*example) if isinstance(example, tuple) else net(example)


def normal(*shape: int, mean: float = 0.0) -> Inputs:
    """Draws normal inputs of one sample's shape."""
    return lambda batch: torch.randn(batch, *shape) + mean


def tokens(high: int, length: int) -> Inputs:
    """Draws sequences of integers below `high`."""

    def draw(batch: int) -> Tensor:
        return torch.randint(0, high, (batch, length))

    return draw

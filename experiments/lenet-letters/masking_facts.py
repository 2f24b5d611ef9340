"""What keeps removed weights at zero, and what does not: the source's equations 2 to 4 and its algorithm tried out."""

from __future__ import annotations

import torch
from lenet import lenet
from reductions import reduced
from torch import Tensor, nn

from taut.nn import hold_zeros

STEPS = 20


def moved(optimizer: str, way: str) -> float:
    """The largest removed weight of the first dense layer after some steps; 10 % of it are kept.

    Args:
        optimizer: "sgd", or "adam" with the moments of the training before.
        way: "gradient" masks the gradient as the source does; "hold" is `taut.nn.hold_zeros`.
    """
    torch.manual_seed(0)
    x, y = torch.rand(64, 1, 32, 32), torch.randint(0, 26, (64,))
    net = lenet(0)
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    made = kinds[optimizer](net.parameters(), lr=1e-3)
    for _ in range(STEPS):
        _step(net, made, x, y)
    small = reduced(net, "magnitude fc", 0.1, x, None)
    mask = small.get_submodule("fc1").weight != 0
    with torch.no_grad():
        net.fc1.weight.mul_(mask)
    if way == "hold":
        hold_zeros(net, ["fc1"])  # the optimizer and its moments go on
    for _ in range(STEPS):
        _step(net, made, x, y, mask if way == "gradient" else None)
    return float(net.fc1.weight.detach()[~mask].abs().max())


def _step(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, mask: Tensor | None = None) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(x), y).backward()
    if mask is not None:
        weight = net.get_submodule("fc1").weight
        if isinstance(weight.grad, Tensor):
            weight.grad.mul_(mask)
    optimizer.step()


def facts() -> dict[str, float]:
    """The largest removed weight, way by way."""
    return {
        f"{optimizer}, {way}": moved(optimizer, way) for optimizer in ("sgd", "adam") for way in ("gradient", "hold")
    }

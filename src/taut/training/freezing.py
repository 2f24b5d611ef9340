"""Which layers a stage trains: all, or those that run after the layers it has just compressed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from taut.core.example import Example
from taut.core.modes import evaluating
from taut.structure.surgery import shallow


def run_order(model: nn.Module, example: Example) -> list[str]:
    """Names of the modules that own parameters, in the order in which they first run."""
    copied, order = shallow(model), dict[str, None]()

    def hook(name: str) -> Any:
        return lambda *_: order.setdefault(name)

    for name, module in copied.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(hook(name))
    with evaluating(copied):
        example.run(copied)
    return list(order)


def below(order: Sequence[str], layers: Sequence[str]) -> set[str]:
    """The modules of `order` up to the last one that is, or is part of, one of `layers`."""
    places = [
        place for place, name in enumerate(order) for layer in layers if name == layer or name.startswith(f"{layer}.")
    ]
    return set(order[: max(places, default=-1) + 1])


@contextmanager
def frozen(model: nn.Module, names: set[str]) -> Iterator[list[nn.Module]]:
    """The parameters of the named modules without gradient inside the block; gives the modules themselves."""
    modules = [module for name, module in model.named_modules() if name in names]
    held = [p for module in modules for p in module.parameters(recurse=False) if p.requires_grad]
    for parameter in held:
        parameter.requires_grad_(requires_grad=False)
    try:
        yield modules
    finally:
        for parameter in held:
            parameter.requires_grad_()


def train_mode(model: nn.Module, still: Sequence[nn.Module], *, labels: bool) -> None:
    """Training mode where there are labels; else eval mode: what is trained then is the function the net will have.

    Batch norms that are frozen, or whose statistics are declared fixed (momentum 0), keep them in any case. Recurrent
    layers on a GPU have to be in training mode to give gradients.
    """
    model.train(labels)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and (module.momentum == 0 or module in still):
            module.eval()
        if isinstance(module, nn.RNNBase) and any(p.is_cuda for p in module.parameters(recurse=False)):
            module.train()

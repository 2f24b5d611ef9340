"""The pruning rules of the study, by name, as steps of taut; and one pruning of a net."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import taut

RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "sum": ("mfbp", {"score": "sum"}),
    "product": ("mfbp", {"score": "product"}),
    "reconstruction": ("mfbp", {"score": "reconstruction"}),
    "magnitude": ("magnitude", {}),
    "random": ("magnitude", {"score": "random"}),
    "source": ("mfbp", {"score": "residual", "solver": "dfmf"}),
    "committed code": ("mfbp", {"score": "residual", "solver": "dfmf", "select": "unchecked percentiles"}),
    "later text": ("mfbp", {"score": "flipped", "solver": "dfmf"}),
}
"""Name -> method and settings; sparsity and rank come with the run."""

WRONG = {
    "source": "prunes where |W| - |H| is small: what the factorization explains best, so the structure goes and the "
    "noise stays",
    "committed code": "the same, with the mean over layers of a percentile as the threshold: how much is pruned "
    "depends on how the layers differ, and a layer that H reproduces exactly is wiped",
    "later text": "prunes where |H| - |W| is small: large weights that H does not reach, so the strongest single "
    "connections go first",
}
"""What is wrong with the rules of the sources, in a sentence each."""


def step(net: taut.Network, rule: str, sparsity: float, rank: int | None = None, layers: Sequence[str] = ()) -> Any:
    """The rule as a step over the whole network, or over the named layers."""
    method, settings = RULES[rule]
    more: dict[str, Any] = {} if method == "magnitude" or rank is None else {"rank": rank}
    if not layers:
        return taut.whole(net, method, sparsity=sparsity, **settings, **more)
    group = net.group(list(layers))
    return taut.Step(group.names, method, {"sparsity": sparsity, **settings, **more}, group, before=group.cost)


def prune(model: nn.Module, example: Tensor, rule: str, sparsity: float, **more: Any) -> nn.Module:
    """The model with the share `sparsity` of its weights at zero."""
    net = taut.trace(model, example)
    return taut.apply(model, taut.Plan((step(net, rule, sparsity, **more),)), taut.observe(net, model))


def zeros(model: nn.Module, layers: Sequence[str] = ()) -> float:
    """Share of the weights, of all or of the named layers, that is zero."""
    held = {name: module.weight for name, module in model.named_modules() if isinstance(module, KINDS)}
    chosen = [weight for name, weight in held.items() if not layers or name in layers]
    return sum(int((w == 0).sum()) for w in chosen) / sum(w.numel() for w in chosen)


KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def dead(model: nn.Module) -> int:
    """Units of Linear layers without an incoming or without an outgoing weight (the output layer not counted)."""
    layers = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    alive = [(a != 0).any(1) & (b != 0).any(0) for a, b in itertools.pairwise(layers)]
    return int(torch.cat([~one for one in alive]).sum()) if alive else 0

"""The reduced nets of the four tables: what is printed, and how each is built from the trained net."""

from __future__ import annotations

import copy
from fractions import Fraction
from typing import Any

import torch
from lenet import CONV, FC, kept, lenet
from torch import Tensor, nn

import taut

PUBLISHED: dict[tuple[str, float], tuple[int, int, float]] = {
    ("magnitude fc", 0.05): (5240, 54, 88.173),
    ("magnitude fc", 0.1): (9309, 14, 88.635),
    ("magnitude fc", 0.2): (17447, 11, 88.697),
    ("magnitude fc", 0.5): (41862, 15, 88.216),
    ("magnitude fc", 0.75): (62208, 11, 88.514),
    ("magnitude conv", 0.05): (81683, 44, 86.880),
    ("magnitude conv", 0.1): (81729, 14, 90.697),
    ("magnitude conv", 0.2): (81820, 10, 92.12),
    ("magnitude conv", 0.5): (82095, 10, 92.014),
    ("magnitude conv", 0.75): (82325, 10, 92.351),
    ("svd fc", 0.05): (6283, 36, 39.918),
    ("svd fc", 0.1): (11396, 38, 84.740),
    ("svd fc", 0.2): (21733, 26, 91.745),
    ("svd fc", 0.5): (53043, 14, 92.649),
    ("svd fc", 0.75): (78924, 14, 92.668),
    ("cp conv", 1): (81677, 15, 88.053),
    ("cp conv", 5): (81841, 12, 92.096),
    ("cp conv", 10): (82046, 10, 91.779),
    ("cp conv", 15): (82251, 12, 92.625),
}
"""Experiment and level (share kept, or rank) -> parameters, epochs trained, test accuracy in per cent, as printed."""

SHARES: dict[tuple[str, float], float] = {
    ("svd fc", 0.05): 6.28,
    ("svd fc", 0.1): 12.57,
    ("svd fc", 0.2): 25.27,
    ("svd fc", 0.5): 63.74,
    ("svd fc", 0.75): 95.54,
    ("cp conv", 1): 4.47,
    ("cp conv", 5): 22.33,
    ("cp conv", 10): 44.66,
    ("cp conv", 15): 66.99,
}
"""Share of their section's weights that the decompositions keep, in per cent, as printed."""

EXAMPLE = 2
DENSE = 82_554


def steps(net: nn.Module, experiment: str, level: float, metric: str) -> list[taut.Step]:
    """One step per layer of the section.

    Magnitude keeps n - int(removed n) weights of a layer; an SVD int(share of the smaller side) singular values.
    """
    method, section = experiment.split()
    found = []
    for name in FC if section == "fc" else CONV:
        weight = net.get_submodule(name).weight
        settings: dict[str, Any]
        if method == "magnitude":
            removed = int((1 - Fraction(str(level))) * weight.numel())
            settings = {"sparsity": removed / weight.numel(), "select": "layer"}
        elif method == "svd":
            settings = {"rank": int(Fraction(str(level)) * min(weight.shape)), "metric": metric}
        else:
            settings = {"rank": int(level), "metric": metric}
        found.append(taut.Step((name,), method, settings, allow_growth=True))
    return found


def reduced(net: nn.Module, experiment: str, level: float, example: Tensor, data: list[Tensor] | None) -> nn.Module:
    """The net with one section reduced and all other weights as they were; with data: its metric, and refitted."""
    traced = taut.trace(net, example[:EXAMPLE])
    plan = taut.Plan.of(traced, steps(net, experiment, level, "frobenius" if data is None else "data"))
    return taut.apply(net, plan, taut.observe(traced, net, data), data)


def planned(net: nn.Module, params: int, images: Tensor) -> nn.Module:
    """SVD at a printed size with the ranks that taut plans, in the data metric and refitted."""
    traced, data = taut.trace(net, images[:EXAMPLE]), list(images.split(256))
    stats = taut.observe(traced, net, data)
    plan = taut.plan(traced, stats, taut.Budget(params=params), methods=["svd"])
    return taut.apply(net, plan, stats, data)


def as_the_code(net: nn.Module, experiment: str, level: float, example: Tensor, seed: int) -> nn.Module:
    """What the source's programs trained on: the other section at random again; the SVD's biases dropped as well."""
    small: Any = reduced(net, experiment, level, example, None)
    fresh = lenet(seed + 1000)
    for name in CONV if experiment == "svd fc" else FC:
        small.get_submodule(name).load_state_dict(fresh.get_submodule(name).state_dict())
    if experiment == "svd fc":
        for name in FC:
            small.get_submodule(name)[-1].bias = None
    return small


def rewound(net: nn.Module, seed: int) -> nn.Module:
    """The net's first weights where its weights are not zero (Frankle and Carbin 2019)."""
    start: Any = lenet(seed)
    for name in (*CONV, *FC):
        with torch.no_grad():
            start.get_submodule(name).weight.mul_(net.get_submodule(name).weight != 0)
    return start


def with_middle_biases(net: nn.Module) -> nn.Module:
    """The net with a bias, of zero, on every first layer of a factorized dense one: as the source counts."""
    widened = copy.deepcopy(net)
    for name in FC:
        first = getattr(widened.get_submodule(name), "0", None)
        if isinstance(first, nn.Linear) and first.bias is None:
            first.bias = nn.Parameter(torch.zeros(first.out_features))
    return widened


def counts(net: nn.Module, small: nn.Module, experiment: str) -> dict[str, float]:
    """Parameters as built and as the source counts them, and the share of the section's weights, in per cent."""
    section = FC if experiment.endswith("fc") else CONV
    weights = sum(net.get_submodule(name).weight.numel() for name in section)
    biases = sum(net.get_submodule(name).bias.numel() for name in section)
    rest = kept(net) - weights - biases
    widened = with_middle_biases(small)
    inside = kept(small) - rest - biases
    counted = kept(widened) - rest - biases
    return {
        "params": kept(small),
        "params as counted": kept(widened),
        "share": 100 * inside / weights,
        "share as counted": 100 * counted / weights,
    }

"""Statements of the source that are checked by one computation each, on the colour net and its images."""

from __future__ import annotations

import torch
from accuracy import CONV1, CONV2, FC1, Bench

RANK = 24


@torch.no_grad()
def properties(bench: Bench) -> dict[str, float]:
    """Numbers by name."""
    conv1, conv2, fc1 = (bench.net.get_submodule(name).weight.double() for name in (CONV1, CONV2, FC1))
    U, s, Vh = torch.linalg.svd(fc1, full_matrices=False)
    x = _inputs(bench)
    cut = (U[:, :RANK] * s[:RANK]) @ Vh[:RANK]
    white = torch.randn(200_000, fc1.shape[1], generator=torch.Generator().manual_seed(0))
    expected = (white @ fc1.T.float()).square().sum(1).mean()
    colours = torch.linalg.svdvals(conv1.flatten(2)).square()
    whole = {"rank_in": 38, "rank_out": 48, "inputs": 1, "outputs": 1, "metric": "frobenius"}
    blocks = {"rank_in": 19, "rank_out": 24, "inputs": 2, "outputs": 2, "metric": "frobenius"}
    values = torch.linalg.svdvals(conv2.flatten(1)).square()
    return {
        "svd_bound": float((x @ (fc1 - cut).T).norm() / (s[RANK] * x.norm())),
        "expectation": float(expected / fc1.square().sum()),
        "one_colour": float(colours[:, 0].sum() / colours.sum()),
        "two_colours": float(colours[:, :2].sum() / colours.sum()),
        "whole": bench.error(CONV2, "bicluster", whole),
        "blocks": bench.error(CONV2, "bicluster", blocks),
        "quarter_of_conv2": float(values[: len(values) // 4].sum() / values.sum()),
        "quarter_of_fc1": float(s[: len(s) // 4].square().sum() / s.square().sum()),
    }


def _inputs(bench: Bench) -> torch.Tensor:
    """What the first dense layer reads."""
    found: list[torch.Tensor] = []
    hook = bench.net.get_submodule(FC1).register_forward_pre_hook(lambda _, args: found.append(args[0].double()))
    bench.net(bench.batches[0])
    hook.remove()
    return found[0]

"""What the tests of the methods that cluster channels share: layers, statistics, damage by brute force."""

import copy
from unittest.mock import patch

import pytest
import torch
from torch import nn

from cases import FLAVOURS, KERNEL
from taut.decompose.outputs import OutputMoment
from taut.decompose.weighting import Weighting
from taut.structure.statistics import LayerStatistics

KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def statistics(conv, *, fisher=False, form="full"):
    """Second moments with a spread, as calibration would find them."""
    size = conv.weight[0].numel() if form == "full" else conv.weight.shape[1]
    X = torch.randn(300, size).double() * torch.logspace(1, -1, size)
    G = torch.randn(100, len(conv.weight)).double() * torch.logspace(1, -1, len(conv.weight))
    outputs = OutputMoment((G.T @ G / 100)[None]) if fisher else None
    return LayerStatistics(Weighting(**{form: (X.T @ X / 300)[None]}), outputs, positions=5.0)


def rewritten(method, conv, stats=None):
    """The built layers, the kernel that they were fitted to, and its factors."""
    factors = method.factor({"c": conv}, {} if stats is None else {"c": stats})
    fit = method.fit(factors)
    with patch.object(type(method), "fit", lambda *_: fit):  # made once: it is most of the time
        built = method.rewrite({"c": conv}, factors).modules["c"].eval()
    return built, fit.W, factors


def with_kernel(conv, W):
    """The layer as it is, with another kernel."""
    other = copy.deepcopy(conv)
    other.weight.data = W.reshape(conv.weight.shape).to(conv.weight)
    return other


def flavours():
    for dims in (1, 2, 3):
        for name, flavour in FLAVOURS.items():
            if flavour.get("groups", 1) == 1 and flavour.get("kernel_size", KERNEL) != 1:
                yield pytest.param(dims, flavour, id=f"{dims}d {name}")


def brute_force(conv, built, stats):
    """tr(B dW A dW^T) of what unit impulses read back, as a loss or relative to the layer's output."""
    W, C = conv.weight.detach().flatten(1), conv.weight.shape[1]
    impulses = torch.eye(C * 9).double().reshape(-1, C, 3, 3)
    dW = W - (built(impulses) - built(torch.zeros_like(impulses)))[:, :, 0, 0].detach().T
    A = stats.weighting.full
    A = A[0] if A is not None else torch.kron(stats.weighting.channel[0], torch.eye(9))
    A = A + 1e-4 * A.trace() / len(A) * torch.eye(len(A))  # the documented ridge
    if stats.outputs is not None:
        return float((dW @ A @ dW.T * stats.outputs.full[0]).sum()) / (2 * stats.positions)
    return float((dW @ A @ dW.T).trace() / (W @ A @ W.T).trace())


def turned(size):
    """No axis stands for itself: the diagonal metric sees little of these."""
    return torch.linalg.qr(torch.randn(size, size).double())[0]

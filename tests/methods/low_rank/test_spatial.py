"""Spatial SVD: costs by torch's counter, the kernel by numpy's SVD of its unfolding."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from methods.samples import check_costs, group_of, layers
from taut.decompose.outputs import OutputMoment
from taut.decompose.weighting import Weighting
from taut.methods.low_rank.spatial import Spatial, max_rank
from taut.structure.statistics import LayerStatistics


@given(layers(dims=(2,), least=2), st.data())
def test_cost_is_that_of_the_built_module(sample, data):
    module, size = sample
    group, x = group_of(module, size)
    assert Spatial().refuses(group) is None
    check_costs(Spatial(rank=data.draw(st.integers(1, max_rank(group.layer)))), group, module, x)


@given(layers(dims=(2,), least=2))
def test_candidates_shrink(sample):
    module, size = sample
    group, _ = group_of(module, size)
    offered = Spatial().candidates(group, None)
    assert all(one.cost(group).lowers(group.cost) for one in offered)
    assert len(set(offered)) == len(offered) if offered else True


def kernel(seq, groups=1):
    """The kernel (g, o, c, y, x) of a k_h x 1 and a 1 x k_w convolution in a row."""
    first, second = (layer.weight.detach().double() for layer in seq)
    r = len(first) // groups
    first = first.reshape(groups, r, first.shape[1], -1)
    second = second.reshape(groups, -1, r, second.shape[3])
    return torch.einsum("gorx,grcy->gocyx", second, first)


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (2, 7, 5, 2), (9, 2, 2, 5)])
def test_frobenius_is_the_truncated_svd_of_the_unfolding(shape):
    o, c, h, v = shape
    conv = nn.Conv2d(c, o, (h, v)).double()
    unfolded = conv.weight.detach().permute(1, 2, 3, 0).reshape(c * h, v * o).numpy()
    Q, s, V = np.linalg.svd(unfolded, full_matrices=False)
    for rank in (1, 2, len(s)):
        method = Spatial(rank=rank, metric="frobenius")
        factors = method.factor({"c": conv}, {})
        seq = method.rewrite({"c": conv}, factors).modules["c"]
        best = ((Q[:, :rank] * s[:rank]) @ V[:rank]).reshape(c, h, v, o)
        np.testing.assert_allclose(kernel(seq)[0].permute(1, 2, 3, 0), best, atol=1e-8)
        tail = (s[rank:] ** 2).sum() / (s**2).sum()
        assert method.damage(factors) == pytest.approx(tail, rel=1e-8, abs=1e-9)


@pytest.mark.parametrize("metric", ["data", "fisher"])
@pytest.mark.parametrize("groups", [1, 2])
def test_damage_is_that_of_the_kernel_which_is_built(metric, groups):
    conv = nn.Conv2d(4, 6, 3, groups=groups).double()
    k, o = 36 // groups, 6 // groups
    X, G = torch.randn(groups, 80, k).double(), torch.randn(groups, 20, o).double()
    stats = LayerStatistics(Weighting(full=X.mT @ X / 80), OutputMoment(G.mT @ G / 20), positions=5.0)
    W = conv.weight.detach().reshape(groups, o, k)
    for rank in (1, 2, 4):
        method = Spatial(rank=rank, metric=metric)
        factors = method.factor({"c": conv}, {"c": stats})
        dW = W - kernel(method.rewrite({"c": conv}, factors).modules["c"], groups).flatten(2)
        error = torch.einsum("gpo,gpi,gij,goj->", stats.outputs.full, dW, stats.weighting.regular(), dW)
        assert method.damage(factors) == pytest.approx(float(error) / 10, rel=1e-6, abs=1e-9)


def test_factors_carry_equal_norms():
    conv = nn.Conv2d(5, 7, 3)
    stats = LayerStatistics(Weighting(full=torch.diag(torch.logspace(-3, 3, 45))[None]))
    method = Spatial(rank=6)
    first, second = method.rewrite({"c": conv}, method.factor({"c": conv}, {"c": stats})).modules["c"]
    torch.testing.assert_close(
        first.weight.flatten(1).norm(dim=1), second.weight.transpose(0, 1).flatten(1).norm(dim=1), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv2d(4, 4, (1, 3)), (2, 4, 5, 5)),
        (nn.Conv2d(4, 4, (3, 1)), (2, 4, 5, 5)),
        (nn.Conv1d(4, 4, 3), (2, 4, 5)),
        (nn.Conv3d(4, 4, 3), (2, 4, 5, 5, 5)),
        (nn.Linear(4, 4), (2, 4)),
    ],
    ids=repr,
)
def test_other_kernels_are_refused(layer, size):
    group, _ = group_of(layer, size)
    assert Spatial().refuses(group) == "spatial: needs a Conv2d whose kernel is larger than 1 along both axes"

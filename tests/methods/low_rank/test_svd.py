"""SVD of a layer: costs by torch's counter, weights by numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from methods.samples import check_costs, group_of, layers
from taut.decompose.outputs import OutputMoment
from taut.decompose.weighting import Weighting
from taut.errors import CallError
from taut.methods.low_rank.svd import SVD, max_rank
from taut.structure.statistics import LayerStatistics


@given(layers(), st.data())
def test_cost_is_that_of_the_built_module(sample, data):
    module, size = sample
    group, x = group_of(module, size)
    if SVD().refuses(group) is None:
        check_costs(SVD(rank=data.draw(st.integers(1, max_rank(group.layer)))), group, module, x)


@given(layers())
def test_candidates_shrink_and_lie_within_the_full_rank(sample):
    module, size = sample
    group, _ = group_of(module, size)
    offered = SVD().candidates(group, None) if SVD().refuses(group) is None else []
    assert all(one.cost(group).lowers(group.cost) for one in offered)
    assert [one.rank for one in offered] == sorted({one.rank for one in offered})


def product(seq, groups=1):
    """The weight (g, o, k) that two layers in a row have together."""
    first, second = (layer.weight.detach().double().flatten(1) for layer in seq)
    r = len(first) // groups
    return torch.stack([b @ a for a, b in zip(first.split(r), second.reshape(groups, -1, r), strict=True)])


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_frobenius_linear_is_the_truncated_svd(rank):
    fc = nn.Linear(8, 6).double()
    method = SVD(rank=rank, metric="frobenius")
    factors = method.factor({"fc": fc}, {})
    seq = method.rewrite({"fc": fc}, factors).modules["fc"]
    Q, s, V = np.linalg.svd(fc.weight.detach().numpy())
    np.testing.assert_allclose(product(seq)[0], (Q[:, :rank] * s[:rank]) @ V[:rank], atol=1e-10)
    assert torch.equal(seq[1].bias, fc.bias)
    assert seq[0].bias is None
    relative = (s[rank:] ** 2).sum() / (s**2).sum()
    assert method.damage(factors) == pytest.approx(relative, rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("metric", ["data", "fisher"])
@pytest.mark.parametrize("groups", [1, 2])
def test_damage_is_that_of_the_weight_which_is_built(metric, groups):
    conv = nn.Conv2d(4, 6, 3, groups=groups).double()
    k, o = 36 // groups, 6 // groups
    X, G = torch.randn(groups, 80, k).double(), torch.randn(groups, 20, o).double()
    stats = LayerStatistics(Weighting(full=X.mT @ X / 80), OutputMoment(G.mT @ G / 20), positions=5.0)
    W = conv.weight.detach().reshape(groups, o, k)
    for rank in range(1, o + 1):
        method = SVD(rank=rank, metric=metric)
        factors = method.factor({"c": conv}, {"c": stats})
        dW = W - product(method.rewrite({"c": conv}, factors).modules["c"], groups)
        error = torch.einsum("gpo,gpi,gij,goj->", stats.outputs.full, dW, stats.weighting.regular(), dW)
        assert method.damage(factors) == pytest.approx(float(error) / 10, rel=1e-6, abs=1e-9)


def test_norms_of_every_component_are_equal():
    fc = nn.Linear(9, 7)
    stats = LayerStatistics(Weighting(full=torch.diag(torch.logspace(-3, 3, 9))[None]))
    method = SVD(rank=4)
    seq = method.rewrite({"fc": fc}, method.factor({"fc": fc}, {"fc": stats})).modules["fc"]
    torch.testing.assert_close(seq[0].weight.norm(dim=1), seq[1].weight.norm(dim=0), rtol=1e-4, atol=0)


def test_a_sketch_of_few_rows_still_builds_every_rank():
    fc = nn.Linear(2400, 12)
    stats = LayerStatistics(Weighting(sketch=torch.randn(1, 3, 2400)))
    method = SVD(rank=12)
    rewrite = method.rewrite({"fc": fc}, method.factor({"fc": fc}, {"fc": stats}))
    assert rewrite.modules["fc"][0].weight.shape == (12, 2400)
    torch.testing.assert_close(product(rewrite.modules["fc"])[0], fc.weight.detach().double(), rtol=0, atol=1e-3)


def test_candidates_stay_within_what_a_sketch_can_judge():
    """More outputs than inputs, and fewer rows: a rank beyond them is built, but never offered."""
    fc = nn.Linear(700, 1000)
    stats = LayerStatistics(Weighting(sketch=torch.randn(1, 40, 700)))
    group, _ = group_of(fc, (2, 700))
    factors = SVD().factor({"fc": fc}, {"fc": stats})
    judged = factors.basis.energy.shape[-1]
    assert judged < 400
    offered = [one.rank for one in SVD().candidates(group, factors)]
    assert 0 < max(offered) < judged
    assert all(SVD(rank=r).damage(factors) > 0 for r in offered)
    built = SVD(rank=400).rewrite({"fc": fc}, factors).modules["fc"]
    assert bool((built[0].weight.norm(dim=1) > 1e-3).all())
    assert bool((built[1].weight.norm(dim=0) > 1e-3).all())


@pytest.mark.parametrize("layer", [nn.Linear(1, 5), nn.Linear(5, 1), nn.Conv2d(4, 4, 3, groups=4)], ids=repr)
def test_nothing_to_factorize(layer):
    group, _ = group_of(layer, (2, 4, 5, 5) if isinstance(layer, nn.Conv2d) else (2, layer.in_features))
    assert SVD().refuses(group) == "svd: one input or output per group leaves nothing to factorize"
    assert SVD().exact_case(group) is None


def test_unknown_metric_and_rank():
    fc = nn.Linear(4, 3)
    with pytest.raises(CallError, match=r"'metric' of svd must be one of .*mahalanobis, frobenius\. Got 'none'"):
        SVD(metric="none").factor({"fc": fc}, {})
    group, _ = group_of(fc, (2, 4))
    for rank in (None, 0, 4, True, 1.5):
        with pytest.raises(CallError, match=f"'rank' of svd on layer 'layer' must be between 1 and 3. Got {rank}"):
            SVD(rank=rank).cost(group)


@pytest.mark.parametrize("dead", [[2], [0, 1, 2]])
@pytest.mark.parametrize("metric", ["fisher", "mahalanobis"])
def test_groups_that_no_label_moves_get_a_low_rank_like_the_others(metric, dead):
    torch.manual_seed(0)
    conv = nn.Conv2d(12, 18, 3, groups=3)
    gradients = torch.randn(3, 40, 6)
    gradients[dead] = 0
    known = LayerStatistics(Weighting(full=torch.eye(36).expand(3, 36, 36)), OutputMoment(gradients.mT @ gradients))
    method = SVD(rank=4, metric=metric)
    built = method.rewrite({"c": conv}, method.factor({"c": conv}, {"c": known})).modules["c"]
    apart = product(built, 3) - conv.weight.detach().double().view(3, 6, -1)
    best = SVD(rank=4, metric="frobenius")
    nearest = product(best.rewrite({"c": conv}, best.factor({"c": conv}, {})).modules["c"], 3)
    torch.testing.assert_close(product(built, 3)[dead], nearest[dead], rtol=1e-4, atol=1e-5)
    assert apart.norm() < conv.weight.norm()

"""Tucker-2: costs by torch's counter, error beside tensorly's, damage by brute force."""

import pytest
import tensorly
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorly.decomposition import partial_tucker
from torch import nn

from methods.samples import check_costs, group_of, layers
from taut.decompose.outputs import OutputMoment
from taut.decompose.weighting import Weighting
from taut.errors import CallError
from taut.methods.low_rank.tucker import Tucker, max_ranks
from taut.structure.statistics import LayerStatistics


@given(layers(dims=(1, 2, 3)), st.data())
def test_cost_is_that_of_the_built_module(sample, data):
    module, size = sample
    group, x = group_of(module, size)
    if Tucker().refuses(group) is None:
        i, o = (data.draw(st.integers(1, limit)) for limit in max_ranks(group.layer))
        check_costs(Tucker(rank_in=i, rank_out=o), group, module, x)


@given(layers(dims=(1, 2, 3)))
def test_candidates_shrink(sample):
    module, size = sample
    group, _ = group_of(module, size)
    offered = Tucker().candidates(group, None) if Tucker().refuses(group) is None else []
    assert all(one.cost(group).lowers(group.cost) for one in offered)
    assert len({(one.rank_in, one.rank_out) for one in offered}) == len(offered)


def kernel(seq, groups=1):
    """The kernel (g, o, c, s) of the three layers in a row."""
    first, core, last = (layer.weight.detach().double() for layer in seq)
    i, o = len(first) // groups, len(core) // groups
    first = first.reshape(groups, i, -1)
    core = core.reshape(groups, o, i, -1)
    last = last.reshape(groups, -1, o)
    return torch.einsum("gpo,gois,gic->gpcs", last, core, first)


def error(conv, i, o):
    """Relative error of our kernel in the Frobenius norm, and the damage that was predicted."""
    method = Tucker(rank_in=i, rank_out=o, metric="frobenius")
    factors = method.factor({"c": conv}, {})
    W = conv.weight.detach()
    found = kernel(method.rewrite({"c": conv}, factors).modules["c"]).reshape(W.shape)
    return float((found - W).norm() / W.norm()), method.damage(factors)


def by_tensorly(W, i, o, sweeps):
    """Relative error of tensorly's partial Tucker on the channel modes."""
    W = W.numpy()
    (core, factors), _ = partial_tucker(W, rank=[o, i], modes=[0, 1], init="svd", n_iter_max=sweeps, tol=1e-9)
    found = tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 1])
    return float(tensorly.norm(found - W) / tensorly.norm(W))


def hosvd(W, i, o):
    """Relative error of the truncated higher-order SVD."""
    U = torch.linalg.svd(W.flatten(1), full_matrices=False)[0][:, :o]
    V = torch.linalg.svd(W.transpose(0, 1).flatten(1), full_matrices=False)[0][:, :i]
    return float((torch.einsum("oq,pq,pchw,cd,ed->oehw", U, U, W, V, V) - W).norm() / W.norm())


def spectrum(kind):
    """A kernel (16, 12, 3, 3) without structure, with decaying spectra, or of low rank with noise."""
    if kind == "gauss":
        return torch.randn(16, 12, 3, 3).double()
    rank = 16 if kind == "decay" else 5
    U, V = torch.randn(16, rank).double(), torch.randn(12, min(rank, 12)).double()
    core = torch.randn(rank, min(rank, 12), 3, 3).double()
    if kind == "decay":
        U, V = U * torch.logspace(0, -2, 16), V * torch.logspace(0, -2, 12)
    made = torch.einsum("oq,qrhw,cr->ochw", U, core, V)
    return made if kind == "decay" else made + 0.5 * torch.randn_like(made)


@pytest.mark.parametrize("kind", ["gauss", "decay", "noisy"])
@pytest.mark.parametrize(("i", "o"), [(1, 1), (3, 8), (6, 4), (5, 5), (10, 14), (12, 16)])
def test_error_beside_hosvd_and_tensorly(kind, i, o):
    """Never above the truncated HOSVD, and within 0.3 % of tensorly's 100 sweeps; the prediction is an upper bound."""
    conv = nn.Conv2d(12, 16, 3).double()
    conv.weight.data.copy_(spectrum(kind))
    ours, damage = error(conv, i, o)
    W = conv.weight.detach()
    assert ours**2 <= damage * (1 + 1e-6) + 1e-9
    assert damage <= 1.05 * ours**2 + 1e-9
    assert ours <= hosvd(W, i, o) * (1 + 1e-9) + 1e-7
    assert ours <= 1.003 * by_tensorly(W, i, o, 100) + 1e-7


@pytest.mark.parametrize("metric", ["data", "fisher"])
@pytest.mark.parametrize("groups", [1, 2])
def test_damage_is_that_of_the_kernel_which_is_built(metric, groups):
    conv = nn.Conv2d(8, 6, 3, groups=groups).double()
    k, o = 72 // groups, 6 // groups
    X, G = torch.randn(groups, 150, k).double(), torch.randn(groups, 20, o).double()
    stats = LayerStatistics(Weighting(full=X.mT @ X / 150), OutputMoment(G.mT @ G / 20), positions=5.0)
    W = conv.weight.detach().reshape(groups, o, k)
    for i, r in ((1, 1), (2, 3), (4, 1), (3, 2)):
        method = Tucker(rank_in=i, rank_out=r, metric=metric)
        factors = method.factor({"c": conv}, {"c": stats})
        dW = W - kernel(method.rewrite({"c": conv}, factors).modules["c"], groups).flatten(2)
        wrong = torch.einsum("gpo,gpi,gij,goj->", stats.outputs.full, dW, stats.weighting.regular(), dW)
        assert method.damage(factors) == pytest.approx(float(wrong) / 10, rel=1e-6, abs=1e-9)


def test_the_data_metric_beats_the_plain_one_on_the_data():
    conv = nn.Conv2d(8, 8, 3).double()
    X = torch.randn(1, 200, 72).double() * torch.logspace(1, -1, 72)
    stats = LayerStatistics(Weighting(full=X.mT @ X / 200))
    wrong = {}
    for metric in ("data", "frobenius"):
        method = Tucker(rank_in=3, rank_out=3, metric=metric)
        built = method.rewrite({"c": conv}, method.factor({"c": conv}, {"c": stats})).modules["c"]
        dW = conv.weight.detach().flatten(1) - kernel(built)[0].flatten(1)
        wrong[metric] = float((X[0] @ dW.T).square().sum())
    assert wrong["data"] < wrong["frobenius"]


def test_outer_factors_are_orthogonal_and_norms_even():
    conv = nn.Conv2d(8, 10, 3).double()
    stats = LayerStatistics(Weighting(full=torch.diag(torch.logspace(-3, 3, 72).double())[None]))
    method = Tucker(rank_in=4, rank_out=5)
    first, core, last = (
        layer.weight.detach()
        for layer in method.rewrite({"c": conv}, method.factor({"c": conv}, {"c": stats})).modules["c"]
    )
    for outer in (first.flatten(1), last.flatten(1).T):
        gram = outer @ outer.T
        torch.testing.assert_close(gram, torch.diag(gram.diagonal()), rtol=0, atol=1e-8 * float(gram.max()))
    torch.testing.assert_close(last.flatten(1).norm(dim=0), core.flatten(1).norm(dim=1))
    ratio = first.flatten(1).norm(dim=1) / core.transpose(0, 1).flatten(1).norm(dim=1)
    assert bool(((ratio > 1e-2) & (ratio < 1e2)).all())


def test_padding_stride_and_dilation_sit_in_the_core():
    group, _ = group_of(nn.Conv2d(4, 6, 3, 2, 1, dilation=2, bias=True), (2, 4, 9, 9))
    first, core, last = Tucker(rank_in=2, rank_out=3).skeleton(group)["layer"]
    assert (first.padding, first.stride, first.bias) == ((0, 0), (1, 1), None)
    assert (core.padding, core.stride, core.dilation, core.bias) == ((1, 1), (2, 2), (2, 2), None)
    assert (last.padding, last.stride, last.bias is None) == ((0, 0), (1, 1), False)


@pytest.mark.parametrize(
    ("layer", "size", "words"),
    [
        (nn.Conv2d(4, 4, 1), (2, 4, 5, 5), "kernel larger than 1"),
        (nn.Linear(4, 4), (2, 4), "kernel larger than 1"),
        (nn.Conv2d(4, 4, 3, groups=4), (2, 4, 5, 5), "one input or output per group"),
    ],
    ids=lambda v: repr(v) if isinstance(v, nn.Module) else "",
)
def test_what_is_refused(layer, size, words):
    group, _ = group_of(layer, size)
    assert words in Tucker().refuses(group)


def test_ranks_are_named_in_errors():
    group, _ = group_of(nn.Conv2d(4, 6, 3), (2, 4, 5, 5))
    with pytest.raises(CallError, match=r"'rank_out' of tucker on layer 'layer' must be between 1 and 6\. Got 7"):
        Tucker(rank_in=4, rank_out=7).cost(group)
    with pytest.raises(CallError, match=r"'rank_in' of tucker on layer 'layer' must be between 1 and 4\. Got None"):
        Tucker().cost(group)

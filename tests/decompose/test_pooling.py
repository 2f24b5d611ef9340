"""Moments of few rows and the mean of all: what fresh rows lose is less."""

import pytest
import torch

from taut.decompose.pooling import expected, few_of_all, mean_of, mixed, share_of_mean
from taut.decompose.svd import output_basis
from taut.decompose.weighting import Weighting

K, R = 16, 4


def experts(seed, own):
    """Roots of moments of a few experts, alike but for a share of their own."""
    random = torch.Generator().manual_seed(seed)
    common = torch.randn(K, K, generator=random, dtype=torch.float64) * torch.logspace(0, -2, K, dtype=torch.float64)
    return [common + own * torch.randn(K, K, generator=random, dtype=torch.float64) / K for _ in range(6)], random


def lost(W, A, truth):
    """What a low rank that is best for A loses of W on rows of the true moment."""
    up = output_basis(W[None, ..., None], Weighting(full=A[None].float()), None).up[0, :, :R].double()
    dW = W - up @ (up.T @ W)
    return float((dW @ truth * dW).sum())


@pytest.mark.parametrize("own", [0.0, 1.0])
@pytest.mark.parametrize("few", [3, 12])
def test_fresh_rows_lose_less(own, few):
    before = after = 0.0
    for seed in range(12):
        roots, random = experts(seed, own)
        rows = [float(few), *[600.0] * 5]
        seen = [
            torch.randn(int(n), K, generator=random, dtype=torch.float64) @ G.T
            for G, n in zip(roots, rows, strict=True)
        ]
        means = [x.T @ x / len(x) for x in seen]
        mean = mean_of(means, rows)
        W, truth = torch.randn(K, K, generator=random, dtype=torch.float64), roots[0] @ roots[0].T
        before += lost(W, means[0], truth)
        after += lost(W, mixed(means[0], mean, share_of_mean(means[0], rows[0], mean)), truth)
    assert after < before


def test_the_share_is_the_one_nearest_to_the_truth():
    shares, best = [], []
    for seed in range(40):
        roots, random = experts(seed, 1.0)
        truth = roots[0] @ roots[0].T
        mean = sum(G @ G.T for G in roots) / len(roots)
        x = torch.randn(30, K, generator=random, dtype=torch.float64) @ roots[0].T
        found = x.T @ x / len(x)
        shares.append(share_of_mean(found, 30, mean))
        off, way = truth - found, mean - found
        best.append(float((off * way).sum() / way.square().sum()))
    assert abs(sum(shares) - sum(best)) / len(best) < 0.1


def test_of_many_rows_nothing_and_of_none_all_is_the_mean():
    mean = torch.eye(K).double()
    assert share_of_mean(None, 0, mean) == 1
    assert torch.equal(mixed(None, mean, 1.0), mean)
    assert share_of_mean(3 * mean, 1e9, mean) < 1e-6
    assert share_of_mean(mean, 10, mean) == 1  # they are the same


def test_rows_of_all_have_the_mean_moment():
    random = torch.Generator().manual_seed(0)
    moments = [torch.randn(4000, 5, generator=random) * size for size in (1.0, 2.0)]
    few = few_of_all([*moments, moments[0][:0]], [0.25, 0.75, 0.0])
    wanted = 0.25 * moments[0].T @ moments[0] + 0.75 * moments[1].T @ moments[1]
    assert len(few) < 4000
    torch.testing.assert_close(few.T @ few, wanted, rtol=0.1, atol=0.1 * float(wanted.max()))


def test_what_was_never_seen_counts_like_the_mean():
    assert expected([0, 30, 60]) == pytest.approx([30, 30, 60 - 30 / 61])
    assert expected([1000, 3000])[0] == pytest.approx(1000, rel=1e-2)

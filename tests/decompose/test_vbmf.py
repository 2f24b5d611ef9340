"""Empirical variational Bayes: planted ranks, a dense search over the formulas as reference, what must not matter."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from taut.decompose.vbmf import evbmf, input_rank, output_rank
from taut.errors import CallError, ModelError


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def orthonormal(rows, columns):
    return torch.linalg.qr(randn(rows, columns))[0]


def planted(L, M, rank, strength=1.5, noise=1.0):
    """Noise, and `rank` directions of up to `strength` times its largest singular value, none far below."""
    size = strength * noise * (math.sqrt(L) + math.sqrt(M)) * torch.linspace(1, 0.9, rank).double()
    return (orthonormal(L, rank) * size) @ orthonormal(M, rank).T + noise * randn(L, M)


def objective(s, M, variances):
    """The source's formula for every one of `variances`."""
    a = len(s) / M
    t = 2.5129 * math.sqrt(a)
    edge = (1 + t) * (1 + a / t)
    x = s**2 / (M * variances[:, None])
    shifted = np.where(x > edge, x, edge) - (1 + a)
    tau = (shifted + np.sqrt(shifted**2 - 4 * a)) / 2
    signal = x - tau + np.log((tau + 1) / x) + a * np.log(tau / a + 1)
    return np.where(x > edge, signal, x - np.log(x)).sum(1), (x > edge).sum(1)


def searched(s, M, points=20_000):
    """Variance, value and rank by a dense search between the source's bounds, twice: whole, then around the best."""
    L = len(s)
    a = L / M
    t = 2.5129 * math.sqrt(a)
    edge = (1 + t) * (1 + a / t)
    j = min(math.ceil(L / (1 + a)) - 1, L)
    low, high = max(s[j] ** 2 / (M * edge), (s[j:] ** 2).mean() / M), (s**2).sum() / (L * M)
    for _ in range(2):
        grid = np.geomspace(low, high, points)
        values, ranks = objective(s, M, grid)
        best = int(values.argmin())
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, points - 1)]
    return grid[best], values[best], ranks[best]


@pytest.mark.parametrize(
    ("L", "M", "rank"), [(64, 256, 8), (64, 576, 16), (100, 100, 8), (100, 120, 16), (60, 2000, 0), (90, 90, 0)]
)
def test_planted_ranks_come_back(L, M, rank):
    found = evbmf(planted(L, M, rank))
    assert found.rank == rank
    assert found.variance == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("seed", range(50))
def test_a_dense_search_over_the_formulas_finds_nothing_better(seed):
    """Noise, planted directions strong and weak, and spectra that fall like a power."""
    torch.manual_seed(seed)
    L = int(torch.randint(2, 28, ()))
    M = L + int(torch.randint(0, 60, ()))
    W = planted(L, M, min(L, seed % 7), 0.4 + 0.1 * (seed % 13))
    if seed % 3 == 0:
        W = (orthonormal(L, L) * torch.arange(1, L + 1).double() ** (-0.2 * (1 + seed % 8))) @ orthonormal(M, L).T
    s = np.linalg.svd(W.numpy(), compute_uv=False)
    variance, value, rank = searched(s, M)
    found = evbmf(W)
    (ours,), (count,) = objective(s, M, np.array([found.variance]))
    assert ours <= value + 1e-9 * abs(value)
    assert found.variance == pytest.approx(variance, rel=1e-6)
    assert found.rank == rank == count


def test_of_several_local_minima_the_lowest_is_taken():
    """A spectrum with two steps: the objective has a minimum below each."""
    s = np.repeat([30.0, 3.0, 1.0], [3, 8, 29])
    M = 60
    W = (orthonormal(40, 40) * torch.from_numpy(s)) @ orthonormal(M, 40).T
    grid = np.geomspace(5e-3, 1.2, 20_000)
    values, _ = objective(s, M, grid)
    inside = values[1:-1]
    assert int(((inside < values[:-2]) & (inside < values[2:])).sum()) > 1
    variance, value, rank = searched(s, M)
    found = evbmf(W)
    assert (found.rank, found.variance) == (rank, pytest.approx(variance, rel=1e-6))
    assert objective(s, M, np.array([found.variance]))[0][0] <= value + 1e-9 * abs(value)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 5), st.floats(-8, 8), st.integers(0, 2**31))
def test_sides_rotation_and_scale_do_not_matter(m, n, rank, power, seed):
    torch.manual_seed(seed)
    W = planted(m, n, min(m, n, rank), 2.0)
    found = evbmf(W)
    assert 0 <= found.rank < max(1, m * n / (m + n)) <= min(m, n)
    scale = 10.0**power
    turned = orthonormal(m, m) @ W @ orthonormal(n, n)
    for other, factor in ((W.T, 1.0), (turned, 1.0), (scale * W, scale**2), (W.flip(0), 1.0)):
        again = evbmf(other)
        assert again.rank == found.rank
        assert again.variance == pytest.approx(factor * found.variance, rel=1e-6)


@given(st.integers(2, 30), st.integers(0, 60), st.data())
def test_without_noise_the_rank_is_the_matrix_rank(L, more, data):
    M = L + more
    rank = data.draw(st.integers(0, math.ceil(L * M / (L + M)) - 1))
    for dtype in (torch.float32, torch.float64):
        W = orthonormal(L, rank) @ orthonormal(M, rank).T
        assert evbmf(W.to(dtype)).rank == rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_zeros_single_rows_and_flat_spectra(dtype):
    assert (evbmf(torch.zeros(5, 7, dtype=dtype)).rank, evbmf(torch.zeros(5, 7, dtype=dtype)).variance) == (0, 0.0)
    row = torch.randn(1, 9).to(dtype)
    for single in (row, row.T):
        found = evbmf(single)
        assert (found.rank, found.variance) == (0, pytest.approx(float(row.double().square().mean())))
    assert evbmf(torch.eye(6, dtype=dtype)).rank == 0
    assert evbmf(torch.tensor([[3.0]], dtype=dtype)).rank == 0


@pytest.mark.parametrize("size", [1e-200, 1e-30, 1e30, 1e200])
def test_sizes_whose_squares_no_float_holds(size):
    assert evbmf(size * planted(40, 60, 5)).rank == 5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad):
    W = torch.ones(3, 4)
    W[1, 2] = bad
    with pytest.raises(ModelError, match="evbmf holds NaN or Inf"):
        evbmf(W)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (0, 3)])
def test_what_is_no_matrix_is_refused(shape):
    with pytest.raises(CallError, match="two sides above 0"):
        evbmf(torch.zeros(shape))


def test_kernels_by_unfolding_and_the_largest_group():
    """Output rank from o x (c s), input rank from c x (o s); of unequal groups the one that needs most."""
    core = 30 * randn(5, 9, 9)
    low = torch.einsum("oq,qrs,cr->ocs", orthonormal(40, 5), core, orthonormal(36, 9))
    wide = torch.einsum("oq,qrs,cr->ocs", orthonormal(40, 3), core[:3, :4], orthonormal(36, 4))
    W = torch.stack([wide, low, torch.zeros_like(low)]) + randn(3, 40, 36, 9)
    assert (input_rank(W[:1]), output_rank(W[:1])) == (4, 3)
    assert (input_rank(W), output_rank(W)) == (9, 5)
    assert output_rank(W[1:2]) == evbmf(W[1].flatten(1)).rank
    assert input_rank(W[1:2]) == evbmf(W[1].transpose(0, 1).flatten(1)).rank

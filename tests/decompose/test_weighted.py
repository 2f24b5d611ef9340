"""Weighted low rank: exact for separable weights, never worse than its start, and what the elementwise form is not."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from taut.decompose.weighted import weighted_error, weighted_low_rank
from taut.errors import CallError


def matrix(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(2, 9), st.integers(2, 9), st.integers(1, 4), st.integers(0, 99))
def test_separable_weights_give_the_weighted_svd(m, n, rank, seed):
    W, rows, columns = matrix(m, n, seed=seed), matrix(m, 1, seed=seed + 1).exp(), matrix(1, n, seed=seed + 2).exp()
    a = rows * columns
    U, V = weighted_low_rank(W, a, min(rank, m, n))
    tail = torch.linalg.svdvals(a * W)[min(rank, m, n) :]
    best = float(tail.norm() / (a * W).norm())
    assert weighted_error(W, a, U, V) == pytest.approx(best, rel=1e-5, abs=1e-6)


def test_better_than_the_separable_form_and_of_the_asked_rank():
    W, a = matrix(30, 20), matrix(30, 20, seed=1).exp()
    U, V = weighted_low_rank(W, a, 4)
    rows, columns = a.square().mean(1, keepdim=True).sqrt(), a.square().mean(0, keepdim=True).sqrt()
    u, s, vh = torch.linalg.svd(rows * W * columns, full_matrices=False)
    start = weighted_error(W, a, u[:, :4] * s[:4] / rows, vh[:4] / columns)
    assert weighted_error(W, a, U, V) < 0.98 * start
    assert torch.linalg.matrix_rank(U @ V) == 4


def test_the_elementwise_form_is_of_full_rank():
    W, a = matrix(40, 60), matrix(40, 60, seed=1).exp()
    u, s, vh = torch.linalg.svd(a * W, full_matrices=False)
    assert torch.linalg.matrix_rank((u[:, :4] * s[:4]) @ vh[:4] / a) == 40


def test_full_rank_is_exact_and_zero_weights_are_free():
    W, a = matrix(6, 5), torch.ones(6, 5, dtype=torch.float64)
    U, V = weighted_low_rank(W, a, 5)
    assert torch.allclose(U @ V, W, atol=1e-7)
    a[:, 2] = 0
    U, V = weighted_low_rank(W, a, 4)
    assert weighted_error(W, a, U, V) < 1e-3
    assert bool(torch.isfinite(U @ V).all())


@pytest.mark.parametrize("bad", [torch.ones(5, 6), -torch.ones(6, 5), torch.full((6, 5), float("nan"))])
def test_bad_weights_are_refused(bad):
    with pytest.raises(CallError, match="Weights of shape"):
        weighted_low_rank(matrix(6, 5), bad.double(), 2)

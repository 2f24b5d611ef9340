"""Tucker-2 by orthogonal iteration: orthonormal factors, the best core, never above the sequential HOSVD."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from taut.decompose.tucker import tucker2


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def product(V, core, U):
    return torch.einsum("gop,gprs,gcr->gocs", U, core, V)


def sequential(W, r_in, r_out):
    """Squared error of cutting the inputs by an SVD, then the outputs of what is left."""
    total = 0.0
    for kernel in W:
        V = torch.linalg.svd(kernel.transpose(0, 1).flatten(1), full_matrices=False)[0][:, :r_in]
        cut = torch.einsum("ocs,cr->ors", kernel, V)
        U = torch.linalg.svd(cut.flatten(1), full_matrices=False)[0][:, :r_out]
        total += float(kernel.square().sum() - torch.einsum("op,ors->prs", U, cut).square().sum())
    return total


@given(st.integers(1, 2), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.data())
def test_factors_are_orthonormal_the_core_is_best_and_the_error_below_the_sequential(g, o, c, s, data):
    W = randn(g, o, c, s)
    r_in = data.draw(st.integers(1, min(c, o * s)))
    r_out = data.draw(st.integers(1, min(o, c * s)))
    V, core, U = tucker2(W, r_in, r_out)
    assert (V.shape, core.shape, U.shape) == ((g, c, r_in), (g, r_out, r_in, s), (g, o, r_out))
    for basis in (V, U):
        eye = torch.eye(basis.shape[-1], dtype=torch.float64).expand(g, -1, -1)
        torch.testing.assert_close(basis.mT @ basis, eye, rtol=0, atol=1e-8)
    torch.testing.assert_close(core, torch.einsum("gop,gocs,gcr->gprs", U, W, V), rtol=0, atol=1e-8)
    error = float((W - product(V, core, U)).square().sum())
    assert error <= sequential(W, r_in, r_out) + 1e-8 * float(W.square().sum())


@pytest.mark.parametrize("groups", [1, 3])
def test_low_rank_and_full_rank_are_exact(groups):
    low = product(randn(groups, 20, 3), randn(groups, 2, 3, 9), randn(groups, 24, 2))
    torch.testing.assert_close(product(*tucker2(low, 3, 2)), low, rtol=0, atol=1e-6 * float(low.abs().max()))
    full = randn(groups, 6, 5, 4)
    torch.testing.assert_close(product(*tucker2(full, 5, 6)), full, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_and_rank_one_kernels_are_finite_in_their_dtype(dtype):
    rank_one = torch.einsum("o,c,s->ocs", randn(40), randn(30), randn(9))[None].to(dtype)
    for W in (torch.zeros(1, 40, 30, 9, dtype=dtype), rank_one):
        V, core, U = tucker2(W, 4, 5)
        assert {t.dtype for t in (V, core, U)} == {dtype}
        torch.testing.assert_close(product(V, core, U), W, rtol=0, atol=1e-3 * float(W.abs().max()) + 1e-12)


def test_sweeps_pay():
    """Without structure, alternating beats the sequential cut by a visible margin."""
    W = randn(1, 32, 24, 9)
    V, core, U = tucker2(W, 6, 5)
    error = float((W - product(V, core, U)).square().sum())
    assert error < 0.99 * sequential(W, 6, 5)

"""Nested input bases against explicit least squares, brute force at every rank, and known special cases."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from taut.decompose.outputs import OutputMoment
from taut.decompose.projection import input_basis, unexplained
from taut.decompose.weighting import Weighting


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def definite(g, k):
    X = randn(g, k, 2 * k)
    return X @ X.mT / k


def features(V, r, P):
    """M_r = V_r^T (x) I_P, (r P, F P)."""
    return torch.kron(V[:, :r].T.contiguous(), torch.eye(P, dtype=torch.float64))


def approximation(basis, r, g):
    """U_r M_r of one group, (o, F P)."""
    return basis.solve(r)[g].flatten(1) @ features(basis.V[g], r, basis.P)


SETTINGS = [(1, 6, 4, 3, 4), (2, 5, 3, 4, 3), (1, 4, 3, 6, 6), (1, 2, 5, 3, 5), (3, 7, 2, 2, 2)]
"""Groups, outputs, channels, offsets, features: channels alone (Tucker), or channels with one kernel axis (spatial)."""


@pytest.mark.parametrize(("g", "o", "c", "s", "F"), SETTINGS)
@pytest.mark.parametrize("response", [False, True])
def test_solve_is_least_squares_on_samples_with_that_moment(g, o, c, s, F, response):
    W, w = randn(g, o, c, s), Weighting(full=definite(g, c * s))
    basis = input_basis(W, w, F, definite(g, o) if response else None)
    assert c * s == F * basis.P
    for i in range(g):
        samples = np.linalg.cholesky(w.regular()[i].numpy()).T  # rows^T rows = A
        outputs = samples @ W[i].flatten(1).numpy().T
        for r in range(1, basis.V.shape[-1] + 1):
            seen = samples @ features(basis.V[i], r, basis.P).numpy().T
            wanted = np.linalg.lstsq(seen, outputs, rcond=None)[0].T
            np.testing.assert_allclose(basis.solve(r)[i].flatten(1).numpy(), wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("g", "o", "c", "s", "F"), SETTINGS)
@pytest.mark.parametrize("form", ["full", "channel", "none"])
def test_explained_and_unexplained_by_brute_force_at_every_rank(g, o, c, s, F, form):
    W, B = randn(g, o, c, s), definite(g, o)
    A = definite(g, c * s if form == "full" else c)
    w = Weighting(**({} if form == "none" else {form: A}))
    eye = torch.eye(c * s, dtype=torch.float64).reshape(1, c * s, c, s).expand(g, -1, -1, -1)
    A = w.gram(eye)  # the metric itself, ridge included
    basis = input_basis(W, w, F)
    for weigh in (None, B):
        left = unexplained(W, w, None if weigh is None else OutputMoment(weigh), basis)
        assert left.shape == (basis.V.shape[-1] + 1,)
        for r in range(len(left)):
            wanted = 0.0
            for i in range(g):
                flat = W[i].flatten(1)
                near = approximation(basis, r, i)
                moved = (flat - near) @ A[i] @ (flat - near).T
                wanted += float((moved if weigh is None else weigh[i] @ moved).trace())
                torch.testing.assert_close(basis.explained(r)[i], near @ A[i] @ flat.T, rtol=1e-7, atol=1e-7)
            assert float(left[r]) == pytest.approx(wanted, rel=1e-8, abs=1e-8 * float(left[0]))
    assert float(left[-1]) <= 1e-8 * float(left[0])  # all features: exact


@pytest.mark.parametrize(("c", "h", "v", "o"), [(4, 3, 3, 6), (2, 5, 2, 9), (6, 2, 3, 2)])
def test_spatial_without_a_metric_is_the_truncated_svd_of_the_unfolding(c, h, v, o):
    W = randn(1, o, c, h * v)
    basis = input_basis(W, Weighting(), c * h)
    unfolded = W[0].reshape(o, c * h, v).permute(1, 2, 0).reshape(c * h, v * o).numpy()
    Q, s, V = np.linalg.svd(unfolded, full_matrices=False)
    left = unexplained(W, Weighting(), None, basis)
    assert len(left) == min(c * h, v * o) + 1
    for r in range(len(left)):
        best = (Q[:, :r] * s[:r]) @ V[:r]
        found = approximation(basis, r, 0).reshape(o, c * h, v).permute(1, 2, 0).reshape(c * h, v * o)
        np.testing.assert_allclose(found.numpy(), best, atol=1e-7 * s[0])
        assert float(left[r]) == pytest.approx((s[r:] ** 2).sum(), rel=1e-8, abs=1e-9 * s[0] ** 2)


@pytest.mark.parametrize(("c", "s", "F"), [(4, 3, 4), (3, 6, 9), (3, 4, 3)])
@pytest.mark.parametrize("groups", [1, 2])
def test_channel_metric_is_the_full_one_of_uncorrelated_offsets(c, s, F, groups):
    W, A = randn(groups, 5, c, s), definite(groups, c)
    full = torch.stack([torch.kron(a, torch.eye(s, dtype=torch.float64)) for a in A])
    one, two = Weighting(channel=A), Weighting(full=full)
    found, wanted = input_basis(W, one, F), input_basis(W, two, F)
    torch.testing.assert_close(
        unexplained(W, one, None, found),
        unexplained(W, two, None, wanted),
        rtol=1e-8,
        atol=1e-8 * float(W.square().sum()),
    )
    for r in range(1, found.V.shape[-1] + 1):
        for g in range(groups):
            torch.testing.assert_close(approximation(found, r, g), approximation(wanted, r, g), rtol=1e-5, atol=1e-7)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_errors_fall_with_every_column(o, c, h, v):
    W, w = randn(1, o, c, h * v), Weighting(full=definite(1, c * h * v))
    left = unexplained(W, w, None, input_basis(W, w, c * h))
    assert bool((left[1:] <= left[:-1] + 1e-9 * left[0]).all())
    assert float(left[0]) == pytest.approx(w.energy(W), rel=1e-9)


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("form", ["full", "channel", "none"])
def test_weights_of_low_rank_are_met_exactly_at_their_rank(rank, form):
    o, c, s = 6, 5, 4
    W = torch.einsum("ros,rc->ocs", randn(rank, o, s), randn(rank, c))[None]
    A = definite(1, c * s if form == "full" else c)
    w = Weighting(**({} if form == "none" else {form: A}))
    basis = input_basis(W, w, c)
    assert bool(basis.V.isfinite().all())
    for r in range(max(rank, 1), basis.V.shape[-1] + 1):
        near = approximation(basis, r, 0)
        assert bool(near.isfinite().all())
        torch.testing.assert_close(near, W[0].flatten(1), rtol=0, atol=1e-5 * max(1.0, float(W.abs().max())))


def test_a_response_turns_the_basis_towards_outputs_that_matter():
    W, w = randn(1, 6, 5, 3), Weighting(full=definite(1, 15))
    B = torch.diag(torch.tensor([1e4, 1, 1, 1, 1, 1], dtype=torch.float64))[None]
    turned = unexplained(W, w, OutputMoment(B), input_basis(W, w, 5, B.sqrt()))
    plain = unexplained(W, w, OutputMoment(B), input_basis(W, w, 5))
    assert float(turned[1]) < float(plain[1])


def test_the_basis_is_stored_in_the_weights_dtype():
    W = torch.randn(1, 4, 3, 2)
    basis = input_basis(W, Weighting(full=definite(1, 6)), 3)
    assert {t.dtype for t in (basis.V, basis.Z)} == {torch.float32}
    assert basis.solve(2).dtype == torch.float64

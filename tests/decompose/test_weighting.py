"""Metrics on weights: every form against the matrix that it stands for."""

import numpy as np
import pytest
import torch

from taut.decompose.weighting import PROBES, RIDGE, Weighting


def moment(g, k, seed=0):
    X = torch.randn(g, 3 * k, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return X.mT @ X / (3 * k)


def lifted(A):
    """A with its documented ridge, by numpy."""
    A = A.double().numpy()
    mean = np.trace(A, axis1=-2, axis2=-1) / A.shape[-1]
    return A + RIDGE * mean[:, None, None] * np.eye(A.shape[-1])


def weight(g=2, o=5, c=4, s=3):
    return torch.randn(g, o, c, s, dtype=torch.float64)


def test_full_gram_whitened_and_energy():
    W, A = weight(), moment(2, 12)
    w = Weighting(full=A)
    flat = W.flatten(2).numpy()
    wanted = flat @ lifted(A) @ flat.transpose(0, 2, 1)
    np.testing.assert_allclose(w.gram(W).numpy(), wanted, rtol=1e-10)
    X = w.whitened(W)
    np.testing.assert_allclose((X @ X.mT).numpy(), wanted, rtol=1e-9)
    assert w.energy(W) == pytest.approx(np.trace(wanted, axis1=-2, axis2=-1).sum(), rel=1e-10)


def test_channel_equals_full_where_offsets_are_uncorrelated():
    W, A = weight(), moment(2, 4)
    full = torch.stack([torch.kron(a, torch.eye(3, dtype=torch.float64)) for a in A])
    torch.testing.assert_close(Weighting(channel=A).gram(W), Weighting(full=full).gram(W), rtol=1e-9, atol=1e-12)


def test_no_metric_is_the_frobenius_norm():
    W = weight()
    none = Weighting()
    assert not none.known
    assert none.energy(W) == pytest.approx(float(W.square().sum()))
    torch.testing.assert_close(none.gram(W), W.flatten(2) @ W.flatten(2).mT)
    with pytest.raises(ValueError, match="no full second moment"):
        none.regular()


@pytest.mark.parametrize("form", ["full", "channel", "sketch"])
def test_known_says_that_a_moment_is_held(form):
    assert Weighting(**{form: torch.ones(1, 2, 2)}).known


def test_sketch_is_its_rows_and_a_ridge_in_expectation():
    """X X^T = W (rows^T rows + lift G G^T) W^T; G G^T has mean I, its probes leave a relative error of sqrt(2 / p)."""
    k = 40
    W = torch.randn(1, 6, k, 1, dtype=torch.float64)
    rows = torch.randn(1, 16, k, dtype=torch.float64)
    found = Weighting(sketch=rows).gram(W)[0]
    flat = W[0, :, :, 0]
    lift = RIDGE * float(rows.square().sum()) / k
    exact = flat @ rows[0].T @ rows[0] @ flat.T
    torch.testing.assert_close(found, exact, rtol=0, atol=3 * lift * float(flat.square().sum(1).max()))
    torch.testing.assert_close((found - exact).trace() / lift, flat.square().sum(), rtol=0.4, atol=0)


def test_sketch_ridge_weighs_directions_that_no_row_saw():
    """Averaged over directions the probes' metric is the ridge's identity."""
    k = 30
    rows = torch.zeros(1, 4, k, dtype=torch.float64)
    rows[0, :, 0] = 5.0
    W = torch.eye(k, dtype=torch.float64).reshape(1, k, k, 1)
    unseen = Weighting(sketch=rows).gram(W)[0].diagonal()[1:]
    assert bool((unseen > 0).all())
    assert float(unseen.mean()) == pytest.approx(RIDGE * 100 / k, rel=4 * (2 / (min(k, PROBES) * k)) ** 0.5)


def test_unseen_directions_keep_some_weight():
    A = torch.zeros(1, 4, 4)
    A[0, 0, 0] = 1.0
    W = torch.zeros(1, 1, 4, 1)
    W[..., 3, 0] = 1.0
    assert Weighting(full=A).energy(W) == pytest.approx(RIDGE / 4)
    assert Weighting(full=torch.zeros(1, 4, 4)).energy(W) == pytest.approx(1.0)  # nothing known: the Frobenius norm

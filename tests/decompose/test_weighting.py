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


@pytest.mark.parametrize("beside", [None, 0.7])
def test_a_sketch_is_its_rows_and_what_lies_beside(beside):
    k = 40
    W = torch.randn(1, 6, k, 1, dtype=torch.float64)
    rows = torch.randn(1, 16, k, dtype=torch.float64)
    w = Weighting(sketch=rows, beside=None if beside is None else torch.tensor([beside]))
    flat, A = W[0, :, :, 0], rows[0].T @ rows[0] + (beside or 0.0) * torch.eye(k)
    lifted_A = A + RIDGE * A.trace() / k * torch.eye(k)
    torch.testing.assert_close(w.gram(W)[0], flat @ lifted_A @ flat.T, rtol=1e-5, atol=1e-6)
    assert w.energy(W) == pytest.approx(float((flat @ lifted_A @ flat.T).trace()), rel=1e-6)
    torch.testing.assert_close(w.squares()[0].double(), A.diagonal(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        w.diagonal().gram(torch.eye(k)[None, :, :, None])[0].diagonal(), A.diagonal() * 1.0001, rtol=1e-3, atol=1e-3
    )
    torch.testing.assert_close(w.part(0).gram(W), w.gram(W))


def test_a_whitened_sketch_is_its_gram_in_expectation():
    """Probes stand for the identity: their relative error is sqrt(2 / p)."""
    k = 40
    W, rows = torch.randn(1, 6, k, 1, dtype=torch.float64), torch.randn(1, 16, k, dtype=torch.float64)
    w = Weighting(sketch=rows, beside=torch.tensor([0.5]))
    X = w.whitened(W)
    assert X.shape == (1, 6, 16 + min(k, PROBES))
    torch.testing.assert_close(
        (X @ X.mT).diagonal(dim1=1, dim2=2), w.gram(W).diagonal(dim1=1, dim2=2), rtol=0.5, atol=0
    )


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_wide_moments_give_the_same_in_float32(scale, monkeypatch):
    """Products of wide moments are made in float32, whatever the size of the weight."""
    W, A = scale * weight(), moment(2, 12).float()
    exact = Weighting(full=A)
    wanted, energy, X = exact.gram(W), exact.energy(W), exact.whitened(W)
    monkeypatch.setattr("taut.decompose.weighting.WIDE", 4)
    w = Weighting(full=A)
    torch.testing.assert_close(w.gram(W) / scale**2, wanted / scale**2, rtol=1e-5, atol=1e-5)
    assert w.energy(W) == pytest.approx(energy, rel=1e-5)
    torch.testing.assert_close(w.whitened(W) / scale, X / scale, rtol=1e-4, atol=1e-5)


def test_handy_is_the_channels_of_a_wide_convolution(monkeypatch):
    A = moment(2, 12)
    assert Weighting(full=A).handy(4).full is A
    monkeypatch.setattr("taut.decompose.weighting.WIDE", 4)
    wanted = torch.einsum("gcsds->gcd", A.reshape(2, 4, 3, 4, 3)) / 3
    torch.testing.assert_close(Weighting(full=A).handy(4).channel, wanted)
    assert Weighting(full=A).handy(12).full is A  # a matrix product


def test_unseen_directions_keep_some_weight():
    A = torch.zeros(1, 4, 4)
    A[0, 0, 0] = 1.0
    W = torch.zeros(1, 1, 4, 1)
    W[..., 3, 0] = 1.0
    assert Weighting(full=A).energy(W) == pytest.approx(RIDGE / 4)
    assert Weighting(full=torch.zeros(1, 4, 4)).energy(W) == pytest.approx(1.0)  # nothing known: the Frobenius norm

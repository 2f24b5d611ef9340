"""Small dense algebra against torch.linalg and numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from taut import TautError
from taut.decompose.linalg import add_gram, cholesky, left_basis, metric_factor, mirrored, ridge, root, spectrum


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def matrix(kind, m, n):
    """A (2, m, n) stack of the given kind."""
    if kind == "zero":
        return torch.zeros(2, m, n, dtype=torch.float64)
    if kind == "deficient":
        r = max(1, min(m, n) // 3)
        return randn(2, m, r) @ randn(2, r, n)
    return randn(2, m, n)


@pytest.mark.parametrize("kind", ["full", "deficient", "zero"])
@pytest.mark.parametrize(("m", "n"), [(5, 12), (12, 5), (7, 7), (1, 6), (6, 1)])
def test_left_basis_is_that_of_a_full_svd(kind, m, n):
    X = matrix(kind, m, n)
    U, energy = left_basis(X)
    Q, s, _ = torch.linalg.svd(X, full_matrices=False)
    assert U.shape == (2, m, min(m, n))
    assert energy.shape == (2, min(m, n))
    top = float(s.max()) ** 2
    torch.testing.assert_close(energy, s.square(), rtol=1e-10, atol=1e-13 * top + 1e-300)
    for g in range(2):
        for r in range(1, min(m, n) + 1):
            if r == min(m, n) or s[g, r - 1] > 1.001 * s[g, r]:
                wanted = Q[g, :, :r] @ Q[g, :, :r].T @ X[g]
                found = U[g, :, :r] @ U[g, :, :r].T @ X[g]
                torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6 * top**0.5 + 1e-300)


@pytest.mark.parametrize(("m", "n"), [(5, 12), (12, 5)])
def test_left_basis_columns_are_orthonormal_even_where_nothing_is_left(m, n):
    for kind in ("full", "deficient", "zero"):
        U, energy = left_basis(matrix(kind, m, n))
        gram = U.mT @ U
        torch.testing.assert_close(gram, torch.eye(min(m, n)).double().expand_as(gram), rtol=0, atol=1e-7)
        assert bool((energy[..., :-1] >= energy[..., 1:]).all())
        assert bool((energy >= 0).all())


def test_large_tall_matrices_have_orthonormal_columns_too(monkeypatch):
    """Eigenvectors in float32 from LARGE on: all directions together must still give the matrix back."""
    monkeypatch.setattr("taut.decompose.linalg.LARGE", 8)
    X = randn(1, 60, 40) * torch.logspace(0, -6, 40)
    U, _ = left_basis(X)
    gram = U.mT @ U
    torch.testing.assert_close(gram, torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1)), rtol=0, atol=1e-3)
    assert float(gram.diagonal(dim1=-2, dim2=-1).max()) < 1 + 1e-3
    torch.testing.assert_close(U @ (U.mT @ X), X, rtol=0, atol=1e-3 * float(X.abs().max()))


def test_large_matrices_keep_their_dominant_directions(monkeypatch):
    X = randn(2, 30, 60) * torch.logspace(0, -3, 60)
    exact, energy = left_basis(X)
    monkeypatch.setattr("taut.decompose.linalg.LARGE", 8)
    for Y in (X, X.mT):
        U, rough = left_basis(Y)
        torch.testing.assert_close(rough, energy, rtol=0, atol=1e-5 * float(energy.max()))
        if Y is X:
            near, wanted = (basis[..., :8] @ basis[..., :8].mT @ X for basis in (U, exact))
            torch.testing.assert_close(near, wanted, rtol=0, atol=1e-3 * float(X.abs().max()))


def test_left_basis_keeps_every_group_apart():
    X = torch.stack([randn(4, 9), torch.zeros(4, 9, dtype=torch.float64), 1e6 * randn(4, 9)])
    _, together = left_basis(X)
    for g in range(3):
        torch.testing.assert_close(together[g : g + 1], left_basis(X[g : g + 1])[1], rtol=1e-12, atol=0)


def test_spectrum_is_descending_and_never_negative():
    X = randn(2, 6, 3)
    U, values = spectrum(X @ X.mT)
    wanted = np.linalg.eigvalsh((X @ X.mT).numpy())[:, ::-1].clip(min=0)
    np.testing.assert_allclose(values.numpy(), wanted, rtol=1e-10, atol=1e-12)
    assert bool((values >= 0).all())
    torch.testing.assert_close(U * values[:, None] @ U.mT, X @ X.mT, rtol=1e-10, atol=1e-12)


@given(st.integers(1, 8), st.floats(1e-8, 1.0), st.floats(1e-20, 1e20))
def test_ridge_adds_its_share_of_the_mean_eigenvalue(k, share, scale):
    X = randn(2, k, k)
    A = scale * (X @ X.mT)
    mean = np.linalg.eigvalsh(A.numpy()).mean(-1)
    for g in range(2):
        wanted = A[g] + share * mean[g] * torch.eye(k, dtype=torch.float64)
        torch.testing.assert_close(ridge(A, share)[g], wanted, rtol=1e-9, atol=1e-12 * scale)


def test_ridge_of_zero_is_the_identity_group_by_group():
    A = torch.stack([torch.zeros(3, 3), torch.eye(3)])
    torch.testing.assert_close(ridge(A, 0.5), torch.stack([torch.eye(3), 1.5 * torch.eye(3)]).double())


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_cholesky_of_a_definite_matrix(scale):
    X = randn(2, 6, 9)
    A = scale * (X @ X.mT)
    L = cholesky(A)
    assert torch.equal(L, L.tril())
    torch.testing.assert_close(L @ L.mT, A, rtol=1e-9, atol=1e-9 * scale)
    torch.testing.assert_close(L, torch.linalg.cholesky(A), rtol=1e-6, atol=1e-9 * scale**0.5)


def test_cholesky_of_singular_slightly_indefinite_and_zero_matrices():
    X = randn(1, 8, 2)
    singular = X @ X.mT
    indefinite = singular - 1e-9 * torch.eye(8)  # what float32 sums leave of a singular second moment
    zero = torch.zeros_like(singular)
    L = cholesky(torch.cat([singular, indefinite, zero]))
    assert bool(L.isfinite().all())
    assert bool((L.diagonal(dim1=-2, dim2=-1) > 0).all())
    top = float(singular.diagonal(dim1=-2, dim2=-1).mean())
    for g, wanted in enumerate((singular, indefinite)):
        torch.testing.assert_close((L @ L.mT)[g : g + 1], wanted, rtol=0, atol=1e-6 * top)
    torch.testing.assert_close(L[2], torch.eye(8, dtype=torch.float64))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_cholesky_gives_up_on_values_that_are_not_finite(monkeypatch, value):
    tries = []

    def factor(A):
        tries.append(A)
        if len(tries) > 1000:
            pytest.fail("it never ends")
        return original(A)

    original = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", factor)
    with pytest.raises((TautError, torch.linalg.LinAlgError)):
        cholesky(torch.full((1, 3, 3), value))
    assert len(tries) < 1000


def test_root_and_its_inverse():
    X = randn(3, 5, 11)
    A = X @ X.mT
    half, inverse = root(A)
    torch.testing.assert_close(half @ half, A, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(half @ inverse, torch.eye(5).double().expand(3, 5, 5), rtol=0, atol=1e-9)
    torch.testing.assert_close(half, half.mT, rtol=0, atol=1e-12)


def test_the_factor_of_a_metric_and_its_inverse():
    X = randn(3, 5, 11)
    A = X @ X.mT
    P, inverse = metric_factor(A)
    torch.testing.assert_close(P.mT @ P, A, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(P @ inverse, torch.eye(5).double().expand(3, 5, 5), rtol=0, atol=1e-9)
    lone = X[:1, :, :1] @ X[:1, :, :1].mT
    P, inverse = metric_factor(lone)
    assert bool(inverse.isfinite().all())
    torch.testing.assert_close(P.mT @ P, lone, rtol=1e-6, atol=1e-6)


def test_root_of_singular_and_zero_is_finite():
    X = randn(1, 5, 1)
    for A in (X @ X.mT, torch.zeros(1, 5, 5)):
        half, inverse = root(A)
        assert bool(half.isfinite().all())
        assert bool(inverse.isfinite().all())
        torch.testing.assert_close(half @ half, A.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("k", [5, 300])
def test_running_sums_of_products(k):
    """Small ones as a whole, large ones by the lower triangle."""
    S, wanted = torch.zeros(2, k, k), torch.zeros(2, k, k, dtype=torch.float64)
    for weight in (1.0, 2.5):
        X = torch.randn(2, 40, k)
        add_gram(S, X, weight)
        wanted += weight * (X.double().mT @ X.double())
    found = mirrored(S)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-3)
    assert torch.equal(found, found.mT)

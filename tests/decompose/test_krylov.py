"""Leading eigenvectors by block Lanczos against a dense eigensolver in float64."""

from functools import cache

import pytest
import torch

from taut.decompose.krylov import leading
from taut.decompose.linalg import left_basis, spectrum
from taut.decompose.svd import output_basis
from taut.decompose.weighting import Weighting


@cache
def decaying(m, n, alpha, seed=0):
    """Singular values i^-alpha, random bases, Frobenius norm 1."""
    random = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(size, min(m, n), generator=random, dtype=torch.float64))[0] for size in (m, n))
    s = torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** -alpha
    W = (U * s) @ V.mT
    return W / W.norm()


def left_out(W, U):
    return float((W - U @ (U.mT @ W)).norm())


@cache
def singular(W):
    return torch.linalg.svdvals(W.double())


def best(W, rank):
    return float(singular(W)[rank:].norm())


N = 528


def spread(values):
    random = torch.Generator().manual_seed(1)
    Q = torch.linalg.qr(torch.randn(N, N, generator=random, dtype=torch.float64))[0]
    return Q @ torch.diag(values) @ Q.mT


def gaussian(n):
    G = torch.randn(N, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return G @ G.mT


INDEX = torch.arange(1, N + 1).double()
MOMENTS = {
    "gaussian": lambda: gaussian(N),
    "wide gaussian": lambda: gaussian(9 * N),
    "slow": lambda: spread(INDEX**-0.3),
    "steep": lambda: spread(INDEX**-2),
    "linear": lambda: spread(torch.linspace(1, 0.01, N).double()),
    "identity": lambda: torch.eye(N, dtype=torch.float64),
    "projector": lambda: torch.diag((INDEX <= 100).double()),
    "levels": lambda: torch.diag(1 + 3 * (INDEX <= 100).double() + 5 * (INDEX <= 40).double()),
    "one live channel": lambda: torch.diag((INDEX == 1).double()),
    "three live channels": lambda: torch.diag((INDEX <= 3).double() * INDEX),
}


@pytest.mark.parametrize("kind", MOMENTS)
def test_it_is_the_dense_solver_s_answer_or_none(kind):
    """Flat, degenerate and nearly empty spectra: what does not converge is never given out as converged."""
    S = MOMENTS[kind]()
    exact = torch.linalg.eigvalsh(S).flip(0)
    given = 0
    for rank in (1, 17, 19, 34, 49, 88):
        found = leading(S.matmul, S, rank, float(S.trace()))
        if found is None:
            continue
        given += 1
        U, values = found
        torch.testing.assert_close(U.mT @ U, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-10)
        captured = (U.mT @ S @ U).diagonal()
        torch.testing.assert_close(captured.sum(), values.sum(), rtol=1e-9, atol=0)
        missed = float(exact[:rank].sum() - captured.sum())
        assert missed <= 2e-5 * float(exact[rank:].clamp_min(0).sum()) + 1e-12 * float(S.trace())
    assert given >= 1


@pytest.mark.parametrize("rank", [3, 40, 85])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 1.0])
def test_it_leaves_out_no_more_than_the_truncated_svd(alpha, rank):
    W = decaying(512, 700, alpha)
    U, values = left_basis(W[None], rank)
    assert left_out(W, U[0]) <= best(W, rank) * (1 + 5e-6)
    squares = singular(W).square()
    assert abs(float(values.sum() - squares[:rank].sum())) <= 1e-5 * float(squares[rank:].sum())


def test_too_many_directions_are_refused():
    S = torch.eye(100)
    with pytest.raises(ValueError, match="too many"):
        leading(S.matmul, S, 60, 100.0)


def test_a_steep_spectrum_in_float32_is_resolved_in_float64():
    W = spread(10 ** (-INDEX / 12)).float()
    U, _ = left_basis(W[None], 64)
    assert left_out(W.double(), U[0]) <= best(W, 64) * (1 + 1e-4)


def test_in_float32_it_is_as_good_as_a_float32_svd():
    W = decaying(600, 900, 0.5).float()
    found = leading(lambda X: W @ (W.mT @ X), W, 60, 1.0)
    assert found is not None
    assert found[0].dtype == torch.float64
    assert left_out(W.double(), found[0]) <= best(W, 60) * (1 + 1e-5)


def test_exact_low_rank_and_zero_matrices_end_at_once():
    W = decaying(520, 20, 0.3) @ decaying(20, 530, 0.0)
    calls = []

    def product(X):
        calls.append(len(X))
        return W @ (W.mT @ X)

    U, values = leading(product, W, 60, float(W.square().sum()))
    assert left_out(W, U) < 1e-12
    assert float(values[20:].sum()) < 1e-15
    assert len(calls) < 40
    U, values = leading(lambda X: X * 0, W, 60, 0.0)
    assert bool(torch.isfinite(U).all())
    assert float(values.sum()) == 0


@cache
def every_direction(m, n):
    """Two matrices, and all their directions by the dense solvers."""
    X = torch.stack([decaying(m, n, 0.5, seed) for seed in (0, 1)])
    return X, left_basis(X), spectrum(X @ X.mT)


@pytest.mark.parametrize("rank", [5, 80, 300])
@pytest.mark.parametrize(("m", "n"), [(540, 620), (620, 540)])
def test_a_rank_gives_the_first_directions_of_all(m, n, rank):
    """Few by Lanczos, many by the dense solver: the same subspaces, for every group."""
    X, bases, spectra = every_direction(m, n)
    for (U, values), (every, exact) in ((left_basis(X, rank), bases), (spectrum(X @ X.mT, rank), spectra)):
        assert (U.shape, values.shape) == ((2, m, rank), (2, rank))
        torch.testing.assert_close(values.sum(-1), exact[:, :rank].sum(-1), rtol=1e-5, atol=0)
        for x, mine, theirs in zip(X, U, every[..., :rank], strict=True):
            assert left_out(x, mine) <= left_out(x, theirs) * (1 + 5e-6)


@pytest.mark.parametrize("rank", [8, 80, 200])
def test_the_output_basis_of_a_rank_serves_that_rank(rank):
    W = decaying(512, 1024, 0.5).float().reshape(1, 512, 256, 4)
    A = torch.randn(2000, 1024, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for weighting in (Weighting(), Weighting(full=(A.mT @ A / 2000)[None]), Weighting(sketch=A[None] / 2000**0.5)):
        found, every = output_basis(W, weighting, rank=rank), output_basis(W, weighting)
        assert found.up.shape == (1, 512, rank)
        torch.testing.assert_close(found.energy.sum(), every.energy[:, :rank].sum(), rtol=1e-5, atol=0)

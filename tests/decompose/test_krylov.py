"""Leading eigenvectors by block Lanczos against a dense eigensolver in float64."""

import pytest
import torch

from taut.decompose.krylov import leading
from taut.decompose.linalg import left_basis, spectrum
from taut.decompose.svd import output_basis
from taut.decompose.weighting import Weighting


def decaying(m, n, alpha, seed=0):
    """Singular values i^-alpha, random bases, Frobenius norm 1."""
    random = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(size, min(m, n), generator=random, dtype=torch.float64))[0] for size in (m, n))
    s = torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** -alpha
    W = (U * s) @ V.mT
    return W / W.norm()


def left_out(W, U):
    return float((W - U @ (U.mT @ W)).norm())


def best(W, rank):
    return float(torch.linalg.svdvals(W.double())[rank:].norm())


@pytest.mark.parametrize("rank", [3, 40, 85])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 1.0])
def test_it_leaves_out_no_more_than_the_truncated_svd(alpha, rank):
    W = decaying(512, 700, alpha)
    U, values = leading(lambda X: W @ (W.mT @ X), W, rank, 1.0)
    torch.testing.assert_close(U.mT @ U, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-10)
    assert left_out(W, U) <= best(W, rank) * (1 + 5e-6)
    assert bool((values[:-1] >= values[1:]).all())
    exact = torch.linalg.svdvals(W)[:rank].square()
    torch.testing.assert_close(values.sum(), exact.sum(), rtol=1e-5, atol=0)


def test_in_float32_it_is_as_good_as_a_float32_svd():
    W = decaying(600, 900, 1.0).float()
    U, _ = leading(lambda X: W @ (W.mT @ X), W, 60, 1.0)
    assert U.dtype == torch.float64
    assert left_out(W.double(), U) <= best(W, 60) * (1 + 1e-5)


def test_exact_low_rank_and_zero_matrices_end_at_once():
    W = decaying(520, 20, 0.3) @ decaying(20, 530, 0.0)
    calls = []

    def product(X):
        calls.append(len(X))
        return W @ (W.mT @ X)

    U, values = leading(product, W, 60, float(W.square().sum()))
    assert left_out(W, U) < 1e-12
    torch.testing.assert_close(U.mT @ U, torch.eye(60, dtype=torch.float64), rtol=0, atol=1e-8)
    assert float(values[20:].sum()) < 1e-15
    assert len(calls) < 20
    U, values = leading(lambda X: X * 0, W, 60, 0.0)
    assert bool(torch.isfinite(U).all())
    assert float(values.sum()) == 0


@pytest.mark.parametrize("rank", [5, 80, 300])
@pytest.mark.parametrize(("m", "n"), [(540, 620), (620, 540)])
def test_a_rank_gives_the_first_directions_of_all(m, n, rank):
    """Few by Lanczos, many by the dense solver: the same subspaces, for every group."""
    X = torch.stack([decaying(m, n, 0.5, seed) for seed in (0, 1)])
    for (U, values), (every, exact) in (
        (left_basis(X, rank), left_basis(X)),
        (spectrum(X @ X.mT, rank), spectrum(X @ X.mT)),
    ):
        assert (U.shape, values.shape) == ((2, m, rank), (2, rank))
        torch.testing.assert_close(values.sum(-1), exact[:, :rank].sum(-1), rtol=1e-5, atol=0)
        for x, mine, theirs in zip(X, U, every[..., :rank], strict=True):
            assert left_out(x, mine) <= left_out(x, theirs) * (1 + 5e-6)


@pytest.mark.parametrize("rank", [8, 80, 200])
def test_the_output_basis_of_a_rank_serves_that_rank(rank):
    W = decaying(512, 1024, 0.5).float().reshape(1, 512, 256, 4)
    A = torch.randn(2000, 1024, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for weighting in (Weighting(), Weighting(full=(A.mT @ A / 2000)[None]), Weighting(sketch=A / 2000**0.5)):
        found, every = output_basis(W, weighting, rank=rank), output_basis(W, weighting)
        assert found.up.shape == (1, 512, rank)
        torch.testing.assert_close(found.energy.sum(), every.energy[:, :rank].sum(), rtol=1e-5, atol=0)

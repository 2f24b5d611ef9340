"""One weight, several uses: directions that lose little at all of them together."""

import pytest
import torch

from taut.decompose.tied import Use, lost, nearest, shared_directions

WORDS, WIDTH = 60, 8


def spread(seed, size=WIDTH):
    """A positive definite matrix of widely different eigenvalues."""
    random = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(size, size, generator=random, dtype=torch.float64))[0]
    return (Q * torch.logspace(0, -3, size, dtype=torch.float64)) @ Q.T


def uses(seed):
    """Of an embedding, whose rows matter by how often they are read, and of a head, whose columns do by its inputs."""
    random = torch.Generator().manual_seed(seed)
    W = torch.randn(WORDS, WIDTH, generator=random, dtype=torch.float64)
    reads = torch.rand(WORDS, generator=random, dtype=torch.float64).pow(6)
    eye = torch.eye(WIDTH, dtype=torch.float64)
    return W, [(reads.diag(), eye), (torch.eye(WORDS, dtype=torch.float64) / 8, spread(seed))]


def losses(W, pairs, basis, rank):
    """What every use loses, by its definition."""
    up, down = basis.up[0, :, :rank], basis.down[0, :rank]
    dW = W - W @ down.T @ up.T
    return [float((M * (dW.T @ R @ dW)).sum()) for R, M in pairs]


def directions(W, pairs):
    return shared_directions([Use(W.T @ R @ W, M) for R, M in pairs])


def test_what_is_lost_is_told_for_every_rank():
    W, pairs = uses(0)
    basis = directions(W, pairs)
    turned, up = W @ basis.down[0].T, basis.up[0]
    told = [lost(turned.T @ R @ turned, up.T @ M @ up) for R, M in pairs]
    for rank in range(WIDTH + 1):
        for value, wanted in zip(told, losses(W, pairs, basis, rank), strict=True):
            assert float(value[rank]) == pytest.approx(wanted, abs=1e-9)


def test_of_one_use_they_are_the_best():
    W, (_, pair) = uses(1)
    R, M = pair
    basis = directions(W, [pair])
    values = torch.linalg.svdvals(R.sqrt() @ W @ torch.linalg.cholesky(M))
    for rank in range(1, WIDTH):
        assert losses(W, [pair], basis, rank)[0] == pytest.approx(float(values[rank:].square().sum()), rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_of_two_uses_they_lose_less_than_those_of_either(seed):
    W, pairs = uses(seed)
    both, *alone = (directions(W, some) for some in (pairs, pairs[:1], pairs[1:]))
    for rank in (2, 4, 6):
        best = min(sum(losses(W, pairs, one, rank)) for one in alone)
        assert sum(losses(W, pairs, both, rank)) < best


def test_products_that_are_one_are_found_again():
    C, M = spread(1), spread(2)
    found = nearest([Use(C, M), Use(3 * C, M / 2)])
    wanted = torch.kron(C, M)
    product = torch.kron(*found)
    torch.testing.assert_close(product / product.norm(), wanted / wanted.norm())


def test_a_weight_of_zeros_has_directions_too():
    zeros = torch.zeros(3, 3, dtype=torch.float64)
    basis = shared_directions([Use(zeros, torch.eye(3, dtype=torch.float64))] * 2)
    assert bool(basis.up.isfinite().all() and basis.down.isfinite().all())

"""Sums of rank-1 terms: planted ones found, beside tensorly's, fitted together no worse than one after the other."""

import math

import pytest
import tensorly
import torch
from tensorly.decomposition import parafac

from taut.decompose.cp import compose, cp, greedy, levelled

SIZES = {2: (7, 5), 3: (6, 5, 7), 4: (4, 3, 5, 4)}


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(n, sizes, rank, seed=0):
    return compose([randn(n, size, rank, seed=seed + place) for place, size in enumerate(sizes)])


def errors(T, factors):
    """Relative error of every tensor of the stack."""
    left = (T - compose(factors)).flatten(1).norm(dim=1)
    return left / T.flatten(1).norm(dim=1)


def by_tensorly(T, rank):
    """Relative error of tensorly's parafac from singular vectors, tensor by tensor."""
    found = []
    for one in T:
        made = parafac(one.numpy(), rank, n_iter_max=200, init="svd", tol=1e-8, random_state=0)
        found.append(float(tensorly.norm(tensorly.cp_to_tensor(made) - one.numpy()) / one.norm()))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("modes", SIZES)
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_planted_terms_are_found(modes, rank, seed):
    """Down to rounding; the sweeps of the default stop earlier, where one is worth less than its `tol`."""
    T = planted(2, SIZES[modes], rank, seed)
    assert float(errors(T, cp(T, rank, sweeps=1000, tol=1e-9)).max()) <= 1e-6
    assert float(errors(T, cp(T, rank)).max()) <= 1e-4


@pytest.mark.filterwarnings("ignore:Trying to compute SVD:UserWarning")  # tensorly's, of more terms than a side
@pytest.mark.parametrize("rank", [1, 2, 4, 6])
@pytest.mark.parametrize("kind", ["gauss", "noisy"])
@pytest.mark.parametrize("sizes", [(8, 9, 12), (4, 25, 10), (5, 4, 3, 6)])
def test_error_beside_tensorly(sizes, kind, rank):
    T = randn(3, *sizes) if kind == "gauss" else planted(3, sizes, 3) + 0.7 * randn(3, *sizes, seed=9)
    assert bool((errors(T, cp(T, rank)) <= 1.01 * by_tensorly(T, rank) + 1e-7).all())


@pytest.mark.parametrize("rank", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("modes", SIZES)
def test_together_is_no_worse_than_one_after_the_other(modes, rank):
    """To 3e-8 where the terms suffice for an exact fit: the updates solve with squares, which resolve no less."""
    for seed in range(3):
        T = randn(3, *SIZES[modes], seed=seed)
        assert bool((errors(T, cp(T, rank)) <= 1.01 * errors(T, greedy(T, rank)) + 3e-8).all())


def test_together_pays():
    """On kernels of eight terms and noise the margin is large, not only its sign right."""
    T = planted(4, (8, 9, 16), 8)
    T += 0.2 * T.std() * randn(4, 8, 9, 16, seed=9)
    assert float(errors(T, cp(T, 8)).mean()) < 0.8 * float(errors(T, greedy(T, 8)).mean())


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_two_modes_are_an_svd(rank):
    T = randn(3, 7, 5)
    best = torch.linalg.svdvals(T)[:, rank:].square().sum(1).sqrt() / T.flatten(1).norm(dim=1)
    for method in (cp, greedy):
        torch.testing.assert_close(errors(T, method(T, rank)), best, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", [cp, greedy])
def test_more_terms_never_fit_worse(method):
    T = randn(2, 6, 5, 7)
    found = torch.stack([errors(T, method(T, rank)) for rank in range(1, 7)])
    assert bool((found[1:] <= found[:-1] * 1.001).all())


@pytest.mark.parametrize("modes", SIZES)
def test_compose_is_the_sum_of_outer_products(modes):
    factors = [randn(2, size, 3, seed=place) for place, size in enumerate(SIZES[modes])]
    wanted = torch.zeros(2, *SIZES[modes], dtype=torch.float64)
    for n in range(2):
        for k in range(3):
            term = torch.ones((), dtype=torch.float64)
            for factor in factors:
                term = torch.tensordot(term, factor[n, :, k], 0)
            wanted[n] += term
    torch.testing.assert_close(compose(factors), wanted)


@pytest.mark.parametrize("modes", SIZES)
def test_levelled_keeps_the_product_and_evens_the_norms(modes):
    factors = [10.0**place * randn(2, size, 3, seed=place) for place, size in enumerate(SIZES[modes])]
    even = levelled(factors)
    torch.testing.assert_close(compose(even), compose(factors))
    norms = torch.stack([factor.norm(dim=1) for factor in even])
    torch.testing.assert_close(norms, norms[:1].expand_as(norms))


def test_levelled_turns_a_term_that_is_zero_in_one_mode_to_zero():
    A, B = randn(1, 4, 2), randn(1, 3, 2)
    A[..., 1] = 0
    even = levelled([A, B])
    torch.testing.assert_close(compose(even), compose([A, B]))
    assert all(float(factor[..., 1].abs().max()) == 0 for factor in even)


@pytest.mark.parametrize("modes", SIZES)
def test_the_terms_of_cp_have_even_norms(modes):
    norms = torch.stack([factor.norm(dim=1) for factor in cp(randn(2, *SIZES[modes]), 2)])
    torch.testing.assert_close(norms, norms[:1].expand_as(norms))


@pytest.mark.parametrize("method", [cp, greedy])
@pytest.mark.parametrize("modes", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zeros_give_zeros_alone_and_beside_others(method, modes, dtype):
    T = torch.stack([torch.zeros(SIZES[modes]), *planted(1, SIZES[modes], 2).float()]).to(dtype)
    factors = method(T, 3)
    assert {factor.dtype for factor in factors} == {dtype}
    assert [tuple(factor.shape) for factor in factors] == [(2, size, 3) for size in SIZES[modes]]
    assert all(bool(factor.isfinite().all()) for factor in factors)
    assert float(compose(factors)[0].abs().max()) <= 1e-12
    alone = compose(method(T[1:], 3))
    assert float((alone[0] - T[1]).norm() / T[1].norm()) < (1e-3 if method is cp else 1)


@pytest.mark.parametrize("method", [cp, greedy])
@pytest.mark.parametrize("rank", [1, 3])
def test_a_stack_is_fitted_as_one_by_one(method, rank):
    """As well as alone; a stack may go on while any of its tensors still improves, so never worse."""
    T = torch.cat([randn(3, 6, 5, 7), planted(1, (6, 5, 7), 2)])
    together, alone = errors(T, method(T, rank)), torch.cat([errors(one[None], method(one[None], rank)) for one in T])
    assert bool((together <= alone * (1 + 1e-3) + 1e-6).all())
    assert bool((alone <= together * 1.02 + 1e-6).all())


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scale_does_not_matter(scale):
    T = randn(2, 6, 5, 7)
    torch.testing.assert_close(errors(scale * T, cp(scale * T, 3)), errors(T, cp(T, 3)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", [cp, greedy])
def test_more_terms_than_a_side_is_long_stay_finite(method):
    T = randn(2, 2, 3, 4)
    factors = method(T, 8)
    assert all(bool(factor.isfinite().all()) for factor in factors)
    assert float(errors(T, factors).max()) < (1e-3 if method is cp else 0.5)


def test_one_seed_gives_one_result():
    T = randn(2, 6, 5, 7)
    for method in (cp, greedy):
        assert all(torch.equal(a, b) for a, b in zip(method(T, 3, seed=5), method(T, 3, seed=5), strict=True))


def test_more_restarts_never_hurt():
    T = randn(3, 6, 5, 7)
    few, many = errors(T, cp(T, 4, restarts=1)), errors(T, cp(T, 4, restarts=5))
    assert bool((many <= few * (1 + 1e-9)).all())
    assert not math.isnan(float(many.sum()))

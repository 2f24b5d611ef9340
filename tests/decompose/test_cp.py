"""Sums of rank-1 terms: planted ones found, beside tensorly's, fitted together no worse than one after the other."""

import math

import pytest
import tensorly
import torch
from tensorly.decomposition import parafac

from taut.decompose.als import LIMIT, als
from taut.decompose.cp import compose, cp, greedy, levelled
from taut.decompose.cp_metric import mode_roots, on_modes, solve_outputs
from taut.decompose.cp_starts import columns, eigenvectors, subspace
from taut.decompose.weighting import RIDGE, Weighting

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
    T = torch.cat([randn(3, *SIZES[modes], seed=seed) for seed in range(3)])
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


# Whole kernels.


@pytest.mark.parametrize("rank", [1, 2, 5, 9, 13, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_planted_kernels_are_found(rank, dtype):
    for seed in range(3):
        T = planted(1, (24, 20, 3, 3), rank, 10 * seed)
        found = [factor.double() for factor in cp(T.to(dtype), rank, sweeps=60, tol=1e-4, restarts=2)]
        assert float(errors(T, found)) <= 1e-5


def test_planted_kernels_are_found_where_modes_are_cut():
    """Long modes in subspaces first; the factors, not their product alone, up to order and scale."""
    wanted = [randn(1, size, 6, seed=place) for place, size in enumerate((90, 70, 3, 3))]
    found = cp(compose(wanted).float(), 6, sweeps=60, tol=1e-4, restarts=2)
    assert float(errors(compose(wanted), [factor.double() for factor in found])) <= 1e-5
    for mine, planted_one in zip(found, wanted, strict=True):
        cosines = torch.nn.functional.normalize(mine[0].double(), dim=0).T @ torch.nn.functional.normalize(
            planted_one[0], dim=0
        )
        torch.testing.assert_close(cosines.abs().amax(1), torch.ones(6).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("sizes", "rank"), [((6, 5, 7), 5), ((4, 6, 5, 3), 5), ((9, 3, 3), 3), ((5, 5, 2), 4)])
def test_eigenvectors_are_the_factors_of_planted_terms(sizes, rank):
    T = planted(3, sizes, rank)
    assert float(als(T, eigenvectors(T, rank, 0), 2, 0.0).error.max()) <= 1e-7


def test_eigenvectors_are_left_where_they_say_nothing():
    T = randn(2, 6, 5, 7)
    assert eigenvectors(T, 3, 0) is None  # much of it lies outside the leading subspaces
    assert eigenvectors(planted(2, (6, 5, 7), 8), 8, 0) is None  # more terms than two modes are long
    assert eigenvectors(planted(2, (6, 5), 2), 2, 0) is None  # a matrix has one slice


@pytest.mark.filterwarnings("ignore:Trying to compute SVD:UserWarning")
@pytest.mark.parametrize(("sizes", "rank"), [((24, 20, 3, 3), 6), ((70, 80, 3, 3), 12)])
def test_error_of_kernels_beside_tensorly(sizes, rank):
    """With spectra as trained kernels have them; the larger one is cut to subspaces first."""
    T = randn(1, *sizes)
    T = on_modes(T, [(torch.diag(torch.arange(1, n + 1) ** -0.5)[None].double(),) * 2 for n in sizes[:2]] + [None] * 2)
    made = parafac(T[0].numpy(), rank, n_iter_max=100, init="svd", tol=1e-6, random_state=0)
    theirs = float(tensorly.norm(tensorly.cp_to_tensor(made) - T[0].numpy()) / T.norm())
    assert float(errors(T, cp(T, rank, sweeps=60, tol=1e-4, restarts=2))) <= 1.01 * theirs


def test_two_hundred_random_kernels_stay_finite_and_bounded():
    """Of random shapes and ranks; no better fit than zero would be a divergence."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        o, c, h, w, rank = (int(torch.randint(1, most, (), generator=generator)) for most in (13, 13, 5, 5, 13))
        T = torch.randn(20, o, c, h, w, generator=generator)
        factors = [factor.double() for factor in cp(T, rank, sweeps=10, tol=1e-3, restarts=2)]
        assert all(bool(factor.isfinite().all()) for factor in factors)
        assert float(errors(T.double(), factors).max()) <= 1 + 1e-6
        assert float((norms_of(factors) / T.double().flatten(1).norm(dim=1)).max()) <= LIMIT * (1 + 1e-3)


def norms_of(factors):
    """Root of the sum of the terms' energies."""
    return torch.stack([factor.norm(dim=1) for factor in factors]).prod(0).norm(dim=-1)


def test_terms_that_grow_against_each_other_are_held():
    """a b b + b a b + b b a has rank 3, and at two terms no best fit: both grow without end."""
    a, b = torch.eye(4, dtype=torch.float64)[:2]
    T = sum(torch.einsum("x,y,z->xyz", *parts) for parts in ((a, b, b), (b, a, b), (b, b, a)))[None]
    factors = cp(T, 2, sweeps=500, tol=0.0)
    assert float(norms_of(factors) / T.norm()) <= LIMIT * (1 + 1e-6)
    assert float(errors(T, factors)) <= 0.1  # the infimum is 0; one term alone leaves .8
    free = als(T, columns(T, 2, 0, random=True), 30, 0.0)
    assert float(free.spread) <= LIMIT * (1 + 1e-6)


@pytest.mark.parametrize("size", [3, 30])
def test_subspaces_are_those_of_the_leading_singular_vectors(size):
    """To what two steps reach, where few directions are wanted; exactly otherwise."""
    rows = randn(2, 90, 200) * torch.arange(1, 91)[:, None] ** -1.0
    basis = subspace(rows, size)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(size).double().expand(2, size, size))
    kept, most = (basis.mT @ rows).square().sum((1, 2)), torch.linalg.svdvals(rows)[:, :size].square().sum(1)
    assert bool((kept >= 0.999 * most).all())


# In the metric of the data.


def test_the_metric_is_the_plain_norm_of_the_whitened_tensor():
    """tr(B dW A dW^T) for A a product over channels and axes, ridge included; by the Kronecker product itself."""
    c, h, w, o = 4, 3, 2, 5
    X, moments = randn(1, o, c, h, w), [randn(40, n, seed=n) for n in (c, h, w)]
    moments = [one.T @ one for one in moments]
    A = torch.kron(torch.kron(moments[0], moments[1]), moments[2])
    probes = randn(40, o, seed=9)
    B = probes.T @ probes
    roots = mode_roots(Weighting(full=A[None]), B[None], (c, h, w))
    flat = X.flatten(2)[0]
    wanted = float((B @ flat @ A @ flat.T).trace())
    assert float(on_modes(X, roots).square().sum()) == pytest.approx(wanted, rel=1e-3)  # but for the ridge
    for pair, size in zip(roots, (o, c, h, w), strict=True):
        torch.testing.assert_close(pair[0] @ pair[1], torch.eye(size).double()[None])


@pytest.mark.parametrize("form", ["full", "channel", None])
def test_outputs_are_solved_in_the_whole_metric(form):
    """By least squares on samples that have this second moment."""
    W, rank = randn(1, 5, 4, 6), 3
    factors = [randn(1, n, rank, seed=n) for n in (5, 4, 3, 2)]
    size = {"full": 24, "channel": 4, None: 0}[form]
    rows = randn(60, max(size, 1), seed=7)
    weighting = Weighting() if form is None else Weighting(**{form: (rows.T @ rows)[None]})
    found = solve_outputs(W, factors, weighting)
    features = torch.einsum("cr,yr,xr->rcyx", *(factor[0] for factor in factors[1:])).flatten(1)
    A = torch.eye(24).double()
    if form is not None:
        lifted = rows.T @ rows + RIDGE * (rows.T @ rows).diagonal().mean() * torch.eye(size).double()
        A = lifted if form == "full" else torch.kron(lifted, torch.eye(6).double())
    half = torch.linalg.cholesky(A)
    wanted = torch.linalg.lstsq((features @ half).T, (W[0].flatten(1) @ half).T).solution.T
    torch.testing.assert_close(found[0], wanted, rtol=1e-6, atol=1e-9)

"""Joint tri-factorization beside an independent reference in numpy, stacked SVDs and planted factors."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from taut.decompose.dfmf import dfmf
from taut.decompose.trifactor import Relation, ranks_for_energy, ranks_for_share, shared_size, shifted, signed
from taut.errors import CallError


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chain(*sizes, seed=0):
    """A feed-forward net: type "0" to "1" to ..."""
    return [Relation.of(str(i), str(i + 1), random(a, b, seed=seed + i)) for i, (a, b) in enumerate(pairwise(sizes))]


def kernels(seed=0):
    """Four offsets between two types, a dense layer behind, and a skip from the first type to the last."""
    return [
        Relation.of("in", "mid", random(4, 9, 12, seed=seed)),
        Relation.of("mid", "out", random(12, 7, seed=seed + 1)),
        Relation.of("in", "out", random(9, 7, seed=seed + 2)),
    ]


def planted(relations, ranks, seed=5):
    """The same graph with matrices that share bases of the given ranks exactly."""
    bases = {}
    for relation in relations:
        for name, size in zip((relation.rows, relation.columns), relation.matrices.shape[1:], strict=True):
            bases.setdefault(name, torch.linalg.qr(random(size, ranks[name], seed=seed + len(bases)))[0])
    made = []
    for place, r in enumerate(relations):
        core = random(len(r.matrices), ranks[r.rows], ranks[r.columns], seed=seed + 50 + place)
        made.append(Relation(r.rows, r.columns, bases[r.rows] @ core @ bases[r.columns].T))
    return made


def relative(found, relations):
    """Error of the whole, each relation over its own norm."""
    left = [(found.compose(p) - r.matrices).norm() / r.matrices.norm() for p, r in enumerate(relations)]
    return float(torch.stack(left).norm()) / len(left) ** 0.5


GRAPHS = {"chain": chain(8, 11, 6, 4), "kernels": kernels()}
RANKS = {"chain": {"0": 3, "1": 4, "2": 3, "3": 2}, "kernels": {"in": 3, "mid": 4, "out": 2}}


# The signed solver.


@pytest.mark.parametrize("graph", GRAPHS)
def test_planted_factors_are_recovered(graph):
    relations = planted(GRAPHS[graph], RANKS[graph])
    found = signed(relations, RANKS[graph])
    assert relative(found, relations) < 1e-6
    for name, G in found.bases.items():
        assert torch.allclose(G.T @ G, torch.eye(RANKS[graph][name], dtype=G.dtype), atol=1e-10)


@given(st.integers(0, 99), st.integers(1, 4))
def test_the_error_never_rises_and_is_what_it_says(seed, k):
    relations = kernels(seed)
    found = signed(relations, {"in": k, "mid": k + 1, "out": k}, tol=0)
    assert all(b <= a + 1e-9 for a, b in pairwise(found.errors))
    assert found.errors[-1] == pytest.approx(relative(found, relations), abs=1e-9)


def test_full_rank_is_exact_and_keeps_the_scale():
    relations = [Relation(r.rows, r.columns, 1000 * r.matrices) for r in kernels()]
    found = signed(relations, {"in": 9, "mid": 12, "out": 7})
    for place, relation in enumerate(relations):
        assert torch.allclose(found.compose(place), relation.matrices, atol=1e-8)


def test_one_hidden_layer_is_the_svd_of_the_stacked_matrices():
    """With only the hidden basis shared and the others whole, [W_0^T | W_1] is factorized once."""
    first, second = chain(10, 8, 6)
    found = signed([first, second], {"0": 10, "1": 3, "2": 6}, normalize=False, tol=0, sweeps=100)
    stacked = torch.cat([first.matrices[0].T, second.matrices[0]], 1)
    tail = torch.linalg.svdvals(stacked)[3:].norm() / stacked.norm()
    assert found.errors[-1] == pytest.approx(float(tail), rel=1e-6)


def test_small_relations_count_as_much_as_large_ones():
    large, small = chain(40, 30, 5)
    large = Relation(large.rows, large.columns, 100 * large.matrices)
    ranks = {"0": 10, "1": 10, "2": 5}
    evenly = signed([large, small], ranks)
    unevenly = signed([large, small], ranks, normalize=False)

    def error(found):
        return float((found.compose(1) - small.matrices).norm() / small.matrices.norm())

    assert error(evenly) < 0.8 * error(unevenly)


def test_a_relation_of_a_type_with_itself():
    W = random(9, 9)
    found = signed([Relation.of("a", "a", W)], {"a": 9})
    assert torch.allclose(found.compose(0)[0], W, atol=1e-9)


def test_the_error_counts_a_relation_of_a_type_with_itself():
    relations = [Relation.of("a", "a", random(9, 9)), Relation.of("a", "b", random(9, 6, seed=1))]
    found = signed(relations, {"a": 4, "b": 3})
    assert found.errors[-1] == pytest.approx(relative(found, relations), abs=1e-9)


WIDE = chain(300, 260, 240)
WIDE_RANKS = {"0": 100, "1": 140, "2": 90}
"""Every basis is too wide for an eigensolver in each sweep."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cheap_sweeps_end_where_exact_ones_do(dtype, monkeypatch):
    relations = [Relation(r.rows, r.columns, r.matrices.to(dtype)) for r in WIDE]
    found = signed(relations, WIDE_RANKS)
    assert all(b <= a + 1e-6 for a, b in pairwise(found.errors))
    assert found.errors[-1] == pytest.approx(relative(found, relations), abs=1e-6)
    for name, G in found.bases.items():
        assert G.dtype == dtype
        assert torch.allclose(G.T @ G, torch.eye(WIDE_RANKS[name], dtype=dtype), atol=1e4 * torch.finfo(dtype).eps)
    monkeypatch.setattr("taut.decompose.trifactor.CHEAP", 1000)
    assert found.errors[-1] <= signed(relations, WIDE_RANKS).errors[-1] * 1.002


def test_wide_planted_factors_are_recovered():
    relations = planted(WIDE, WIDE_RANKS)
    assert relative(signed(relations, WIDE_RANKS), relations) < 1e-6


def test_bases_are_orthonormal_after_any_number_of_sweeps():
    for sweeps in (1, 3):
        found = signed(WIDE, WIDE_RANKS, sweeps=sweeps)
        assert len(found.errors) == sweeps
        for name, G in found.bases.items():
            assert torch.allclose(G.T @ G, torch.eye(WIDE_RANKS[name], dtype=G.dtype), atol=1e-10)


# The non-negative solver.


def reference(matrices, bases, iterations, thetas=None):
    """DFMF of a chain as printed, in numpy; six products per relation instead of four."""
    G = {name: value.copy() for name, value in bases.items()}
    plus, minus = (lambda X: np.maximum(X, 0)), (lambda X: np.maximum(-X, 0))
    for _ in range(iterations):
        P = {name: np.linalg.pinv(g.T @ g) for name, g in G.items()}
        over = {name: np.zeros_like(g) for name, g in G.items()}
        under = {name: np.zeros_like(g) for name, g in G.items()}
        for (i, j), W in matrices.items():
            S = P[i] @ G[i].T @ W @ G[j] @ P[j]
            A, B = W @ G[j] @ S.T, S @ G[j].T @ G[j] @ S.T
            C, Q = W.T @ G[i] @ S, S.T @ G[i].T @ G[i] @ S
            over[i] += plus(A) + G[i] @ minus(B)
            under[i] += minus(A) + G[i] @ plus(B)
            over[j] += plus(C) + G[j] @ minus(Q)
            under[j] += minus(C) + G[j] @ plus(Q)
        for name, theta in (thetas or {}).items():
            under[name] += plus(theta) @ G[name]
            over[name] += minus(theta) @ G[name]
        G = {name: g * np.sqrt(over[name] / np.maximum(under[name], 1e-10)) for name, g in G.items()}
    P = {name: np.linalg.pinv(g.T @ g) for name, g in G.items()}
    return G, {(i, j): P[i] @ G[i].T @ W @ G[j] @ P[j] for (i, j), W in matrices.items()}


@pytest.mark.parametrize("constrained", [False, True])
def test_ten_iterations_equal_the_reference_to_1e_8(constrained):
    relations = chain(12, 9, 7)
    ranks = {"0": 4, "1": 3, "2": 3}
    start = {name: random(size, ranks[name], seed=9).abs() for name, size in (("0", 12), ("1", 9), ("2", 7))}
    thetas = {"1": 0.1 * random(9, 9, seed=3)} if constrained else {}
    found = dfmf(relations, ranks, iterations=10, start=start, constraints=thetas)
    bases, cores = reference(
        {(r.rows, r.columns): r.matrices[0].numpy() for r in relations},
        {name: value.numpy() for name, value in start.items()},
        10,
        {name: value.numpy() for name, value in thetas.items()},
    )
    for name, G in found.bases.items():
        np.testing.assert_allclose(G.numpy(), bases[name], rtol=1e-8, atol=1e-10)
    for place, relation in enumerate(relations):
        np.testing.assert_allclose(found.cores[place][0], cores[relation.rows, relation.columns], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("start", ["random_c", "random_vcol", "random"])
def test_every_start_is_non_negative_and_improves(start):
    relations = chain(30, 25, 20, seed=3)
    found = dfmf(relations, {"0": 5, "1": 5, "2": 5}, start=start, iterations=60)
    assert all(bool((G >= 0).all()) for G in found.bases.values())
    assert found.errors[-1] < found.errors[0]
    assert found.errors[-1] == pytest.approx(
        float(torch.stack([(found.compose(p) - r.matrices).norm() for p, r in enumerate(relations)]).norm())
        / float(torch.stack([r.matrices.norm() for r in relations]).norm()),
        abs=1e-9,
    )
    again = dfmf(relations, {"0": 5, "1": 5, "2": 5}, start=start, iterations=60)
    assert all(torch.equal(found.bases[name], again.bases[name]) for name in found.bases)


def test_the_shift_makes_a_signed_solution_non_negative():
    relations = kernels()
    before = signed(relations, {"in": 3, "mid": 4, "out": 2})
    after = shifted(before)
    assert all(bool((G >= 0).all()) for G in after.bases.values())
    assert {name: G.shape[1] for name, G in after.bases.items()} == {"in": 4, "mid": 5, "out": 3}
    for place in range(3):
        assert torch.allclose(after.compose(place), before.compose(place), atol=1e-9)


# Sizes and ranks.


@given(st.integers(2, 12), st.integers(2, 12), st.integers(2, 12), st.floats(0.3, 1.0))
def test_the_uniform_rank_is_the_largest_that_fits(a, b, c, share):
    relations = chain(a, b, c)
    whole = a * b + b * c
    try:
        ranks = ranks_for_share(relations, share)
    except CallError:
        assert shared_size(relations, {"0": 1, "1": 1, "2": 1}) > share * whole
        return
    assert shared_size(relations, ranks) <= share * whole
    k = max(ranks.values())
    more = {name: min(k + 1, size) for name, size in (("0", a), ("1", b), ("2", c))}
    assert more == ranks or shared_size(relations, more) > share * whole


def test_the_closed_form_of_the_uniform_rank():
    """k < (-N + sqrt(N^2 + 4 L p M)) / (2 L)."""
    sizes, share = (784, 625, 625, 100), 0.1
    relations = [Relation.of(str(i), str(i + 1), torch.zeros(a, b)) for i, (a, b) in enumerate(pairwise(sizes))]
    N, L, M = sum(sizes), 3, sum(a * b for a, b in pairwise(sizes))
    closed = (-N + (N**2 + 4 * L * share * M) ** 0.5) / (2 * L)
    assert set(ranks_for_share(relations, share).values()) == {int(closed)}


def test_ranks_for_energy_find_planted_ranks():
    relations = planted(kernels(), {"in": 3, "mid": 4, "out": 2})
    assert ranks_for_energy(relations, 1 - 1e-9) == {"in": 3, "mid": 4, "out": 2}
    assert max(ranks_for_energy(relations, 0.2).values()) < 4


# What is refused, and what is not.


def test_bad_graphs_are_call_errors():
    a, b = chain(5, 4, 3)
    good = {"0": 2, "1": 2, "2": 2}
    with pytest.raises(CallError, match=r"rank of type '1' must be between 1 and 4\. Got 9"):
        signed([a, b], good | {"1": 9})
    with pytest.raises(CallError, match=r"rank of type '2'.*Got None"):
        dfmf([a, b], {"0": 2, "1": 2})
    with pytest.raises(CallError, match="No relation touches the type 'x'"):
        signed([a, b], good | {"x": 1})
    with pytest.raises(CallError, match="4 objects in one relation and 6"):
        signed([a, Relation.of("1", "2", random(6, 3))], good)
    with pytest.raises(CallError, match="finite"):
        signed([Relation.of("0", "1", torch.full((5, 4), float("nan")))], good)
    with pytest.raises(CallError, match="at least one"):
        signed([], {})
    with pytest.raises(CallError, match=r"constraint of type '1' must be \(4, 4\)"):
        dfmf([a, b], good, constraints={"1": random(3, 3)})
    with pytest.raises(CallError, match="start of type '0'"):
        dfmf([a, b], good, start={"0": random(5, 2)})
    with pytest.raises(CallError, match="'start' must be one of"):
        dfmf([a, b], good, start="zeros")
    for share in (0, 1.5, float("nan")):
        with pytest.raises(CallError, match="share"):
            ranks_for_share([a, b], share)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matrices_of_zeros_give_finite_factors(dtype):
    zero, one = Relation.of("0", "1", torch.zeros(6, 5, dtype=dtype)), Relation.of("1", "2", random(5, 4).to(dtype))
    ranks = {"0": 3, "1": 3, "2": 3}
    for relations in ([zero, one], [zero]):
        wanted = {name: ranks[name] for r in relations for name in (r.rows, r.columns)}
        for found in (signed(relations, wanted), dfmf(relations, wanted, iterations=5)):
            assert all(bool(torch.isfinite(G).all()) for G in found.bases.values())
            assert all(bool(torch.isfinite(found.compose(p)).all()) for p in range(len(relations)))
            assert float(found.compose(0).abs().max()) < 1e-6

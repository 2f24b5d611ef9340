"""Blocks of similar channels: taken apart and put together, two SVDs of each, sums of terms, the best last layer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from taut.decompose.bicluster import (
    Biclusters,
    bicluster,
    paper_svds,
    rank_one_terms,
    second_moments,
    solve_last,
    two_svds,
)
from taut.decompose.weighting import Weighting

NONE = Weighting()
MODES = {
    "default": lambda W, i, o: two_svds(W, i, o, NONE),
    "paper": paper_svds,
    "outputs first": lambda W, i, o: paper_svds(W, i, o, outputs_first=True),
}


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(size, n=1, seed=0, decay=2.0):
    turn = torch.linalg.qr(randn(n, size, size, seed=seed))[0]
    return (turn * torch.logspace(0, -decay, size, dtype=torch.float64)) @ turn.mT


def shuffled(C, F, G, H, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Biclusters(torch.randperm(C, generator=generator), torch.randperm(F, generator=generator), G, H)


def tucker(V, core, U):
    return torch.einsum("noq,nqrs,ncr->nocs", U, core, V)


def terms(a, b, c):
    return torch.einsum("nck,nsk,nok->nocs", a, b, c)


def wrong(dW, weighting=NONE, B=None):
    """tr(B dW A dW^T) of blocks (n, o, c, s)."""
    S = weighting.gram(dW.double())
    return float(S.diagonal(dim1=1, dim2=2).sum() if B is None else (S * B).sum())


# Taking apart and putting together.


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
def test_blocks_and_whole_are_a_round_trip(G, H, c, o, s):
    W, found = randn(H * o, G * c, s), shuffled(G * c, H * o, G, H)
    blocks = found.blocks(W)
    assert blocks.shape == (H * G, o, c, s)
    assert torch.equal(found.whole(blocks), W)
    for h in range(H):
        for g in range(G):
            rows, columns = found.outputs[h * o : (h + 1) * o], found.inputs[g * c : (g + 1) * c]
            assert torch.equal(blocks[h * G + g], W[rows][:, columns])


@pytest.mark.parametrize(("G", "H"), [(1, 1), (2, 3), (3, 2)])
def test_metrics_of_the_blocks_are_the_blocks_of_the_metric(G, H):
    """A block of W in its own metric has the energy that it has alone in the whole."""
    C, F, S = 6, 6, 4
    found, B = shuffled(C, F, G, H), covariance(F, seed=3)
    for form in (Weighting(full=covariance(C * S)), Weighting(channel=covariance(C))):
        for response in (B, None):
            mine, outer = found.metric(form, response)
            assert (outer is None) == (response is None)
            for place in range(G * H):
                alone = torch.zeros(G * H, F // H, C // G, S, dtype=torch.float64)
                alone[place] = randn(F // H, C // G, S, seed=place)
                whole = found.whole(alone)
                A = form.full[0] if form.full is not None else torch.kron(form.channel[0], torch.eye(S))
                own = mine.full[place] if mine.full is not None else torch.kron(mine.channel[place], torch.eye(S))
                M, m = whole.flatten(1) @ A @ whole.flatten(1).T, alone[place].flatten(1)
                m = m @ own @ m.T
                wanted = M.trace() if response is None else (M * B[0]).sum()
                torch.testing.assert_close(m.trace() if outer is None else (m * outer[place]).sum(), wanted)


def test_no_metric_stays_none_and_a_sketch_counts_as_none():
    found = shuffled(4, 4, 2, 2)
    assert not found.metric(NONE, None)[0].known
    assert not found.metric(Weighting(sketch=randn(1, 10, 12)), None)[0].known


# Clusters.


@pytest.mark.parametrize("distance", ["projection", "euclidean"])
@pytest.mark.parametrize("form", [NONE, Weighting(full=covariance(72, decay=0.3)), Weighting(channel=covariance(8))])
def test_planted_clusters_are_found_on_both_sides(distance, form):
    rows, columns = torch.arange(3).repeat(4)[torch.randperm(12)], torch.arange(2).repeat(4)[torch.randperm(8)]
    W = 3 * randn(3, 2, 9)[rows][:, columns] + 0.05 * randn(12, 8, 9, seed=1)
    found = bicluster(W, 2, 3, form, None if not form.known else covariance(12, decay=0.3), distance)
    for order, truth, clusters in ((found.inputs, columns, 2), (found.outputs, rows, 3)):
        assert sorted(order.tolist()) == list(range(len(truth)))
        assert all(len(set(part.tolist())) == 1 for part in truth[order].reshape(clusters, -1))


def test_second_moments_are_those_of_the_channels():
    A = covariance(12)
    wanted = A[0].reshape(3, 4, 3, 4).diagonal(dim1=1, dim2=3).mean(-1)
    torch.testing.assert_close(second_moments(Weighting(full=A), 3), wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(second_moments(Weighting(channel=A), 12), A[0], rtol=1e-3, atol=1e-4)
    assert second_moments(NONE, 3) is None


# Two SVDs.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", [(2, 6, 5, 4), (1, 3, 8, 2), (4, 8, 3, 1), (2, 5, 12, 9)])
def test_full_rank_is_exact_in_every_mode(mode, sizes):
    _, o, c, s = sizes
    W = randn(*sizes)
    i = min(c, o * s)
    V, core, U = MODES[mode](W, i, min(o, i * s))
    torch.testing.assert_close(tucker(V, core, U), W, rtol=0, atol=1e-9)


@pytest.mark.parametrize("fisher", [False, True], ids=["data", "fisher"])
@pytest.mark.parametrize("form", ["full", "channel"])
@pytest.mark.parametrize("sizes", [(2, 6, 5, 4), (1, 3, 8, 2), (4, 8, 3, 1)])
def test_full_rank_is_exact_in_every_metric(sizes, form, fisher):
    n, o, c, s = sizes
    W, i = randn(*sizes), min(c, o * s)
    weighting = Weighting(**{form: covariance(c * s if form == "full" else c, n)})
    V, core, U = two_svds(W, i, min(o, i * s), weighting, covariance(o, n) if fisher else None)
    torch.testing.assert_close(tucker(V, core, U), W, rtol=0, atol=1e-7)


@pytest.mark.parametrize("mode", MODES)
@given(st.integers(1, 2), st.integers(1, 7), st.integers(1, 7), st.integers(1, 4), st.data())
def test_factors_have_the_ranks_that_were_asked_for(mode, n, o, c, s, data):
    if mode == "outputs first":  # the side that is cut second is bounded by the first
        r = data.draw(st.integers(1, min(o, c * s)))
        i = data.draw(st.integers(1, min(c, r * s)))
    else:
        i = data.draw(st.integers(1, min(c, o * s)))
        r = data.draw(st.integers(1, min(o, i * s)))
    V, core, U = MODES[mode](randn(n, o, c, s), i, r)
    assert (V.shape, core.shape, U.shape) == ((n, c, i), (n, r, i, s), (n, o, r))


@pytest.mark.parametrize("mode", ["paper", "outputs first"])
@pytest.mark.parametrize("seed", range(4))
def test_the_default_is_no_worse_than_the_sources_way(mode, seed):
    """The second SVD of S V, refined, against that of V: at every rank, on noise and on decaying spectra."""
    decaying = randn(2, 12, 10, 9, seed=seed) * torch.logspace(0, -1.5, 10, dtype=torch.float64)[:, None]
    for W in (randn(2, 12, 10, 9, seed=seed), decaying):
        for i, o in ((1, 1), (3, 3), (2, 6), (5, 2), (8, 10)):
            ours = wrong(W - tucker(*two_svds(W, i, o, NONE)))
            theirs = wrong(W - tucker(*MODES[mode](W, i, o)))
            assert ours <= theirs * (1 + 1e-9)
            if (i, o) == (3, 3) and W is decaying:
                assert ours < (0.99 if mode == "paper" else 1) * theirs


@pytest.mark.parametrize("seed", range(3))
def test_the_sources_way_is_two_svds_of_which_the_second_sees_no_singular_values(seed):
    W, i, o = randn(1, 7, 6, 4, seed=seed), 3, 2
    U, s, Vh = torch.linalg.svd(W[0].permute(1, 2, 0).flatten(1), full_matrices=False)  # (c, s o)
    right = Vh[:i].reshape(i * 4, 7)
    P, t, Qh = torch.linalg.svd(right, full_matrices=False)
    cut = ((P[:, :o] * t[:o]) @ Qh[:o]).reshape(i, 4, 7)
    wanted = torch.einsum("ci,i,iso->ocs", U[:, :i], s[:i], cut)
    torch.testing.assert_close(tucker(*paper_svds(W, i, o))[0], wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("fisher", [False, True], ids=["data", "fisher"])
@pytest.mark.parametrize("form", ["full", "channel"])
@pytest.mark.parametrize("seed", range(3))
def test_two_svds_are_better_in_the_metric_that_they_were_given(form, fisher, seed):
    n, o, c, s = 2, 8, 6, 4
    W = randn(n, o, c, s, seed=seed)
    weighting = Weighting(**{form: covariance(c * s if form == "full" else c, n, seed)})
    B = covariance(o, n, seed + 1) if fisher else None
    for i, r in ((2, 2), (3, 5), (4, 2)):
        ours, plain = (W - tucker(*two_svds(W, i, r, *m)) for m in ((weighting, B), (NONE, None)))
        assert wrong(ours, weighting, B) < wrong(plain, weighting, B)


@pytest.mark.parametrize("mode", MODES)
def test_zero_blocks_are_finite(mode):
    W = randn(2, 5, 4, 3)
    W[0] = 0
    V, core, U = MODES[mode](W, 2, 3)
    assert all(bool(t.isfinite().all()) for t in (V, core, U))
    assert float(tucker(V, core, U)[0].abs().max()) <= 1e-12


# Sums of terms.


@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("rank", [1, 2])
def test_planted_terms_are_found(paper, rank):
    a, b, c = randn(3, 5, rank), randn(3, 9, rank, seed=1), randn(3, 8, rank, seed=2)
    if paper:  # one after the other finds them where they are orthogonal
        a, b, c = (torch.linalg.qr(t)[0] * torch.tensor([3.0, 1.0])[:rank] for t in (a, b, c))
    W = terms(a, b, c)
    found = rank_one_terms(W, rank, NONE, paper=paper)
    assert [tuple(t.shape) for t in found] == [(3, 5, rank), (3, 9, rank), (3, 8, rank)]
    torch.testing.assert_close(terms(*found), W, rtol=0, atol=1e-4 * float(W.abs().max()))


@pytest.mark.parametrize("fisher", [False, True], ids=["data", "fisher"])
@pytest.mark.parametrize("form", ["full", "channel"])
def test_planted_terms_are_found_in_every_metric(form, fisher):
    W = terms(randn(2, 5, 2), randn(2, 9, 2, seed=1), randn(2, 8, 2, seed=2))
    weighting = Weighting(**{form: covariance(45 if form == "full" else 5, 2)})
    found = rank_one_terms(W, 2, weighting, covariance(8, 2) if fisher else None)
    torch.testing.assert_close(terms(*found), W, rtol=0, atol=1e-3 * float(W.abs().max()))


@pytest.mark.parametrize("fisher", [False, True], ids=["data", "fisher"])
@pytest.mark.parametrize("form", ["separable", "channel"])
@pytest.mark.parametrize("rank", [1, 3])
def test_terms_are_better_in_the_metric_that_they_were_given(form, fisher, rank):
    W, A = randn(2, 8, 5, 9), covariance(5, 2)
    offsets = covariance(9, 1, seed=4)[0] if form == "separable" else torch.eye(9, dtype=torch.float64)
    full = torch.stack([torch.kron(one, offsets) for one in A])
    weighting = Weighting(full=full) if form == "separable" else Weighting(channel=A)
    B = covariance(8, 2, seed=2) if fisher else None
    ours, plain = (W - terms(*rank_one_terms(W, rank, *m)) for m in ((weighting, B), (NONE, None)))
    assert wrong(ours, Weighting(full=full), B) < wrong(plain, Weighting(full=full), B)


def test_together_beats_one_after_the_other():
    W = randn(4, 8, 6, 9)
    ours, theirs = (wrong(W - terms(*rank_one_terms(W, 6, NONE, paper=paper))) for paper in (False, True))
    assert ours < theirs


# The best last layer.


@pytest.mark.parametrize("form", ["frobenius", "full", "channel"])
@pytest.mark.parametrize(("G", "H"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_the_last_layer_is_the_least_squares_solution(form, G, H):
    C, F, S, q = 6, 9, 4, 2
    weighting = {
        "frobenius": NONE,
        "full": Weighting(full=covariance(C * S)),
        "channel": Weighting(channel=covariance(C)),
    }[form]
    W, found = randn(F, C, S), shuffled(C, F, G, H)
    features = randn(H * G, q, C // G, S, seed=5)
    solved = solve_last(found, W, features, weighting)
    assert solved.shape == (H * G, F // H, q)
    for h in range(H):
        placed = torch.zeros(G * q, C, S, dtype=torch.float64)
        for g in range(G):
            columns = found.inputs[g * C // G : (g + 1) * C // G]
            placed[g * q : (g + 1) * q, columns] = features[h * G + g]
        rows = found.outputs[h * F // H : (h + 1) * F // H]
        X, Y = weighting.whitened(placed[None])[0], weighting.whitened(W[rows][None])[0]
        wanted = torch.linalg.lstsq(X.T, Y.T).solution.T  # (F / H, G q)
        mine = solved[h * G : (h + 1) * G].transpose(0, 1).flatten(1)
        torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", ["full", "channel"])
@pytest.mark.parametrize("seed", range(3))
def test_the_last_solve_lowers_the_error_in_the_whole_metric(form, seed):
    """What inputs of different clusters have in common is seen by this solve alone."""
    C, F, S, G, H = 8, 12, 9, 2, 2
    W = randn(F, C, S, seed=seed)
    weighting = Weighting(**{form: covariance(C * S if form == "full" else C, seed=seed)})
    found = bicluster(W, G, H, weighting)
    metric, _ = found.metric(weighting, None)
    V, core, U = two_svds(found.blocks(W), 2, 3, metric)
    better = solve_last(found, W, torch.einsum("nqrs,ncr->nqcs", core, V), weighting)
    before, after = (found.whole(tucker(V, core, last)) for last in (U, better))
    assert wrong((W - after)[None], weighting) < wrong((W - before)[None], weighting)
    a, b, c = rank_one_terms(found.blocks(W), 3, metric)
    better = solve_last(found, W, torch.einsum("nck,nsk->nkcs", a, b), weighting)
    before, after = (found.whole(terms(a, b, last)) for last in (c, better))
    assert wrong((W - after)[None], weighting) < wrong((W - before)[None], weighting)


def test_features_that_repeat_or_vanish_leave_the_last_layer_finite():
    W, found, features = randn(4, 4, 3), shuffled(4, 4, 2, 2), randn(4, 2, 2, 3)
    features[:, 1] = features[:, 0]
    features[1] = 0
    solved = solve_last(found, W, features, NONE)
    assert bool(solved.isfinite().all())
    assert float(solved.abs().max()) < 1e3 * float(W.abs().max())

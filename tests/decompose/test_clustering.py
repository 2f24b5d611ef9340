"""Balanced clustering: sizes exactly equal, planted clusters found, never worse than plain k-means with balancing."""

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from taut.decompose.clustering import DISTANCES, assign, balanced, spread
from taut.errors import CallError

EVERY_DISTANCE = pytest.mark.parametrize("distance", DISTANCES)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(X, labels, distance):
    """The objective by its definition, cluster by cluster: squares around the mean, or beside the best line."""
    total = 0.0
    for cluster in labels.unique():
        members = X[labels == cluster].double()
        if distance == "euclidean":
            total += float((members - members.mean(0)).square().sum())
        else:
            total += float(torch.linalg.svdvals(members)[1:].square().sum())
    return total


def partition(labels):
    """A clustering regardless of the numbers of its clusters."""
    return {frozenset(torch.where(labels == cluster)[0].tolist()) for cluster in labels.unique()}


def partitions(items, size):
    """Every way to split items into sets of `size`."""
    if not items:
        yield []
        return
    first, *rest = items
    for others in combinations(rest, size - 1):
        left = [item for item in rest if item not in others]
        for following in partitions(left, size):
            yield [(first, *others), *following]


def optimum(X, k, distance):
    n, best = len(X), float("inf")
    for split in partitions(list(range(n)), n // k):
        labels = torch.empty(n, dtype=torch.long)
        for place, members in enumerate(split):
            labels[list(members)] = place
        best = min(best, error(X, labels, distance))
    return best


def by_regret(X, k, restarts=10, sweeps=20):
    """K-means whose over-full clusters keep the members with the largest regret; the best of several starts."""
    X, best = X.numpy(), float("inf")
    for seed in range(restarts):
        centres = KMeans(k, n_init=1, random_state=seed).fit(X).cluster_centers_
        for _ in range(sweeps):
            distances = ((X[:, None] - centres[None]) ** 2).sum(-1)
            labels = evened(distances, len(X) // k)
            centres = np.stack([X[labels == a].mean(0) for a in range(k)])
        best = min(best, error(torch.from_numpy(X), torch.from_numpy(labels), "euclidean"))
    return best


def evened(distances, size):
    n, k = distances.shape
    labels, open_, free = np.full(n, -1), np.ones(k, dtype=bool), np.ones(n, dtype=bool)
    while free.any():
        seen = np.where(open_, distances, np.inf)
        nearest = seen.argmin(1)
        ordered = np.sort(seen, 1)
        regret = ordered[:, min(1, k - 1)] - ordered[:, 0]
        for cluster in np.where(open_)[0]:
            wish = np.where(free & (nearest == cluster))[0]
            room = size - int((labels == cluster).sum())
            taken = wish[np.argsort(-regret[wish], kind="stable")][:room]
            labels[taken], free[taken] = cluster, False
            open_[cluster] = (labels == cluster).sum() < size
    return labels


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 8), st.sampled_from(DISTANCES), st.integers(0, 99))
def test_sizes_are_exactly_equal(k, size, dim, distance, seed):
    labels = balanced(randn(k * size, dim, seed=seed), k, distance, restarts=2)
    assert labels.dtype == torch.long
    assert labels.bincount(minlength=k).tolist() == [size] * k


@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from(DISTANCES), st.integers(0, 99))
def test_spread_is_the_objective_by_its_definition(k, size, distance, seed):
    X = randn(k * size, 5, seed=seed)
    labels = torch.arange(k).repeat(size)
    wanted = error(X, labels, distance) / float(X.square().sum())
    assert spread(X, labels, distance) == pytest.approx(wanted, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_assign_is_the_least_cost(seed):
    cost = randn(6, 3, seed=seed)
    labels = assign(cost)
    assert labels.bincount().tolist() == [2, 2, 2]
    least = min(
        sum(float(cost[i, place]) for place, members in enumerate(order) for i in members)
        for split in partitions(list(range(6)), 2)
        for order in ([split[a], split[b], split[3 - a - b]] for a in range(3) for b in range(3) if a != b)
    )
    assert float(cost.gather(1, labels[:, None]).sum()) == pytest.approx(least)


@pytest.mark.parametrize("seed", range(8))
def test_planted_clusters_are_found(seed):
    centres = 3 * randn(6, 10, seed=seed)
    truth = torch.arange(6).repeat(8)[torch.randperm(48, generator=torch.Generator().manual_seed(seed))]
    X = centres[truth] + 0.1 * randn(48, 10, seed=seed + 100)
    assert partition(balanced(X, 6, "euclidean")) == partition(truth)


@pytest.mark.parametrize("seed", range(8))
def test_planted_lines_are_found_whatever_their_members_signs_and_lengths(seed):
    lines = randn(6, 12, seed=seed)
    truth = torch.arange(6).repeat(8)[torch.randperm(48, generator=torch.Generator().manual_seed(seed))]
    length = randn(48, 1, seed=seed + 50).exp() * randn(48, 1, seed=seed + 60).sign()
    X = length * (lines[truth] + 0.02 * randn(48, 12, seed=seed + 100))
    assert partition(balanced(X, 6, "projection")) == partition(truth)
    wrong = (length < 0).any() and partition(balanced(X, 6, "euclidean")) == partition(truth)
    assert not wrong  # the Euclidean distance cannot see it: the two really differ


@pytest.mark.parametrize(("n", "k", "dim"), [(24, 4, 6), (32, 8, 20), (36, 2, 4), (48, 12, 9)])
@pytest.mark.parametrize("seed", range(3))
def test_no_worse_than_k_means_balanced_by_regret(n, k, dim, seed):
    X = randn(n, dim, seed=seed) * torch.logspace(0, -1, dim, dtype=torch.float64)
    assert error(X, balanced(X, k, "euclidean"), "euclidean") <= by_regret(X, k) * (1 + 1e-9)


@EVERY_DISTANCE
@pytest.mark.parametrize("dim", [2, 3, 10])
@pytest.mark.parametrize("seed", range(10))
def test_tiny_cases_reach_the_optimum(distance, dim, seed):
    X = randn(6, dim, seed=seed)
    found = error(X, balanced(X, 3, distance, restarts=10), distance)
    assert found <= optimum(X, 3, distance) * (1 + 1e-9) + 1e-12


@EVERY_DISTANCE
def test_one_seed_one_result_and_more_restarts_never_hurt(distance):
    X = randn(40, 7)
    once, again = (balanced(X, 8, distance, restarts=2, seed=3) for _ in range(2))
    assert torch.equal(once, again)
    errors = [error(X, balanced(X, 8, distance, restarts=r), distance) for r in (1, 4, 12)]
    assert all(more <= fewer * (1 + 1e-12) for fewer, more in pairwise(errors))  # sums in another order


@EVERY_DISTANCE
def test_the_order_and_scale_of_all_vectors_do_not_matter(distance):
    """Clusters planted clearly enough are the same partition of the shuffled and scaled vectors."""
    truth = torch.arange(4).repeat(5)
    X = randn(4, 9)[truth] * 3 + 0.05 * randn(20, 9, seed=1)
    turn = torch.randperm(20)
    back = torch.empty(20, dtype=torch.long)
    back[turn] = balanced(1e6 * X[turn], 4, distance)
    assert partition(back) == partition(balanced(X, 4, distance)) == partition(truth)


@EVERY_DISTANCE
@pytest.mark.parametrize(("n", "k"), [(6, 4), (5, 2), (4, 8), (4, 0), (4, -2)])
def test_clusters_that_cannot_be_equal_are_refused(distance, n, k):
    with pytest.raises(CallError, match=f"{n} vectors cannot form {k} clusters of equal size"):
        balanced(randn(n, 3), k, distance)


def test_an_unknown_distance_is_refused():
    with pytest.raises(CallError, match=r"'distance' must be one of euclidean, projection\. Got 'cosine'"):
        balanced(randn(4, 3), 2, "cosine")


@EVERY_DISTANCE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_zero_and_equal_vectors_still_form_equal_clusters(distance, dtype):
    for X in (torch.zeros(12, 4), torch.ones(12, 4), randn(1, 4).repeat(12, 1), torch.eye(12)[:, :1] * 1e-30):
        labels = balanced(X.to(dtype), 3, distance)
        assert labels.bincount(minlength=3).tolist() == [4, 4, 4]
        assert -1e-12 <= spread(X.to(dtype), labels, distance) <= 1


@EVERY_DISTANCE
def test_duplicates_end_up_together(distance):
    X = randn(5, 6).repeat(3, 1)
    labels = balanced(X, 5, distance)
    assert spread(X, labels, distance) <= 1e-12
    assert partition(labels) == {frozenset({i, i + 5, i + 10}) for i in range(5)}


@EVERY_DISTANCE
def test_one_cluster_and_one_of_each(distance):
    X = randn(6, 3)
    assert balanced(X, 1, distance).tolist() == [0] * 6
    assert sorted(balanced(X, 6, distance).tolist()) == list(range(6))

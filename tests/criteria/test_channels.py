"""Removal of channels beside a search that solves the least squares anew for every class, and scores beside numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taut import CallError
from taut.criteria import channels
from taut.criteria.channels import (
    Reader,
    bn_scale,
    energy,
    geometric_median,
    kept_weights,
    norm,
    pooled,
    removal,
    residual,
    taylor,
)


def reader(owner, o=5, metric=None, scale=1.0, seed=0):
    random = torch.Generator().manual_seed(seed)
    k = len(owner)
    mixed = torch.randn(3 * k + 1, k, generator=random) @ torch.randn(k, k, generator=random)
    A = mixed.double().T @ mixed.double() / len(mixed)
    B = torch.randn(o, o, generator=random).double()
    weight = {None: None, "diagonal": B.diagonal().square(), "full": B @ B.T}[metric]
    W = torch.randn(o, k, generator=random).double()
    return Reader(W, A + 1e-3 * A.diagonal().mean() * torch.eye(k), torch.tensor(owner), weight, scale)


def solved(r, gone):
    """The least-squares weights without these classes, by QR on the root of A, and their error."""
    stays = ~torch.isin(r.owner, torch.tensor(gone, dtype=torch.long))
    root = torch.linalg.cholesky(r.A).T
    W = torch.zeros_like(r.W)
    if stays.any():
        W[:, stays] = torch.linalg.lstsq(root[:, stays], root @ r.W.T).solution.T
    dW = r.W - W
    B = torch.eye(len(W)).double() if r.weight is None else r.weight.diag() if r.weight.ndim == 1 else r.weight
    return W, r.scale * float(torch.trace(B @ dW @ r.A @ dW.T))


def reference(readers, classes):
    """Greedy: every class that is left is tried at every step."""
    order, damages = [], []
    while len(order) < classes:
        left = [c for c in range(classes) if c not in order]
        total = [sum(solved(r, [*order, c])[1] for r in readers) for c in left]
        best = int(np.argmin(total))
        order.append(left[best])
        damages.append(total[best])
    return order, damages


GROUPS = {
    "one column each": ([[0, 1, 2, 3, 4, 5]], 6),
    "taps": ([[0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]], 5),
    "interleaved": ([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]], 5),
    "columns that stay": ([[-1, 0, 0, -1, 1, 1, 2, -1, 2, 3, 3]], 4),
    "unequal counts": ([[3, 0, 1, 1, 2, 2, 2, 3, 3, 3, -1]], 4),
    "several readers": ([[0, 0, 1, 1, 2, 2, 3, 3, 4, 4], [4, 3, 2, 1, 0], [-1, 0, 2, 2, 1, 4, 4, 3]], 5),
    "classes that a reader has not": ([[0, 0, 2, 2, 4], [1, 1, 3, 3, -1, 4], [-1, -1]], 5),
    "one class": ([[0, 0]], 1),
}


@pytest.mark.parametrize("metric", [None, "diagonal", "full"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("pending", [1, 128])
def test_removal_as_the_search_that_solves_anew_for_every_class(group, metric, pending, monkeypatch):
    monkeypatch.setattr(channels, "PENDING", pending)
    owners, classes = GROUPS[group]
    readers = [reader(owner, 3 + i, metric, 0.5 + i, seed=i) for i, owner in enumerate(owners)]
    order, damages = reference(readers, classes)
    found = removal(readers, classes)
    assert found.order.tolist() == order
    assert found.damages.dtype == torch.float64
    assert found.damages.tolist() == pytest.approx(damages, rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("group", GROUPS)
def test_damages_are_the_errors_of_the_kept_weights_at_every_prefix(group):
    owners, classes = GROUPS[group]
    readers = [reader(owner, 4, "full", 2.0, seed=7 + i) for i, owner in enumerate(owners)]
    found = removal(readers, classes)
    for count in range(classes):
        keep = torch.ones(classes, dtype=torch.bool)
        keep[found.order[: count + 1]] = False
        moves = [kept_weights(r, keep) - r.W for r in readers]
        error = sum(r.scale * float(torch.trace(r.weight @ d @ r.A @ d.T)) for r, d in zip(readers, moves, strict=True))
        assert float(found.damages[count]) == pytest.approx(error, rel=1e-9, abs=1e-12)
    assert bool((found.damages.diff() >= 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kept_weights_are_the_least_squares_solution(dtype):
    r = reader([-1, 0, 0, 1, 2, 2, 3], metric="full")
    r = Reader(r.W.to(dtype), r.A, r.owner, r.weight)
    for gone in ([], [1], [0, 2], [0, 1, 2, 3]):
        keep = torch.ones(4, dtype=torch.bool)
        keep[gone] = False
        found = kept_weights(r, keep)
        wanted, _ = solved(Reader(r.W.double(), r.A, r.owner), gone)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
        assert not bool(found[:, torch.isin(r.owner, torch.tensor(gone, dtype=torch.long))].any())


def test_nothing_kept_is_nothing():
    r = reader([0, 0, 1])
    assert torch.equal(kept_weights(r, torch.zeros(2, dtype=torch.bool)), torch.zeros_like(r.W))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 99), st.sampled_from([0.25, 3.0, 1e6]))
def test_the_unit_does_not_change_the_order(seed, factor):
    owners = [[0, 0, 1, 1, 2, 2, 3, 3], [3, 2, 1, 0, -1]]
    readers = [reader(owner, metric="diagonal", scale=1 + i, seed=seed + i) for i, owner in enumerate(owners)]
    found = removal(readers, 4)
    scaled = {
        "scale": [Reader(r.W, r.A, r.owner, r.weight, factor * r.scale) for r in readers],
        "A": [Reader(r.W, factor * r.A, r.owner, r.weight, r.scale) for r in readers],
        "B": [Reader(r.W, r.A, r.owner, factor * r.weight, r.scale) for r in readers],
    }
    for same in scaled.values():
        other = removal(same, 4)
        assert torch.equal(other.order, found.order)
        torch.testing.assert_close(other.damages, factor * found.damages, rtol=1e-9, atol=0)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 99), st.permutations(range(5)))
def test_the_names_of_the_classes_do_not_matter(seed, names):
    names = torch.tensor(names)
    r = reader([0, 0, 1, 1, 2, 2, 3, 3, 4, 4], seed=seed)
    found = removal([r], 5)
    other = removal([Reader(r.W, r.A, names[r.owner])], 5)
    assert torch.equal(other.order, names[found.order])
    torch.testing.assert_close(other.damages, found.damages)


def test_of_two_equal_channels_one_goes_for_free_and_only_one():
    r = reader([0, 0, 1, 1, 2, 2, 3, 3], o=4)
    copy = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 4, 5])  # channel 4 sees what channel 2 sees
    A = r.A[copy][:, copy] + 1e-9 * torch.eye(10)
    W = torch.cat((r.W, r.W[:, :2]), 1)
    found = removal([Reader(W, A, torch.arange(10) // 2)], 5)
    assert int(found.order[0]) in {2, 4}
    assert float(found.damages[0]) < 1e-6 * float(found.damages[1])
    assert found.damages[1:].tolist() == pytest.approx(
        removal([Reader(_merged(W), r.A, r.owner)], 4).damages.tolist(), rel=1e-6
    )


def _merged(W):
    """The weights of a layer that sees the doubled channel once."""
    one = W[:, :8].clone()
    one[:, 4:6] += W[:, 8:]
    return one


def test_inputs_that_are_not_related_make_it_the_size_of_the_columns():
    r = reader([0, 0, 1, 1, 2, 2])
    found = removal([Reader(r.W, torch.eye(6).double(), r.owner)], 3)
    size = r.W.square().sum(0).reshape(3, 2).sum(1)
    assert torch.equal(found.order, size.argsort())
    torch.testing.assert_close(found.damages, size.sort().values.cumsum(0))


@pytest.mark.parametrize("least", [0, 1, 3, 5])
def test_the_search_ends_at_the_least_and_all_damages_stay_exact(least):
    r = reader([0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    whole, found = removal([r], 5, 0), removal([r], 5, least)
    assert torch.equal(found.order[: 5 - least], whole.order[: 5 - least])
    assert found.order.sort().values.tolist() == list(range(5))
    wanted = [solved(r, found.order[: i + 1].tolist())[1] for i in range(5)]
    assert found.damages.tolist() == pytest.approx(wanted, rel=1e-8)


@pytest.mark.parametrize("condition", [6, 10, 13])
def test_nearly_singular_inputs_leave_order_and_damages_exact(condition):
    random = torch.Generator().manual_seed(3)
    Q = torch.linalg.qr(torch.randn(24, 24, generator=random, dtype=torch.float64))[0]
    A = (Q * torch.logspace(0, -condition, 24, dtype=torch.float64)) @ Q.T
    r = Reader(torch.randn(3, 24, generator=random), (A + A.T) / 2, torch.arange(8).repeat_interleave(3))
    found = removal([r], 8)
    order, damages = reference([Reader(r.W.double(), r.A, r.owner)], 8)
    assert found.order.tolist() == order
    assert found.damages.tolist() == pytest.approx(damages, rel=1e-3, abs=1e-14)


def test_without_readers_or_columns_everything_is_free():
    alone = reader([-1, -1])
    for problems in ([], [alone]):
        found = removal(problems, 3)
        assert found.order.tolist() == [0, 1, 2]
        assert found.damages.tolist() == [0, 0, 0]
    torch.testing.assert_close(kept_weights(alone, torch.zeros(3, dtype=torch.bool)), alone.W)


def test_bad_readers_are_told():
    W, A, owner = torch.ones(2, 3), torch.eye(3), torch.tensor([0, 1, -1])
    bad = {
        "'W'": [Reader(W[0], A, owner), Reader(W * float("nan"), A, owner)],
        "'A' of a reader must be \\(3, 3\\)": [Reader(W, A[:2], owner)],
        "positive definite": [Reader(W, -A, owner), Reader(W, A * float("nan"), owner)],
        "'owner'": [Reader(W, A, owner[:2]), Reader(W, A, owner + 1), Reader(W, A, owner - 1)],
        "'weight'": [Reader(W, A, owner, torch.ones(3))],
        "'scale'": [Reader(W, A, owner, None, -1.0), Reader(W, A, owner, None, float("nan"))],
    }
    for message, readers in bad.items():
        for one in readers:
            with pytest.raises(CallError, match=message):
                removal([one], 2)
    for least in (-1, 3):
        with pytest.raises(CallError, match="between 0 and 2"):
            removal([Reader(W, A, owner)], 2, least)
    with pytest.raises(CallError, match="'keep'"):
        kept_weights(Reader(W, A, owner), torch.tensor([0, 1]))


ROWS = torch.randn(7, 12, generator=torch.Generator().manual_seed(5))


def test_norms_batch_norm_and_energy():
    rows = ROWS.double().numpy()
    np.testing.assert_allclose(norm(ROWS, 1), np.abs(rows).sum(1))
    np.testing.assert_allclose(norm(ROWS.reshape(7, 3, 2, 2), 2), np.sqrt((rows**2).sum(1)))
    assert bn_scale(torch.tensor([-2.0, 0.5, 0.0])).tolist() == [2, 0.5, 0]
    assert energy(torch.tensor([4.0, 0.25]).half()).tolist() == [4, 0.25]
    for found in (norm(ROWS, 1), bn_scale(ROWS[0]), energy(ROWS[0]), geometric_median(ROWS), residual(ROWS)):
        assert found.dtype == torch.float64
    with pytest.raises(CallError, match="'p' of norm must be 1 or 2"):
        norm(ROWS, 3)


@pytest.mark.parametrize("n", [7, 40])
def test_geometric_median_is_the_sum_of_distances(n):
    rows = ROWS.repeat(6, 1)[:n].double() + torch.arange(n)[:, None] / 10
    wanted = np.sqrt(((rows.numpy()[:, None] - rows.numpy()) ** 2).sum(2)).sum(1)
    np.testing.assert_allclose(geometric_median(rows), wanted)


def test_residual_is_the_squared_distance_to_the_span_of_the_others():
    rows = ROWS.double().numpy()
    for i, found in enumerate(residual(ROWS, 1e-12)):
        others = np.delete(rows, i, 0).T
        rest = rows[i] - others @ np.linalg.lstsq(others, rows[i], rcond=None)[0]
        assert float(found) == pytest.approx(rest @ rest, rel=1e-9)


def test_residual_with_its_ridge_is_ridge_regression_and_scales_with_the_filters():
    rows, share = ROWS.repeat(3, 1)[:20].double().numpy(), 0.03  # more filters than dimensions
    r = share * (rows**2).sum(1).mean()
    for i, found in enumerate(residual(torch.from_numpy(rows), share)):
        others = np.delete(rows, i, 0)
        v = np.linalg.solve(others @ others.T + r * np.eye(19), others @ rows[i])
        rest = rows[i] - v @ others
        assert float(found) == pytest.approx(r + rest @ rest + r * v @ v, rel=1e-9)
    torch.testing.assert_close(residual(10 * ROWS.double()), 100 * residual(ROWS), rtol=1e-9, atol=0)


def test_a_filter_that_others_combine_has_the_least_residual():
    rows = ROWS.clone()
    rows[3] = rows[0] - 2 * rows[5]
    found = residual(rows)
    assert set(found.argsort()[:3].tolist()) == {0, 3, 5}
    assert float(found[[0, 3, 5]].max()) < 1e-4 * float(found[[1, 2, 4, 6]].min())


def test_residual_of_zeros_and_of_bad_input():
    assert residual(torch.zeros(3, 4)).tolist() == [0, 0, 0]
    for ridge in (0.0, -1.0, float("nan")):
        with pytest.raises(CallError, match="'ridge'"):
            residual(ROWS, ridge)
    with pytest.raises(CallError, match="finite"):
        residual(ROWS * float("nan"))


def test_taylor_is_the_mean_size_of_norm_one_in_the_layer():
    wanted = np.abs(ROWS.double().numpy()).mean(0)
    np.testing.assert_allclose(taylor(ROWS), wanted / np.sqrt((wanted**2).sum()))
    torch.testing.assert_close(taylor(1e-5 * ROWS.double()), taylor(ROWS.double()))
    assert taylor(torch.zeros(4, 3)).tolist() == [0, 0, 0]


@given(st.lists(st.lists(st.tuples(st.integers(-1, 4), st.floats(0, 9)), max_size=12), max_size=4))
def test_pooled_is_the_sum_over_rows_and_layers(layers):
    wanted = np.zeros(5)
    for layer in layers:
        for owner, value in layer:
            if owner >= 0:
                wanted[owner] += value
    given_ = [
        (torch.tensor([v for _, v in layer], dtype=torch.float64), torch.tensor([c for c, _ in layer]).long())
        for layer in layers
    ]
    np.testing.assert_allclose(pooled(given_, 5), wanted)


def test_pooled_refuses_what_does_not_fit():
    two = torch.ones(2)
    for owner in (torch.tensor([0]), torch.tensor([0, 3]), torch.tensor([0, -2])):
        with pytest.raises(CallError, match="'owner'"):
            pooled([(two, owner)], 3)
    with pytest.raises(CallError, match="numbers"):
        pooled([(two * float("nan"), torch.tensor([0, 1]))], 3)

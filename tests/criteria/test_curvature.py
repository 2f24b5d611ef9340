"""Optimal brain surgeon beside a reference that inverts in float64 for every single weight."""

import pytest
import torch

from taut.criteria import curvature
from taut.criteria.curvature import compensated, surgeon


def problem(o, k, samples=None, seed=0):
    random = torch.Generator().manual_seed(seed)
    mixed = torch.randn(samples or 4 * k, k, generator=random) @ torch.randn(k, k, generator=random)
    A = mixed.double().T @ mixed.double() / len(mixed)
    return torch.randn(o, k, generator=random).double(), A + 1e-3 * A.diagonal().mean() * torch.eye(k)


def reference(w, A, count):
    """Remove one weight after the other; the others move by -H^-1 e_q w_q / [H^-1]_qq."""
    w, left, gone, cost = w.clone(), list(range(len(w))), [], []
    for _ in range(count):
        P = torch.linalg.inv(A[left][:, left])
        single = w[left].square() / P.diagonal()
        q = int(single.argmin())
        cost.append(float(single[q]))
        w[left] -= P[:, q] * w[left[q]] / P[q, q]
        w[left[q]] = 0
        gone.append(left.pop(q))
    return w, gone, cost


@pytest.mark.parametrize("k", [1, 2, 7, 40])
@pytest.mark.parametrize("seed", range(3))
def test_one_by_one_as_the_reference(k, seed):
    W, A = problem(4, k, seed=seed)
    damages = surgeon(W, A)
    for row, damage in zip(W, damages, strict=True):
        for count in sorted({1, k // 2, k}):
            w, gone, cost = reference(row, A, count)
            assert damage.argsort()[:count].tolist() == gone
            keep = torch.ones(1, k, dtype=torch.bool)
            keep[0, gone] = False
            found = compensated(row[None], keep, A)[0]
            torch.testing.assert_close(found, w, rtol=1e-6, atol=1e-6)
            assert float((found - row) @ A @ (found - row)) == pytest.approx(sum(cost), rel=1e-6, abs=1e-9)
        rising = torch.tensor(cost, dtype=torch.float64).cummax(0).values
        torch.testing.assert_close(damage.sort().values, rising, rtol=1e-6, atol=1e-9)


def test_shares_at_once_are_nearly_as_good_as_one_by_one(monkeypatch):
    W, A = problem(6, 120)
    errors = []
    for exact in (6 * 120**2, 6 * 20**2):
        monkeypatch.setattr(curvature, "EXACT", exact)
        keep = surgeon(W, A).argsort(1).argsort(1) >= 84
        found = compensated(W, keep, A) - W
        errors.append(float((found @ A * found).sum()))
    blind = compensated(W, W.abs().argsort(1).argsort(1) >= 84, A) - W
    assert errors[1] <= 1.05 * errors[0]
    assert errors[1] < 0.8 * float((blind @ A * blind).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("room", [1, 1 << 20])
def test_compensation_is_the_least_squares_solution_whatever_fits_into_memory(dtype, room, monkeypatch):
    monkeypatch.setattr(curvature, "BYTES", room)
    W, A = problem(9, 20)
    keep = torch.rand(9, 20, generator=torch.Generator().manual_seed(1)) < torch.linspace(0, 1, 9)[:, None]
    found = compensated(W.to(dtype), keep, A)
    L = torch.linalg.cholesky(A)
    for row, kept, mine in zip(W.to(dtype).double(), keep, found, strict=True):
        wanted = torch.zeros(20, dtype=torch.float64)
        if kept.any():
            wanted[kept] = torch.linalg.lstsq(L.T[:, kept], (L.T @ row)[:, None]).solution[:, 0]
        torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=1e-6)
    assert not bool(found[~keep].any())


def test_nothing_removed_changes_nothing():
    W, A = problem(3, 8)
    torch.testing.assert_close(compensated(W, torch.ones_like(W, dtype=torch.bool), A), W)


def test_weights_that_are_zero_go_first_and_cost_nothing():
    W, A = problem(3, 12)
    W[:, ::3] = 0
    damages = surgeon(W, A)
    assert set(damages[0].argsort()[:4].tolist()) == {0, 3, 6, 9}
    assert float(damages[:, ::3].abs().max()) == pytest.approx(0, abs=1e-12)


def test_inputs_that_are_not_related_make_it_magnitude():
    W, _ = problem(4, 15)
    damages = surgeon(W, torch.eye(15, dtype=torch.float64))
    torch.testing.assert_close(damages, W.square(), rtol=1e-9, atol=1e-12)


def test_rows_without_zeros_are_not_solved(monkeypatch):
    """A zero by chance in a trained layer makes it no pruned one."""
    W, A = problem(40, 12)
    keep = torch.ones_like(W, dtype=torch.bool)
    keep[7, 3] = False
    solved, cholesky = [], torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda M: (solved.append(len(M)), cholesky(M))[1])
    before = W.clone()
    found = compensated(W, keep, A)
    assert solved == [1]
    assert torch.equal(W, before)
    others = torch.arange(40) != 7
    assert torch.equal(found[others], W[others])
    assert found[7, 3] == 0

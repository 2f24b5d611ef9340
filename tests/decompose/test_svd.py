"""The output basis against numpy's SVD of B^{1/2} W A^{1/2}, and its damage by brute force."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from taut.decompose.linalg import root
from taut.decompose.outputs import OutputMoment
from taut.decompose.svd import completed, directions, output_basis
from taut.decompose.weighting import Weighting


def definite(g, k):
    X = torch.randn(g, k, 2 * k, dtype=torch.float64)
    return X @ X.mT / k


def truncated(basis, W, r):
    """The rank-r weight (g, o, k)."""
    return basis.up[..., :r] @ (basis.down[:, :r] @ W.flatten(2))


def error(dW, A, B=None):
    """tr(B dW A dW^T), summed over groups."""
    total = 0.0
    for g in range(len(dW)):
        moved = dW[g] @ A[g] @ dW[g].T
        total += float((moved if B is None else B[g] @ moved).trace())
    return total


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("o", "c", "s"), [(6, 5, 2), (12, 2, 3), (5, 5, 1)])
def test_data_metric_meets_the_eckart_young_bound_at_every_rank(groups, o, c, s):
    W, A = torch.randn(groups, o, c, s, dtype=torch.float64), definite(groups, c * s)
    w = Weighting(full=A)
    A = w.regular()
    basis = output_basis(W, w)
    tails = np.zeros(min(o, c * s) + 1)
    for g in range(groups):
        half = scipy.linalg.sqrtm(A[g].numpy()).real
        values = np.linalg.svd(W[g].flatten(1).numpy() @ half, compute_uv=False) ** 2
        tails += np.append(values[::-1].cumsum()[::-1], 0.0)
    lost = basis.lost(None).numpy()
    for r, tail in enumerate(tails):
        found = error(W.flatten(2) - truncated(basis, W, r), A)
        assert found == pytest.approx(tail, rel=1e-10, abs=1e-10 * tails[0])
        assert lost[r] == pytest.approx(tail, rel=1e-10, abs=1e-10 * tails[0])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("o", "k"), [(6, 9), (9, 6)])
def test_fisher_metric_meets_the_bound_of_the_two_sided_svd(groups, o, k):
    W, A, B = torch.randn(groups, o, k, 1, dtype=torch.float64), definite(groups, k), definite(groups, o)
    w = Weighting(full=A)
    A = w.regular()
    basis = output_basis(W, w, B)
    lost = basis.lost(OutputMoment(B)).numpy()
    tails = np.zeros(min(o, k) + 1)
    for g in range(groups):
        left, right = (scipy.linalg.sqrtm(M[g].numpy()).real for M in (B, A))
        values = np.linalg.svd(left @ W[g, :, :, 0].numpy() @ right, compute_uv=False) ** 2
        tails += np.append(values[::-1].cumsum()[::-1], 0.0)
    for r, tail in enumerate(tails):
        assert error(W.flatten(2) - truncated(basis, W, r), A, B) == pytest.approx(tail, rel=1e-9, abs=1e-9 * tails[0])
        assert lost[r] == pytest.approx(tail, rel=1e-9, abs=1e-9 * tails[0])


@given(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7), st.booleans(), st.booleans())
def test_lost_is_the_brute_force_damage_whatever_metric_chose_the_directions(groups, o, k, weigh, fisher):
    """Directions of the data metric, damage in the Fisher metric: what the planner asks."""
    W, A, B = torch.randn(groups, o, k, 1, dtype=torch.float64), definite(groups, k), definite(groups, o)
    w = Weighting(full=A)
    basis = output_basis(W, w, definite(groups, o) if fisher else None)
    lost = basis.lost(OutputMoment(B) if weigh else None)
    assert lost.shape == (min(o, k) + 1,) if o > k else lost.shape == (o + 1,)
    for r in range(len(lost)):
        wanted = error(W.flatten(2) - truncated(basis, W, r), w.regular(), B if weigh else None)
        assert float(lost[r]) == pytest.approx(wanted, rel=1e-8, abs=1e-8 * float(lost[0]))


def test_frobenius_is_the_plain_svd():
    W = torch.randn(1, 7, 3, 4, dtype=torch.float64)
    basis = output_basis(W, Weighting())
    Q, s, V = np.linalg.svd(W.flatten(2)[0].numpy(), full_matrices=False)
    for r in range(8):
        np.testing.assert_allclose(truncated(basis, W, r)[0], (Q[:, :r] * s[:r]) @ V[:r], atol=1e-10)


def test_channel_metric_is_the_full_one_of_uncorrelated_offsets():
    W, A = torch.randn(2, 9, 4, 3, dtype=torch.float64), definite(2, 4)
    full = torch.stack([torch.kron(a, torch.eye(3, dtype=torch.float64)) for a in A])
    found, wanted = output_basis(W, Weighting(channel=A)), output_basis(W, Weighting(full=full))
    torch.testing.assert_close(found.lost(None), wanted.lost(None), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(truncated(found, W, 4), truncated(wanted, W, 4), rtol=1e-6, atol=1e-8)


def test_a_sketch_of_all_rows_finds_the_directions_of_the_full_metric():
    rows = torch.randn(1, 60, 20, dtype=torch.float64) * torch.linspace(3, 0.1, 20)
    W = torch.randn(1, 8, 20, 1, dtype=torch.float64)
    sketched, full = output_basis(W, Weighting(sketch=rows)), output_basis(W, Weighting(full=rows.mT @ rows))
    torch.testing.assert_close(sketched.lost(None), full.lost(None), rtol=1e-2, atol=1e-4 * float(full.lost(None)[0]))
    torch.testing.assert_close(
        truncated(sketched, W, 5), truncated(full, W, 5), rtol=0, atol=0.02 * float(W.abs().max())
    )


def test_directions_of_a_moment_are_those_of_the_weight():
    W, A = torch.randn(1, 5, 8, 1, dtype=torch.float64), definite(1, 8)
    w = Weighting(full=A)
    torch.testing.assert_close(directions(w.gram(W)).energy, output_basis(W, w).energy)


@pytest.mark.parametrize("change", [torch.zeros_like, lambda W: W[:, :, :1].expand_as(W)], ids=["zero", "rank one"])
def test_degenerate_weights_lose_nothing_beyond_their_rank(change):
    W = change(torch.randn(1, 6, 8, 1, dtype=torch.float64))
    basis = output_basis(W, Weighting(full=definite(1, 8)))
    lost = basis.lost(None)
    assert bool(lost.isfinite().all())
    assert float(lost[1:].abs().max()) <= 1e-12 * max(1.0, float(lost[0]))
    torch.testing.assert_close(truncated(basis, W, 1), W.flatten(2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("fisher", [False, True])
def test_directions_of_the_rest_complete_a_basis(fisher):
    """Each column more explains more, no one is empty, and all together give the weight."""
    W, B = torch.randn(2, 9, 7, dtype=torch.float64), definite(2, 9)
    half = root(B) if fisher else None
    basis = directions(W @ W.mT, half, 3)
    missing = []
    for rank in range(1, 8):
        up, down = completed(W, basis.up, basis.down, rank)
        assert up.shape[-1] == down.shape[1] == rank
        product = up @ (down @ W)
        assert bool((up.norm(dim=1) * (down @ W).norm(dim=2) > 1e-6).all())
        missing.append(float((W - product).square().sum()))
    assert missing[2:] == sorted(missing[2:], reverse=True)
    assert missing[-1] < 1e-18 * float(W.square().sum())

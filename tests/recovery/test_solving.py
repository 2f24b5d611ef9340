"""Ridge regression of a layer against numpy's normal equations."""

import numpy as np
import pytest
import torch
from torch import nn

from taut.recovery.solving import HELD_OUT, RIDGES, Moments, least_squares
from taut.structure.patches import grouped_weight


def ridge_step(X, R, share):
    """Argmin over D of |R - X D^T|^2 / n + share mean(X^2) |D|^2, (o, k), by numpy."""
    n, k = X.shape
    return np.linalg.solve(X.T @ X / n + share * (X**2).mean() * np.eye(k), X.T @ R / n).T


def oracle(W, X, Y):
    """The weight (g, o, k) with the ridge that predicts the last fifth best, or W itself if none helps there."""
    g, n = X.shape[:2]
    cut = int(n * (1 - HELD_OUT))
    R = Y - X @ W.transpose(0, 2, 1)

    def held(share):
        return sum(
            ((R[i, cut:] - X[i, cut:] @ ridge_step(X[i, :cut], R[i, :cut], share).T) ** 2).sum() for i in range(g)
        )

    best = min(RIDGES, key=held)
    if held(best) >= (R[:, cut:] ** 2).sum():
        return W
    return W + np.stack([ridge_step(X[i], R[i], best) for i in range(g)])


def problem(n, noise, groups=2, c=3, o=4):
    conv = nn.Conv2d(c * groups, o * groups, 2, groups=groups).double()
    W = grouped_weight(conv).flatten(2)
    rows = torch.randn(groups, n, 4 * c, dtype=torch.float64) + 0.5
    truth = W + 0.3 * torch.randn_like(W)
    target = rows @ truth.mT + 2.0 + noise * torch.randn(groups, n, o, dtype=torch.float64)
    return conv, rows, target


@pytest.mark.parametrize("n", [200, 40, 9], ids=["tall", "square", "dual"])
@pytest.mark.parametrize("noise", [0.0, 0.3, 10.0])
@pytest.mark.parametrize("centred", [True, False])
def test_least_squares_is_the_ridge_of_numpy(n, noise, centred):
    conv, rows, target = problem(n, noise)
    moments = Moments.of(rows.clone(), centred=centred)
    W, bias = least_squares(conv, moments, target, centred=centred)
    X, Y = rows.numpy(), target.numpy()
    if centred:
        X, Y = X - X.mean(1, keepdims=True), Y - Y.mean(1, keepdims=True)
    wanted = oracle(grouped_weight(conv).flatten(2).numpy(), X, Y)
    np.testing.assert_allclose(W.numpy(), wanted, rtol=1e-8, atol=1e-10)
    if not centred:
        return  # a layer with a bias is always centred
    left = target - rows @ W.mT - bias.reshape(2, 1, -1)
    torch.testing.assert_close(left.mean(1), torch.zeros(2, 4).double(), rtol=0, atol=1e-10)


def test_a_layer_without_bias_gets_none():
    fc = nn.Linear(5, 3, bias=False)
    rows = torch.randn(1, 40, 5)
    W, bias = least_squares(fc, Moments.of(rows.clone(), centred=False), rows @ torch.randn(1, 5, 3), centred=False)
    assert bias is None
    assert W.shape == (1, 3, 5)


def test_dual_and_primal_meet_where_rows_and_columns_are_as_many():
    """One row more or less moves the solver from one form to the other, not the answer."""
    X = torch.randn(1, 30, 24, dtype=torch.float64)
    conv = nn.Conv1d(24, 2, 1).double()
    for n in (23, 24, 25):
        rows = X[:, :n]
        target = rows @ torch.randn(1, 24, 2, dtype=torch.float64)
        W, _ = least_squares(conv, Moments.of(rows.clone(), centred=False), target, centred=False)
        wanted = oracle(grouped_weight(conv).flatten(2).numpy(), rows.numpy(), target.numpy())
        np.testing.assert_allclose(W.numpy(), wanted, rtol=1e-7, atol=1e-9)


def test_a_perfect_layer_stays_bit_by_bit():
    fc = nn.Linear(6, 4)
    rows = torch.randn(1, 50, 6)
    target = rows @ fc.weight.detach().T[None]
    W, _ = least_squares(fc, Moments.of(rows.clone(), centred=False), target, centred=False)
    torch.testing.assert_close(W[0], fc.weight.detach(), rtol=0, atol=1e-6)


def test_of_many_outputs_some_combinations_choose_the_same_ridge(monkeypatch):
    fc = nn.Linear(40, 700)
    rows = torch.randn(1, 160, 40)
    target = rows @ fc.weight.detach().T + rows @ torch.randn(1, 40, 700) * 0.05 + 0.3 * torch.randn(1, 160, 700)
    found = []
    for mixes in (256, 700):
        monkeypatch.setattr("taut.recovery.solving.MIXES", mixes)
        found.append(least_squares(fc, Moments.of(rows.clone(), centred=False), target, centred=False)[0])
    assert torch.equal(*found)


def test_noise_alone_moves_nothing():
    """What does not help on held-out rows is left alone: the weight stays exactly."""
    fc = nn.Linear(30, 4).double()
    rows = torch.randn(1, 40, 30, dtype=torch.float64)
    target = rows @ fc.weight.detach().T + 5 * torch.randn(1, 40, 4, dtype=torch.float64)
    W, _ = least_squares(fc, Moments.of(rows.clone(), centred=True), target, centred=True)
    wanted = oracle(
        fc.weight.detach().numpy()[None], *(t - t.mean(1, keepdims=True) for t in (rows.numpy(), target.numpy()))
    )
    np.testing.assert_allclose(W.numpy(), wanted, atol=1e-9)
    assert float((W - fc.weight.detach()).norm()) < 0.6 * float(
        torch.linalg.lstsq(rows[0], target[0] - rows[0] @ fc.weight.detach().T)[0].norm()
    )


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_few_rows_are_no_error(n):
    fc = nn.Linear(6, 4)
    rows = torch.randn(1, n, 6)
    W, bias = least_squares(fc, Moments.of(rows.clone(), centred=True), torch.randn(1, n, 4), centred=True)
    assert bool(W.isfinite().all())
    assert bool(bias.isfinite().all())
    if n == 1:
        torch.testing.assert_close(W[0], fc.weight.detach())


@pytest.mark.parametrize("change", [torch.zeros_like, torch.ones_like], ids=["zero", "constant"])
def test_inputs_without_variance_leave_the_weight_alone(change):
    fc = nn.Linear(6, 4)
    rows = change(torch.empty(1, 50, 6))
    target = torch.randn(1, 50, 4)
    W, bias = least_squares(fc, Moments.of(rows.clone(), centred=True), target, centred=True)
    torch.testing.assert_close(W[0], fc.weight.detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(rows[0, :1] @ W[0].T + bias, target[0].mean(0, keepdim=True), rtol=1e-4, atol=1e-5)


def test_moments():
    rows = torch.randn(2, 20, 5, dtype=torch.float64) + 3
    centred, plain = Moments.of(rows.clone(), centred=True), Moments.of(rows.clone(), centred=False)
    torch.testing.assert_close(centred.gram[0], torch.from_numpy(np.cov(rows[0].numpy().T, bias=True)))
    torch.testing.assert_close(plain.gram, rows.mT @ rows / 20)
    assert torch.equal(centred.rows + centred.mean, rows) or torch.allclose(centred.rows + centred.mean, rows)
    assert not bool(plain.mean.any())
    assert Moments.of(rows[:, :4], centred=False).gram is None


def test_half_precision_layers_are_solved_in_float32():
    fc = nn.Linear(5, 3).half()
    rows = torch.randn(1, 60, 5)
    truth = torch.randn(3, 5)
    W, bias = least_squares(fc, Moments.of(rows.clone(), centred=True), rows @ truth.T + 1, centred=True)
    assert W.dtype == torch.float32
    torch.testing.assert_close(W[0], truth, rtol=0, atol=0.02)
    torch.testing.assert_close(bias.float(), torch.ones(3), rtol=0, atol=0.02)

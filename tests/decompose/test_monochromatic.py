"""Monochromatic filters: planted colours found, better than the source's way, best in the metric that is asked for."""

import pytest
import torch

from taut.decompose.bicluster import second_moments
from taut.decompose.monochromatic import Colours, monochromatic, paper
from taut.decompose.weighting import Weighting

NONE = Weighting()


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(size, seed=0, decay=2.0):
    """A second moment with a spread of eigenvalues, in no special position."""
    turn = torch.linalg.qr(randn(size, size, seed=seed))[0]
    return ((turn * torch.logspace(0, -decay, size, dtype=torch.float64)) @ turn.T)[None]


def planted(F, C, S, k, seed=0, noise=0.0):
    """A kernel of k colours in shuffled order with random signs, and which output has which."""
    labels = torch.arange(k).repeat(F // k)[torch.randperm(F, generator=torch.Generator().manual_seed(seed))]
    colours = randn(k, C, seed=seed)[labels] * randn(F, 1, seed=seed + 1).sign()
    W = colours[:, :, None] * randn(F, 1, S, seed=seed + 2)
    return W + noise * W.std() * randn(F, C, S, seed=seed + 3), labels


def partition(labels):
    return {frozenset(torch.where(labels == colour)[0].tolist()) for colour in labels.unique()}


def wrong(W, found, A=None, weights=None):
    """tr(B dW A dW^T) with a diagonal B; A is that of the unfolded or of the channels alone."""
    dW = (W - found.compose()).double()
    if weights is not None:
        dW = dW * weights.sqrt()[:, None, None]
    if A is None:
        return float(dW.square().sum())
    if len(A) == dW.shape[1]:
        return float(torch.einsum("fcs,cd,fds->", dW, A, dW))
    return float((dW.flatten(1) @ A * dW.flatten(1)).sum())


def test_compose_gives_every_output_its_own_colour_times_its_taps():
    labels, colours, taps = torch.tensor([1, 0, 1]), randn(2, 4), randn(3, 5)
    W = Colours(labels, colours, taps).compose()
    for f in range(3):
        torch.testing.assert_close(W[f], torch.outer(colours[labels[f]], taps[f]))


@pytest.mark.parametrize("form", ["frobenius", "full", "channel"])
@pytest.mark.parametrize(("F", "C", "S", "k"), [(24, 3, 9, 4), (30, 5, 4, 6), (16, 8, 3, 2), (12, 4, 25, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_planted_colours_are_found(form, F, C, S, k, seed):
    W, labels = planted(F, C, S, k, seed)
    weighting = {
        "frobenius": NONE,
        "full": Weighting(full=covariance(C * S, seed)),
        "channel": Weighting(channel=covariance(C, seed)),
    }[form]
    found = monochromatic(W, k, weighting)
    assert partition(found.labels) == partition(labels)
    assert found.labels.bincount().tolist() == [F // k] * k
    torch.testing.assert_close(found.compose(), W, rtol=0, atol=1e-6 * float(W.abs().max()))


@pytest.mark.parametrize("seed", range(4))
def test_planted_colours_are_found_under_noise(seed):
    W, labels = planted(24, 6, 9, 4, seed, noise=0.05)
    for found in (monochromatic(W, 4, NONE), monochromatic(W, 4, Weighting(full=covariance(54, seed, decay=0.5)))):
        assert partition(found.labels) == partition(labels)
        assert wrong(W, found) <= 0.06**2 * float(W.square().sum())


@pytest.mark.parametrize("seed", range(3))
def test_the_sources_way_finds_planted_colours_too(seed):
    W, labels = planted(24, 6, 9, 4, seed)
    found = paper(W, 4)
    assert partition(found.labels) == partition(labels)
    torch.testing.assert_close(found.compose(), W, rtol=0, atol=1e-6 * float(W.abs().max()))


@pytest.mark.parametrize("k", [1, 2, 4, 8])
@pytest.mark.parametrize("seed", range(4))
def test_lines_and_taps_fitted_again_beat_the_sources_way(k, seed):
    low, _ = planted(32, 3, 49, 8, seed, noise=0.5)
    for W in (randn(32, 3, 49, seed=seed), randn(32, 8, 9, seed=seed), low):
        assert wrong(W, monochromatic(W, k, NONE)) <= wrong(W, paper(W, k)) * (1 + 1e-9)


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_given_the_clusters_the_frobenius_fit_is_the_best_one(k, seed):
    """The outputs of one colour, side by side, are a matrix of rank 1: the singular value decomposition is best."""
    W = randn(16, 5, 9, seed=seed)
    found = monochromatic(W, k, NONE)
    for colour in range(k):
        members = W[found.labels == colour]
        left = torch.linalg.svdvals(members.transpose(0, 1).flatten(1))[1:].square().sum()
        error = (members - found.compose()[found.labels == colour]).square().sum()
        torch.testing.assert_close(error, left, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_each_metric_is_best_in_itself(k, seed):
    W = randn(16, 4, 9, seed=seed)
    A = covariance(36, seed)
    ours, plain = monochromatic(W, k, Weighting(full=A)), monochromatic(W, k, NONE)
    assert wrong(W, ours, A[0]) < wrong(W, plain, A[0])
    assert wrong(W, plain) < wrong(W, ours)
    channel = covariance(4, seed)
    ours = monochromatic(W, k, Weighting(channel=channel))
    assert wrong(W, ours, channel[0]) < wrong(W, plain, channel[0])


@pytest.mark.parametrize("seed", range(3))
def test_the_channel_form_is_the_frobenius_fit_of_the_whitened_kernel(seed):
    """In A = L L^T over the channels, ||L^T dW|| is the error: lines of L^T W, whatever root L is taken."""
    W, A = randn(16, 4, 9, seed=seed), covariance(4, seed)
    moments = second_moments(Weighting(channel=A), 4)
    L = torch.linalg.cholesky(moments)
    white = torch.einsum("cd,fcs->fds", L, W)
    found, again = monochromatic(W, 4, Weighting(channel=A)), monochromatic(white, 4, NONE)
    assert partition(found.labels) == partition(again.labels)
    assert wrong(W, found, moments) == pytest.approx(wrong(white, again), rel=1e-9)


def test_a_full_metric_without_correlations_between_offsets_is_the_channel_form():
    W, A = randn(16, 4, 9), covariance(4)
    full = torch.einsum("gcd,st->gcsdt", A, torch.eye(9, dtype=torch.float64)).reshape(1, 36, 36)
    one, other = monochromatic(W, 4, Weighting(full=full)), monochromatic(W, 4, Weighting(channel=A))
    assert wrong(W, one, A[0]) <= wrong(W, other, A[0]) * (1 + 1e-6)


@pytest.mark.parametrize("form", [NONE, Weighting(full=covariance(36)), Weighting(channel=covariance(4))])
def test_as_many_colours_as_outputs_are_the_best_rank_one_of_every_filter(form):
    W = randn(10, 4, 9)
    found = monochromatic(W, 10, form)
    assert sorted(found.labels.tolist()) == list(range(10))
    if form.full is not None:
        A = form.regular()[0]
        for f in range(10):  # at a stationary point neither taps nor colour can be improved alone
            dW, colour, taps = W[f] - found.compose()[f], found.colours[found.labels[f]], found.taps[f]
            gradient = (dW.flatten() @ A).reshape(4, 9)
            for slope in (colour @ gradient, gradient @ taps):
                assert float(slope.norm()) <= 1e-2 * float((W[f].flatten() @ A).norm())
        return
    L = torch.eye(4, dtype=torch.float64) if form.channel is None else torch.linalg.cholesky(second_moments(form, 4))
    U, s, Vh = torch.linalg.svd(torch.einsum("cd,fcs->fds", L, W), full_matrices=False)
    best = torch.einsum("dc,fd,f,fs->fcs", torch.linalg.inv(L), U[..., 0], s[:, 0], Vh[:, 0])
    torch.testing.assert_close(found.compose(), best, rtol=0, atol=1e-8)


def test_weights_turn_the_colours_towards_the_outputs_that_matter():
    W, weights = randn(16, 4, 9), torch.logspace(-3, 3, 16, dtype=torch.float64)[torch.randperm(16)]
    for form in (NONE, Weighting(full=covariance(36)), Weighting(channel=covariance(4))):
        A = None if not form.known else (form.channel if form.full is None else form.full)[0]
        heavy, light = monochromatic(W, 2, form, weights), monochromatic(W, 2, form)
        assert wrong(W, heavy, A, weights) < wrong(W, light, A, weights)
        flat = monochromatic(W, 2, form, torch.full((16,), 3.0))
        assert wrong(W, flat, A) == pytest.approx(wrong(W, light, A), rel=1e-6)


@pytest.mark.parametrize("form", [NONE, Weighting(full=covariance(27)), Weighting(channel=covariance(3))])
def test_zeros_and_single_dead_filters_are_finite(form):
    dead = randn(12, 3, 9)
    dead[::3] = 0
    for W in (torch.zeros(12, 3, 9), dead, torch.ones(12, 3, 9)):
        for found in (monochromatic(W, 4, form), paper(W, 4)):
            assert found.labels.bincount(minlength=4).tolist() == [3] * 4
            assert bool(found.compose().isfinite().all())
            assert float(found.compose()[W.flatten(1).norm(dim=1) == 0].abs().sum()) <= 1e-12


@pytest.mark.parametrize("form", [NONE, Weighting(full=covariance(36)), Weighting(channel=covariance(4))])
def test_more_colours_never_fit_much_worse_and_one_run_is_like_the_other(form):
    W = randn(24, 4, 9)
    A = None if not form.known else (form.channel if form.full is None else form.full)[0]
    found = [wrong(W, monochromatic(W, k, form), A) for k in (1, 2, 4, 12, 24)]
    assert found == sorted(found, reverse=True)
    one, other = monochromatic(W, 4, form), monochromatic(W, 4, form)
    assert torch.equal(one.compose(), other.compose())

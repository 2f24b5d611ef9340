"""Moments of few rows against the truth, and the two forms against each other."""

import pytest
import torch

from taut.decompose.shrinking import HeldOut, shrunk, shrunk_rows


def sample(n, scale):
    return torch.randn(1, n, len(scale)) * scale


def moments(n, held, scale):
    """Moment of n rows, the held-out ones in both forms, and the trace of all."""
    X, H = sample(n, scale), sample(held, scale)
    A, B = X.mT @ X / n, H.mT @ H / held
    total = (A.diagonal(dim1=-2, dim2=-1).sum(-1) * n + B.diagonal(dim1=-2, dim2=-1).sum(-1) * held) / (n + held)
    return X / n**0.5, A, HeldOut(moment=B), HeldOut(rows=H / held**0.5), total


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("n", [30, 100, 500])
def test_it_is_nearer_the_truth_in_every_direction(power, n):
    """Energies along the sample's own eigenvectors: where most go wrong who look for what can be left out."""
    scale = torch.arange(1, 101).float() ** -(power / 2)
    _, A, moment, _, total = moments(n, 60, scale)
    found = shrunk(A, moment, total)
    V = torch.linalg.eigh(A)[1]
    truth = (V * scale[:, None]).square().sum(1)[0]
    raw, better = ((V.mT @ M @ V).diagonal(dim1=-2, dim2=-1)[0] for M in (A, found))
    small = slice(0, max(50, 100 - n))  # all that no row has: within it the eigenvectors are any
    assert float(better[small].sum()) == pytest.approx(float(truth[small].sum()), rel=0.35)
    assert float((better - truth).square().sum()) < float((raw - truth).square().sum()) + 0.02 * float(truth.sum())
    assert float(found.diagonal(dim1=-2, dim2=-1).sum()) == pytest.approx(float(total), rel=1e-4)


def test_rows_say_what_their_moment_says():
    _, A, moment, rows, total = moments(200, 40, torch.linspace(2, 0.1, 30))
    torch.testing.assert_close(moment.trace(), rows.trace(), rtol=1e-5, atol=0)
    torch.testing.assert_close(shrunk(A, moment, total), shrunk(A, rows, total), rtol=1e-3, atol=1e-4)


def test_a_sketch_of_all_rows_is_shrunk_as_their_moment():
    X, A, _, rows, total = moments(20, 12, torch.linspace(2, 0.1, 60))
    thin, beside = shrunk_rows(X, rows, total)
    assert thin.shape == X.shape
    found = thin.mT @ thin + beside[:, None, None] * torch.eye(60)
    wanted = shrunk(A, rows, total)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.02 * float(found.max()))
    torch.testing.assert_close(
        found.diagonal(dim1=1, dim2=2).sum(), wanted.diagonal(dim1=1, dim2=2).sum(), rtol=0.02, atol=0
    )


def test_what_no_row_has_stays_without_energy():
    """Inputs that are always zero are free in truth."""
    scale = torch.cat([torch.ones(10), torch.zeros(10)])
    _, A, moment, _, total = moments(15, 8, scale)
    assert float(shrunk(A, moment, total)[0, 10:, 10:].abs().max()) < 1e-6


@pytest.mark.parametrize("held", [torch.zeros(1, 4, 6), torch.full((1, 4, 6), 1e-30)])
def test_held_out_rows_without_energy_say_nothing(held):
    X = torch.randn(1, 5, 6)
    A = X.mT @ X
    found = shrunk(A, HeldOut(rows=held), A.diagonal(dim1=-2, dim2=-1).sum(-1))
    assert bool(found.isfinite().all())
    assert bool(shrunk(torch.zeros(1, 6, 6), HeldOut(rows=held), torch.zeros(1)).isfinite().all())


def test_groups_are_apart():
    one, two = (moments(20, 10, torch.linspace(a, 0.1, 16)) for a in (1, 3))
    both = HeldOut(moment=torch.cat([one[2].moment, two[2].moment]))
    found = shrunk(torch.cat([one[1], two[1]]), both, torch.cat([one[4], two[4]]))
    torch.testing.assert_close(found[1:], shrunk(two[1], two[2], two[4]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("n", [30, 100, 500])
def test_a_large_one_is_about_what_all_eigenvectors_give(power, n, monkeypatch):
    """The energy of the directions in which the sample has least, and the trace."""
    scale = torch.arange(1, 161).float() ** -(power / 2)
    _, A, moment, rows, total = moments(n, 60, scale)
    wanted = shrunk(A, moment, total)
    monkeypatch.setattr("taut.decompose.shrinking.LARGE", 8)
    found, same = shrunk(A, moment, total), shrunk(A, rows, total)
    torch.testing.assert_close(found, same, rtol=1e-3, atol=1e-4 * float(found.max()))
    V = torch.linalg.eigh(A)[1]
    for half in (slice(0, 80), slice(80, 160)):
        mine, theirs = ((V.mT @ M @ V).diagonal(dim1=-2, dim2=-1)[0, half].sum() for M in (found, wanted))
        assert float(mine) == pytest.approx(float(theirs), rel=0.2)
    assert float(torch.linalg.eigvalsh(found)[0, 0]) > -1e-5 * float(found.max())
    assert float(found.diagonal(dim1=-2, dim2=-1).sum()) == pytest.approx(float(total), rel=1e-4)


def test_a_large_one_of_fewer_rows_than_leading_directions(monkeypatch):
    monkeypatch.setattr("taut.decompose.shrinking.LARGE", 8)
    _, A, moment, _, total = moments(5, 20, torch.ones(160))
    values = torch.linalg.eigvalsh(shrunk(A, moment, total))[0]
    assert float(values[0]) == pytest.approx(1.0, rel=0.2)
    nothing = shrunk(torch.zeros(1, 160, 160), HeldOut(moment=torch.zeros(1, 160, 160)), torch.zeros(1))
    assert not bool(nothing.any())

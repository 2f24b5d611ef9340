"""Output moments held as a matrix and as rows: the same answers."""

import pytest
import torch

from taut.decompose.outputs import LIMIT, ROW_BYTES, OutputMoment, rows_for, squared_error
from taut.decompose.weighting import Weighting


def both(g=2, m=12, o=8):
    rows = torch.randn(g, m, o, dtype=torch.float64)
    return OutputMoment(rows.mT @ rows), OutputMoment(rows=rows)


def test_either_form_answers_alike():
    matrix, rows = both()
    assert matrix.shape == rows.shape == (2, 8, 8)
    torch.testing.assert_close(matrix.diagonal(), rows.diagonal())
    U = torch.randn(2, 8, 5, dtype=torch.float64)
    torch.testing.assert_close(matrix.along(U), rows.along(U))
    torch.testing.assert_close(matrix.between(U), rows.between(U))
    torch.testing.assert_close(matrix.between(U).diagonal(dim1=-2, dim2=-1), matrix.along(U))


@pytest.mark.parametrize("form", ["full", "channel", "sketch", "none"])
def test_errors_are_traces(form):
    matrix, rows = both(o=6)
    W = torch.randn(2, 6, 4, 3, dtype=torch.float64)
    X = torch.randn(2, 20, 4 if form == "channel" else 12, dtype=torch.float64)
    w = Weighting() if form == "none" else Weighting(**{form: X if form == "sketch" else X.mT @ X})
    wanted = (w.gram(W) * matrix.full).sum()
    torch.testing.assert_close(squared_error(w, W, matrix), wanted)
    torch.testing.assert_close(squared_error(w, W, rows), wanted)
    torch.testing.assert_close(squared_error(w, W, None), w.gram(W).diagonal(dim1=-2, dim2=-1).sum())


@pytest.mark.parametrize("left", [[0, 2, 3], [8, 9, 10], [1, 5, 9, 13]])
def test_fewer_outputs_leave_the_same_of_either_form(left):
    """The same of every group, or whole groups alone."""
    matrix, rows = both(g=4 if len(left) == 4 else 2, o=4 if len(left) == 4 else 8)
    left = torch.tensor(left)
    one, two = matrix.narrowed(left), rows.narrowed(left)
    assert one.shape == two.shape
    torch.testing.assert_close(one.full, two.rows.mT @ two.rows)


def test_a_moment_without_anything_is_none():
    with pytest.raises(ValueError, match="neither a matrix nor rows"):
        OutputMoment().diagonal()


@pytest.mark.parametrize("outputs", [LIMIT + 1, 16_000, 50_000, 250_000])
def test_rows_are_bounded(outputs):
    assert 256 <= rows_for(outputs) <= 1024
    assert rows_for(outputs) == 256 or rows_for(outputs) * outputs * 4 <= ROW_BYTES

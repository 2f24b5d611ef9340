"""The gauge: same product, equal norms."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from taut.decompose.balance import equalize, orthogonalize

SIZES = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))


@given(SIZES, st.floats(1e-6, 1e6))
def test_equalize_keeps_the_product_and_evens_the_norms(sizes, scale):
    g, o, r, n = sizes
    first, second = scale * torch.randn(g, r, n, dtype=torch.float64), torch.randn(g, o, r, dtype=torch.float64)
    a, b = equalize(first, second)
    product = second @ first
    torch.testing.assert_close(b @ a, product, rtol=1e-10, atol=1e-12 * float(product.abs().max()))
    torch.testing.assert_close(a.norm(dim=-1), b.norm(dim=-2), rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equalize_leaves_zero_components_as_they_are(dtype):
    first, second = torch.randn(1, 3, 4, dtype=dtype), torch.randn(1, 5, 3, dtype=dtype)
    first[:, 1] = 0
    a, b = equalize(first, second)
    assert bool(a.isfinite().all())
    assert bool(b.isfinite().all())
    assert torch.equal(a[:, 1], first[:, 1])
    assert torch.equal(b[:, :, 1], second[:, :, 1])
    torch.testing.assert_close(b @ a, second @ first)


@given(SIZES, st.integers(1, 4), st.floats(1e-6, 1e6))
def test_orthogonalize_keeps_the_product_and_evens_the_norms(sizes, offsets, scale):
    g, o, r, extra = sizes
    first = scale * torch.randn(g, r, r + extra, dtype=torch.float64)
    second = torch.randn(g, o, r, offsets, dtype=torch.float64)
    a, b = orthogonalize(first, second)
    product = torch.einsum("gorp,grn->gonp", second, first)
    top = float(product.abs().max())
    torch.testing.assert_close(torch.einsum("gorp,grn->gonp", b, a), product, rtol=1e-9, atol=1e-11 * top)
    gram = a @ a.mT
    norms = gram.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(gram, torch.diag_embed(norms), rtol=0, atol=1e-9 * float(norms.max()))
    torch.testing.assert_close(norms.sqrt(), b.transpose(1, 2).flatten(2).norm(dim=-1), rtol=1e-9, atol=0)


def test_orthogonalize_survives_zero_and_dependent_rows():
    first = torch.randn(1, 3, 5, dtype=torch.float64)
    first[:, 1], first[:, 2] = 0, first[:, 0]
    second = torch.randn(1, 4, 3, 2, dtype=torch.float64)
    a, b = orthogonalize(first, second)
    assert bool(a.isfinite().all())
    assert bool(b.isfinite().all())
    wanted = torch.einsum("gorp,grn->gonp", second, first)
    torch.testing.assert_close(torch.einsum("gorp,grn->gonp", b, a), wanted, rtol=1e-9, atol=1e-12)

"""Rows of a layer against F.unfold and against the layer itself: rows @ weight^T + bias is its output."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that every torch user knows

from cases import CONVS
from taut.errors import ModelError
from taut.structure.patches import (
    bias_of,
    choose,
    fan_in,
    gram,
    grouped_weight,
    groups_of,
    input_rows,
    output_rows,
    positions,
    row_budget,
    weight_of,
)


def product(module, rows):
    """What the rows give: (g, rows, o)."""
    out = rows @ grouped_weight(module).flatten(2).mT
    bias = bias_of(module)
    return out if bias is None else out + bias.detach().reshape(groups_of(module), 1, -1)


@pytest.mark.parametrize("name", [one.name for one in CONVS])
def test_rows_times_weight_is_the_output_of_every_flavour(name):
    model, x = next(one for one in CONVS if one.name == name).make()
    out = model(x)
    total = positions(model.conv, out)
    for index in (torch.arange(total), torch.randint(total, (7,)).sort().values):
        rows = input_rows(model.conv, x, out, index)
        assert rows.shape == (groups_of(model.conv), len(index), fan_in(model.conv))
        torch.testing.assert_close(product(model.conv, rows), output_rows(model.conv, out, index), rtol=1e-4, atol=1e-5)
    assert torch.equal(output_rows(model.conv, out), output_rows(model.conv, out, torch.arange(total)))


@pytest.mark.parametrize(
    "settings",
    [{}, {"stride": 2}, {"padding": 2}, {"dilation": 2}, {"stride": (2, 1), "padding": (0, 3), "dilation": (1, 2)}],
)
def test_rows_are_those_of_unfold(settings):
    conv = nn.Conv2d(3, 4, (3, 2), **settings)
    x = torch.randn(2, 3, 9, 8)
    out = conv(x)
    rows = input_rows(conv, x, out, torch.arange(positions(conv, out)))
    wanted = F.unfold(x, (3, 2), **settings).transpose(1, 2).reshape(1, -1, 18)
    torch.testing.assert_close(rows, wanted, rtol=0, atol=0)
    few = torch.tensor([1, 4, positions(conv, out) - 1])  # copied otherwise than many
    torch.testing.assert_close(input_rows(conv, x, out, few), wanted[:, few], rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_rows_of_other_paddings_are_those_of_the_padded_input(mode):
    conv = nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode=mode, stride=2)
    x = torch.randn(2, 3, 7, 6)
    out = conv(x)
    rows = input_rows(conv, x, out, torch.arange(positions(conv, out)))
    wanted = F.unfold(F.pad(x, (1, 1, 2, 2), mode=mode), 3, stride=2).transpose(1, 2).reshape(1, -1, 27)
    torch.testing.assert_close(rows, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("channels_last", [False, True])
def test_layout_of_the_input_does_not_matter(channels_last):
    conv = nn.Conv2d(4, 6, 3)
    x = torch.randn(2, 4, 6, 7)
    given = x.to(memory_format=torch.channels_last) if channels_last else x.mT.contiguous().mT
    out = conv(given)
    index = torch.arange(positions(conv, out))
    assert torch.equal(input_rows(conv, given, out, index), input_rows(conv, x, conv(x), index))


@pytest.mark.parametrize(("conv", "shape"), [(nn.Conv1d(4, 6, 3), (4, 9)), (nn.Conv2d(4, 6, 3, groups=2), (4, 5, 6))])
def test_unbatched_inputs(conv, shape):
    x = torch.randn(shape)
    out = conv(x)
    index = torch.arange(positions(conv, out))
    assert len(index) == out[0].numel()
    torch.testing.assert_close(product(conv, input_rows(conv, x, out, index)), output_rows(conv, out))


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 2, 2, 5)])
def test_linear_rows_of_any_leading_shape(shape):
    fc = nn.Linear(5, 4)
    x = torch.randn(shape)
    out = fc(x)
    total = positions(fc, out)
    assert total == x.numel() // 5
    index = torch.arange(total).flip(0)
    torch.testing.assert_close(product(fc, input_rows(fc, x, out, index)), output_rows(fc, out, index))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_halves_are_widened_and_doubles_kept(dtype):
    fc = nn.Linear(5, 4).to(dtype)
    x = torch.randn(3, 5).to(dtype)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    out = fc(x)
    assert input_rows(fc, x, out, torch.arange(3)).dtype == wanted
    assert output_rows(fc, out).dtype == wanted
    assert grouped_weight(fc).dtype == wanted
    assert not input_rows(fc, x.requires_grad_(), out, torch.arange(3)).requires_grad
    assert not output_rows(fc, out).requires_grad


def test_grouped_weight_splits_outputs_by_group():
    conv = nn.Conv2d(4, 6, (3, 2), groups=2)
    W = grouped_weight(conv)
    assert W.shape == (2, 3, 2, 6)
    assert torch.equal(W[1, 2, 0], conv.weight[5, 0].flatten())


def test_gram_is_the_sum_over_rows_in_float64():
    rows = torch.randn(2, 30, 4)
    wanted = sum(torch.einsum("gi,gj->gij", row, row) for row in rows.double().unbind(1))
    assert gram(rows).dtype == torch.float64
    torch.testing.assert_close(gram(rows), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("total", "rows"), [(10, 10), (10, 99), (100, 50), (10_000, 20), (1, 1)])
def test_choose_is_ascending_in_range_and_repeatable(total, rows):
    index = choose(total, rows, seed=3)
    assert len(index) == min(total, rows)
    assert bool((index[1:] >= index[:-1]).all())
    assert 0 <= int(index.min()) <= int(index.max()) < total
    assert torch.equal(index, choose(total, rows, seed=3))
    if rows >= total:
        assert torch.equal(index, torch.arange(total))
    else:
        assert not torch.equal(index, choose(total, rows, seed=4))


def test_choose_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    choose(1000, 10, seed=1)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("columns", "total"), [(1, 10), (100, 10**6), (10**5, 10**6), (10**6, 10**6), (0, 5)])
def test_row_budget_stays_within_data_and_memory(columns, total):
    rows = row_budget(columns, total)
    assert 1 <= rows <= total
    assert rows <= max(256, (1 << 28) // (4 * max(columns, 1)))
    if columns == 100:
        assert rows >= 12 * columns


def test_weight_and_bias_of():
    fc = nn.Linear(3, 2, bias=False)
    assert weight_of(fc) is fc.weight
    assert bias_of(fc) is None
    assert fan_in(nn.Conv2d(4, 6, 3, groups=2)) == 18
    with pytest.raises(ModelError, match="BatchNorm1d without a weight"):
        weight_of(nn.BatchNorm1d(3, affine=False))


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("kind", ["float32", "float64", "bfloat16", "channels_last", "unbatched"])
def test_many_rows_are_those_that_few_are(kind, groups):
    """Both ways of copying, piece by piece, against each other."""
    conv = nn.Conv2d(6, 6, (3, 2), padding=1, stride=(1, 2), dilation=(2, 1), groups=groups)
    x = torch.randn(3, 6, 40, 31)
    x = x.to(memory_format=torch.channels_last) if kind == "channels_last" else x
    x = x[0] if kind == "unbatched" else x
    conv, x = (t.to(getattr(torch, kind)) if kind in {"float64", "bfloat16"} else t for t in (conv, x))
    out = conv(x)
    every = torch.arange(positions(conv, out))
    rows = input_rows(conv, x, out, every)
    assert rows.dtype == (torch.float64 if kind == "float64" else torch.float32)
    assert rows.is_contiguous()
    singly = [input_rows(conv, x, out, part) for part in every.split(max(1, len(every) // 9))]
    assert torch.equal(rows, torch.cat(singly, 1))
    assert input_rows(conv, x, out, every[:0]).shape == (groups, 0, fan_in(conv))

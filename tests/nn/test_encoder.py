"""An encoder without nested tensors gives at padded positions what torch's gives."""

import copy

import pytest
import torch
from torch import nn

from taut.nn import FilledEncoder


@pytest.fixture(params=[False, True], ids=["no norm", "norm"])
def both(request):
    torch.manual_seed(0)
    layer, norm = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), nn.LayerNorm(8) if request.param else None
    plain = nn.TransformerEncoder(layer, 2, norm).eval()
    filled = copy.deepcopy(plain)
    filled.__class__, filled.use_nested_tensor = FilledEncoder, False
    return plain, filled


def lengths(*each):
    return torch.arange(5)[None] >= torch.tensor(each)[:, None]


CASES = {
    "padded": ({"src_key_padding_mask": lengths(3, 5)}, True),
    "longest": ({"src_key_padding_mask": lengths(3, 2)}, True),
    "as numbers": ({"src_key_padding_mask": lengths(3, 5).float().masked_fill(lengths(3, 5), -torch.inf)}, True),
    "on the left": ({"src_key_padding_mask": lengths(3, 5).flip(1)}, False),
    "none": ({}, False),
    "with another": ({"src_key_padding_mask": lengths(3, 5), "mask": torch.zeros(5, 5, dtype=torch.bool)}, False),
}


@pytest.mark.parametrize("case", CASES)
def test_it_fills_where_torch_does(both, case):
    plain, filled = both
    (settings, fills), x = CASES[case], torch.randn(2, 5, 8)
    with torch.no_grad():
        wanted, found = plain(x, **settings), filled(x, **settings)
        alone = nn.TransformerEncoder.forward(filled, x, **settings)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert torch.allclose(alone, wanted, rtol=1e-4, atol=1e-5) != fills


def test_it_fills_nothing_while_it_trains_or_has_gradients(both):
    plain, filled = both
    x, pads = torch.randn(2, 5, 8), lengths(3, 5)
    torch.testing.assert_close(filled(x, src_key_padding_mask=pads), plain(x, src_key_padding_mask=pads))
    trained = []
    for one in both:
        torch.manual_seed(0)
        with torch.no_grad():
            trained.append(one.train()(x, src_key_padding_mask=pads))
    torch.testing.assert_close(*trained)

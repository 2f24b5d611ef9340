"""Layers held by their channels alone: their damages are put right by held-out patches."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that every torch user knows

import taut
from cases import sequential
from taut.methods import METHODS


def smooth(n):
    """Images whose neighbouring pixels, and channels, go together."""
    x = F.avg_pool2d(torch.randn(n, 6, 20, 20), 5, 1)
    return x + x.roll(1, 1) + 0.05 * torch.randn(n, 6, 16, 16)


def observed(monkeypatch, data, **settings):
    monkeypatch.setattr("taut.structure.collecting.EXACT_LIMIT", 8)
    model = sequential(conv=nn.Conv2d(6, 16, 3)).eval()
    blur = torch.linspace(0.0, 1.0, 16)[:, None, None, None]  # some filters see means, as trained ones do
    model.conv.weight.data = (1 - blur) * model.conv.weight + blur * model.conv.weight.mean((2, 3), keepdim=True)
    net = taut.trace(model, data[:1])
    return model, net, taut.observe(net, model, list(data.split(16)), **settings)


def lost(model, built, x):
    """Half the squared change per sample: what damages count for values."""
    with torch.no_grad():
        return float((built(x) - model(x)).square().sum()) / 2 / len(x)


@pytest.mark.parametrize(
    ("name", "ranks"),
    [("svd", [{"rank": r} for r in (2, 5, 9)]), ("tucker", [{"rank_in": r, "rank_out": 2 * r} for r in (2, 3, 4)])],
)
def test_predicted_is_what_fresh_images_lose(name, ranks, monkeypatch):
    model, net, stats = observed(monkeypatch, smooth(128), output="values")
    group, fresh = net.group(["conv"]), smooth(256)
    assert stats.layers["conv"].weighting.channel is not None
    raw, corrected = [], []
    for settings in ranks:
        method = METHODS[name](**settings)
        factors = stats.factors(group, method)
        true = lost(model, method.rewrite(stats.modules, factors).modules["conv"], fresh)
        raw.append(method.damage(factors) / true)
        corrected.append(stats.damage(group, method) / true)
    assert max(raw) < 0.85
    assert corrected == pytest.approx([1.0] * len(ranks), rel=0.3)


def test_without_gradients_it_is_relative_to_the_output(monkeypatch):
    class Rounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(6, 16, 3)

        def forward(self, x):
            return self.conv(x).round().long()

    monkeypatch.setattr("taut.structure.collecting.EXACT_LIMIT", 8)
    x, model = smooth(128), Rounded().eval()
    net = taut.trace(model, x[:1])
    stats = taut.observe(net, model, list(x.split(16)))
    group, method = net.group(["conv"]), METHODS["svd"](rank=4)
    built = method.rewrite(stats.modules, stats.factors(group, method)).modules["conv"]
    fresh = smooth(256)
    with torch.no_grad():
        y, z = model.conv(fresh), built(fresh)
        energy = (y - model.conv.bias[:, None, None]).square().sum()
    assert stats.damage(group, method) == pytest.approx(float((y - z).square().sum() / energy), rel=0.25)


def test_measured_curves_and_exact_layers_need_no_patches(monkeypatch):
    stats = observed(monkeypatch, smooth(64))[2]
    assert stats.layers["conv"].held.shape[2] == 54
    monkeypatch.undo()
    x = smooth(64)
    model = sequential(conv=nn.Conv2d(6, 16, 3)).eval()
    exact = taut.observe(taut.trace(model, x[:1]), model, x)
    assert exact.layers["conv"].held is None


def test_patches_of_fewer_channels(monkeypatch):
    _, _, stats = observed(monkeypatch, smooth(64))
    one = stats.layers["conv"]
    keep = torch.tensor([0, 2, 5])
    few = one.narrowed(torch.arange(4), keep, (16, 6), (stats.modules["conv"], stats.modules["conv"]))
    taps = (keep[:, None] * 9 + torch.arange(9)).flatten()
    assert torch.equal(few.held, one.held[:, :, taps])

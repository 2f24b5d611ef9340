"""The sentence encoder's study: ranks of definitions, what is lost of them, parts that share no text, the peers."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

HERE = Path(__file__).parents[2] / "experiments" / "minilm"


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    before = set(sys.modules)
    import peers  # noqa: PLC0415 - scripts, found through the lines above
    import wordnet  # noqa: PLC0415

    yield {"peers": peers, "wordnet": wordnet}
    for name in set(sys.modules) - before:
        if str(HERE) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_ranks_are_among_all_definitions(study):
    torch.manual_seed(0)
    queries, definitions = torch.randn(50, 4), torch.randn(50, 4)
    order = (queries @ definitions.T).argsort(1, descending=True)
    ranks = [order[place].tolist().index(place) + 1 for place in range(50)]
    found = study["wordnet"].reciprocal_ranks(queries, definitions, part=16)
    assert found.tolist() == pytest.approx([1 / rank for rank in ranks])


def test_the_interval_is_paired(study):
    rng = np.random.default_rng(1)
    before = rng.random(500)
    found = study["wordnet"].relative_loss(before, 0.9 * before)
    assert [found[key] for key in ("lost_percent", "lost_low", "lost_high")] == pytest.approx([10] * 3)
    other = study["wordnet"].relative_loss(before, 0.9 * rng.permutation(before))
    assert other["lost_high"] - other["lost_low"] > 2


@torch.no_grad()
@pytest.mark.parametrize("spread", ["uniform", "global"])
@pytest.mark.parametrize("whitened", [False, True])
def test_peers_keep_to_the_weights_and_whitening_is_best_for_the_outputs(study, spread, whitened):
    peers = study["peers"]
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 16)

        def forward(self, x, attention_mask):
            return self.second(self.first(x).tanh())

    net = Net()
    scale = torch.linspace(0.01, 3, 16)
    x, mask = torch.randn(8, 6, 16) * scale, torch.ones(8, 6)
    mask[:, 4:] = 0
    x[:, 4:] = 1e3  # padding counts nowhere
    limit = peers.linear_params(net) // 2
    batches = [{"x": x, "attention_mask": mask}]
    small = peers.factorized(net, limit, spread, batches if whitened else None)
    assert 0.8 * limit < peers.linear_params(small) <= limit
    if whitened:
        rows, rank = x[:, :4].reshape(-1, 16), small.first[0].out_features
        error = (net.first(rows) - small.first(rows)).square().sum()
        best = torch.linalg.svdvals(net.first(rows) - net.first.bias)[rank:].square().sum()
        assert float(error) == pytest.approx(float(best), rel=1e-2)

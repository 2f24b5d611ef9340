"""Experts: stacks of matrices of which every row meets the ones that it is routed to."""

from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that every torch user knows

import taut

EXPERTS, WIDTH = 4, 16


class Mixture(nn.Module):
    """Two layers of experts, of whom every row gets the best two by a router; run in one of the ways in use."""

    def __init__(self, way, unused=False):
        super().__init__()
        self.way, self.router = way, nn.Linear(WIDTH, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, 2 * WIDTH, WIDTH) / 4)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, 2 * WIDTH) / 6)
        self.head = nn.Linear(WIDTH, 5)
        if unused:
            nn.init.constant_(self.router.bias[-1], -1e4)

    def forward(self, x):
        shares, chosen = self.router(x).softmax(-1).topk(2)
        rows, chosen = x.repeat_interleave(2, 0), chosen.flatten()
        y = getattr(self, self.way)(rows, chosen) * shares.reshape(-1, 1)
        return self.head(x + y.view(len(x), 2, WIDTH).sum(1))

    def one_by_one(self, x, chosen):
        y = torch.zeros_like(x)
        for number in chosen.unique():
            rows = torch.where(chosen == number)[0]
            y = y.index_copy(0, rows, F.linear(F.linear(x[rows], self.up[number]).relu(), self.down[number]))
        return y

    def batched(self, x, chosen):
        hidden = torch.bmm(self.up[chosen], x.unsqueeze(-1)).relu()
        return torch.bmm(self.down[chosen], hidden).squeeze(-1)

    def grouped(self, x, chosen):
        order = torch.argsort(chosen)
        ends = torch.bincount(chosen, minlength=EXPERTS).cumsum(0).int()
        hidden = F.grouped_mm(x[order], self.up.transpose(-2, -1), offs=ends).relu()
        return F.grouped_mm(hidden, self.down.mT, offs=ends)[torch.argsort(order)]


def mixture(way, unused=False):
    torch.manual_seed(0)
    return Mixture(way, unused).eval()


@pytest.mark.parametrize("way", ["one_by_one", "batched", "grouped"])
def test_experts_are_layers_however_they_are_run(way, tmp_path):
    model, x = mixture(way), torch.randn(64, WIDTH)
    traced = taut.trace(model, x)
    assert (traced["up"].summed, traced["up"].rows) == ((2,), (2 * WIDTH,) * EXPERTS)
    assert traced["up"].macs == 2 * 2 * WIDTH * WIDTH  # of the two that a row is routed to
    result = taut.compress(model, x, budget=taut.Budget(params=0.6), data=[x], compare=False)
    changed = [name for step in result.plan.steps if step.method == "svd" for name in step.layers]
    assert any(name.startswith("up.") for name in changed)
    result.save(tmp_path / "small")
    fresh = torch.randn(32, WIDTH)
    assert torch.equal(taut.load(tmp_path / "small", base=lambda: mixture(way))(fresh), result.model(fresh))
    if way == "batched":  # the only one of the three that torch exports as it was
        taut.export(result.model, x, tmp_path / "small.onnx")  # which checks that it computes the same
    torch.testing.assert_close(result.model(fresh), compressed_one_by_one()(fresh))


@cache
def compressed_one_by_one():
    """What the others are held against."""
    model, x = mixture("one_by_one"), torch.randn(64, WIDTH)
    return taut.compress(model, x, budget=taut.Budget(params=0.6), data=[x], compare=False).model


def test_an_expert_that_no_row_reached_is_left_alone_and_still_works():
    model, x = mixture("batched", unused=True), torch.randn(64, WIDTH)
    result = taut.compress(model, x, budget=taut.Budget(params=0.8), data=[x], compare=False)
    assert any("never called" in kept.reason for kept in result.plan.kept)
    with torch.no_grad():
        model.router.bias[-1] = result.model.router.bias[-1] = 1e4
    wanted, output = model(x), result.model(x)
    assert output.shape == wanted.shape
    assert torch.isfinite(output).all()


def test_transformers_experts_are_reached_and_generate():
    transformers = pytest.importorskip("transformers")

    def build():
        torch.manual_seed(0)
        sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
        config = transformers.MixtralConfig(**sizes, **heads, max_position_embeddings=32, pad_token_id=0)
        return transformers.MixtralForCausalLM(config).eval()

    model, x = build(), {"input_ids": torch.arange(1, 25).view(4, 6)}
    assert taut.inspect(model, x).share("low rank", "macs") > 0.9
    small = taut.compress(model, x, budget=taut.Budget(params=0.7), data=[x], compare=False).model
    words = torch.tensor([[1, 2, 3]])
    ways = [small.generate(words, max_new_tokens=5, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*ways)

"""Packed attention becomes layers first, is made smaller as these are, saved, loaded, exported; else it stays."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import taut
from cases import Attention, run, untouched
from taut.structure.attention_form import packed
from taut.structure.support import ATTENTION
from taut.types import Plan, Step


class Encoded(nn.Module):
    """An encoder of padded words, and a decoder that looks ahead of nothing."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.decoder = nn.TransformerDecoderLayer(16, 4, 32, batch_first=True, norm_first=True)
        self.head = nn.Linear(16, 20)

    def forward(self, source, target, padding):
        seen = self.encoder(self.words(source), src_key_padding_mask=padding)
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        given = self.decoder(
            self.words(target), seen, tgt_mask=causal, tgt_is_causal=True, memory_key_padding_mask=padding
        )
        return self.head(given)


def sentences(batch=4, longest=6):
    lengths = torch.randint(2, longest + 1, (batch,))
    lengths[0] = longest
    padding = torch.arange(longest)[None] >= lengths[:, None]
    return torch.randint(0, 20, (batch, longest)), torch.randint(0, 20, (batch, 5)), padding


@pytest.fixture(scope="module")
def encoded():
    torch.manual_seed(0)
    return Encoded().eval(), sentences(), [sentences() for _ in range(2)]


@pytest.mark.parametrize("methods", [None, "channels"])
def test_an_encoder_and_a_decoder_with_masks_are_halved_saved_loaded_replayed_and_trained(encoded, methods, tmp_path):
    model, example, data = encoded
    with untouched(model):
        result = taut.compress(model, example, budget={"macs": 0.5}, data=data, methods=methods, compare=False)
    assert [step.method for step in result.plan.steps][:3] == ["as_attention"] * 3
    assert sum("_proj" in name for step in result.plan.steps for name in step.layers) >= 5
    small = result.model
    assert taut.trace(small, example).cost.macs <= 0.5 * taut.trace(model, example).cost.macs
    (wanted,) = run(small, example)
    result.save(tmp_path / "small")
    assert torch.equal(run(taut.load(tmp_path / "small", base=Encoded), example)[0], wanted)
    plan = Plan.from_json(result.plan.to_json())
    net = taut.trace(model, example)
    again = taut.apply(model, plan, taut.observe(net, model, data), data)
    assert torch.equal(run(again, example)[0], wanted)
    for longer in (sentences(2, 9), sentences(1, 3)):
        assert run(small, longer)[0].isfinite().all()
    small.train()(*example).sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    small.zero_grad()
    small.eval()


class Seeing(nn.Module):
    """Attention with a padding mask, and its weights."""

    def __init__(self):
        super().__init__()
        self.attend, self.head = nn.MultiheadAttention(8, 2, kdim=6, vdim=4), nn.Linear(8, 3)

    def forward(self, x, y, padding):
        seen, weights = self.attend(x, y, y[..., :4], key_padding_mask=padding)
        return self.head(seen), weights


def test_what_is_made_exports_and_computes_the_same_there(tmp_path):
    model = Seeing().eval()
    example = torch.randn(3, 2, 8), torch.randn(5, 2, 6), torch.arange(5)[None] >= torch.tensor([[5], [3]])
    net = taut.trace(model, example)
    small = taut.apply(model, Plan.of(net, [Step(("attend",), "as_attention")]), taut.observe(net, model))
    assert type(small.attend) is taut.nn.Attention
    with torch.no_grad():
        torch.testing.assert_close(small(*example), model(*example), rtol=1e-4, atol=1e-5)
    taut.export(small, example, tmp_path / "small.onnx")  # raises where the outputs differ
    exported = torch.export.export(small, example).module()
    torch.testing.assert_close(exported(*example), small(*example))


def test_where_nothing_else_is_changed_the_module_is_as_it_was():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 16, batch_first=True), 2).eval()
    with torch.no_grad():
        model.layers[0].self_attn.in_proj_weight.mul_(5)
        for part in model.layers[1].self_attn.in_proj_weight.chunk(3):
            part.copy_(torch.outer(torch.randn(16), torch.randn(16)) * 0.1)
    x = torch.randn(8, 5, 16)
    result = taut.compress(model, x, budget={"macs": 0.9}, data=[x], compare=False)
    assert [step.layers for step in result.plan.steps if step.method == "as_attention"] == [("layers.1.self_attn",)]
    kinds = [type(layer.self_attn) for layer in result.model.layers]
    assert kinds == [nn.MultiheadAttention, taut.nn.Attention]
    kept = {kept.layer for kept in result.plan.kept}
    assert {"layers.0.self_attn", "layers.0.self_attn.out_proj"} <= kept
    before, after = (one.layers[0].self_attn.state_dict() for one in (model, result.model))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before if key.endswith("weight"))
    form = taut.nn.Attention(16, 2, batch_first=True)  # with biases that were corrected since
    assert packed(form)["in_proj_bias"].shape == before["in_proj_bias"].shape
    assert not result.model.use_nested_tensor  # the first layer would hand such tensors to the second
    assert model.use_nested_tensor
    alone = taut.compress(model, x, budget={"macs": 1.0}, data=[x], compare=False)
    assert not alone.plan.steps
    assert alone.model.use_nested_tensor


def test_layers_that_are_kept_stay_as_they_are(encoded):
    model, example, data = encoded
    kept = {"encoder.layers.0.self_attn": 1.0, "decoder.self_attn": 0.9, "decoder.multihead_attn.out_proj": 1.0}
    result = taut.compress(model, example, budget={"macs": 0.75}, data=data, keep=kept, compare=False)
    assert type(result.model.encoder.layers[0].self_attn) is nn.MultiheadAttention
    before = model.decoder.multihead_attn.out_proj.weight
    assert torch.equal(result.model.decoder.multihead_attn.out_proj.weight, before)
    changed = {name for step in result.plan.steps for name in step.layers if step.method != "as_attention"}
    assert not any(name.startswith("decoder.self_attn.") for name in changed)  # no rank keeps nine tenths and saves


class Reading(Attention):
    """Computes with the packed weight, too."""

    def forward(self, x):
        y = self.embed(x)
        return self.head(y + self.attend(y, y, y)[0] * self.attend.in_proj_weight.square().mean())


class Typed(Attention):
    def forward(self, x):
        y = self.embed(x)
        return self.head(self.attend(y, y, y)[0] if type(self.attend) is nn.MultiheadAttention else y)


class Sized(Attention):
    def forward(self, x):
        y = self.embed(x).to(self.attend.in_proj_weight.dtype)
        scale = self.attend.num_heads / self.attend.in_proj_weight.shape[0]
        return self.head(y + self.attend(y, y, y)[0] * scale)


def test_what_other_code_reads_of_it_is_answered_or_it_stays():
    torch.manual_seed(0)
    x = torch.randn(8, 5, 6)
    reading = taut.inspect(Reading().eval(), x)
    blocked = {reach.layer.name: reach.blocked for reach in reading.layers}
    assert all("'weight'" in blocked[f"attend.{name}_proj"] for name in "qkv")
    assert blocked["attend.out_proj"] is None
    assert "what kind of layer" in taut.trace(Typed().eval(), x)["attend"].skip
    sized = Sized().eval()
    result = taut.compress(sized, x, budget={"macs": 0.6}, data=[x], compare=False)
    assert type(result.model.attend) is taut.nn.Attention


def test_tied_projections_stay():
    first, x = Attention().eval(), torch.randn(4, 5, 6)
    first.head = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 3))
    first.head[0].weight = first.attend.out_proj.weight
    assert "shared with 'head.0'" in taut.trace(first, x)["attend"].skip


def test_inspect_shows_the_layers_that_it_becomes():
    seen = taut.inspect(Attention().eval(), torch.randn(4, 5, 6))
    rows = {reach.layer.name: reach for reach in seen.layers}
    assert list(rows) == ["embed", *(f"attend.{name}_proj" for name in ("q", "k", "v", "out")), "head"]
    assert {rows[f"attend.{name}_proj"].plain_form for name in ("q", "k", "v", "out")} == {"as_attention"}
    assert {rows[f"attend.{name}_proj"].outputs for name in "qkv"} == {(16, 16)}  # in whole heads
    assert seen.share("low rank", "params") == 1
    assert 0.8 < seen.share("low rank", "macs") < 1  # the products of attention have no weights
    assert "as_attention first" in str(seen)
    assert taut.trace(Attention().eval(), torch.randn(4, 5, 6))["attend"].skip == ATTENTION


def test_costs_are_as_before(encoded):
    model, example, data = encoded
    net = taut.trace(model, example)
    steps = [Step((layer.name,), "as_attention") for layer in net.layers if layer.skip == ATTENTION]
    assert len(steps) == 3
    small = taut.apply(model, Plan.of(net, steps), taut.observe(net, model, data))
    cost = taut.trace(small, example).cost
    assert (cost.params, cost.macs) == (net.cost.params, net.cost.macs)
    outputs = [run(one, sentences())[0].shape for one in (model, small)]
    assert all(a == b for a, b in pairwise(outputs))


class Lengths(nn.Module):
    """Its mask is as long as the longest sample is: no exporter knows that beforehand."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x, lengths):
        longest = int(lengths.max())
        padding = torch.arange(longest, device=x.device).expand(len(x), longest) >= lengths[:, None]
        return self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]


def test_masks_of_a_length_that_only_the_data_tell_are_exported():
    model, x = Lengths().eval(), torch.randn(3, 5, 8)
    example = (x, torch.tensor([5, 2, 4]))
    net = taut.trace(model, example)
    small = taut.apply(model, Plan.of(net, [Step(("attention",), "as_attention")]), taut.observe(net, model))
    program = torch.export.export(small, example, strict=True)
    torch.testing.assert_close(program.module()(*example), model(*example))
